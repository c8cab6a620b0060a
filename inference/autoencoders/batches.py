# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Which rows of a data set are seen when: functions of the seed and the step, without any state
that a resumed run would have to restore.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inference.shared.errors import UserError

__all__ = ["Order", "chosen", "generator"]


class Order:
    """The order in which the rows of a training set are seen, shuffled anew at each epoch.

    :param int count: number of rows.
    :param int batch_size: rows of a minibatch; the rest of an epoch is left out.
    :param int seed: seed of the order.
    :param torch.device device: where the indices are wanted.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, device: torch.device) -> None:
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        self.device = device
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """The rows of the minibatch of a step."""
        epoch, batch = divmod(step, self.count // self.batch_size)
        if epoch != self._epoch:
            order = torch.randperm(self.count, generator=generator(self.seed, 0, epoch))
            self._order, self._epoch = order.to(self.device), epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]


def chosen(count: int, num_points: int | None, seed: int) -> Tensor:
    """A random subset of ``count`` rows; all of them, in order, for ``None`` or too few.

    :raises UserError: for less than one.
    """
    if num_points is not None and num_points < 1:
        raise UserError(f"expected a positive number of data points, found {num_points}")
    if num_points is None or num_points >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(seed, 1, 0))[:num_points]


def generator(*key: int, device: torch.device | None = None) -> torch.Generator:
    """A source of randomness that is a function of some numbers."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device or "cpu").manual_seed(int(seed) >> 1)
