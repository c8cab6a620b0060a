# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The joint distribution of a variable and of one that is drawn given it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Chain"]


class Chain(dist.TorchDistribution):
    r""":math:`p(a)\, p(b \mid a)` over the concatenation of a and b, reparameterized.

    :param TorchDistribution first: p(a), event shape ``[A]``.
    :param Callable second: a ``[*sample, *batch, A]`` to :math:`p(b \mid a)`, event shape ``[B]``.
    :param int second_dim: B.
    :param bool second_in_front: concatenate (b, a) instead of (a, b).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        first: dist.TorchDistribution,
        second: Callable[[Tensor], dist.TorchDistribution],
        *,
        second_dim: int,
        second_in_front: bool = False,
    ) -> None:
        self.first, self.second, self.second_dim = first, second, second_dim
        self.second_in_front = second_in_front
        event_shape = torch.Size([first.event_shape[0] + second_dim])
        super().__init__(first.batch_shape, event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``[*sample, *batch, A + B]``."""
        a = self.first.rsample(torch.Size(sample_shape))
        b = self.second(a).rsample()
        return torch.cat([b, a] if self.second_in_front else [a, b], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density ``[*sample, *batch]``.

        :raises NotImplementedError: if one of the two has none.
        """
        first_dim = self.event_shape[0] - self.second_dim
        if self.second_in_front:
            b, a = value.split([self.second_dim, first_dim], -1)
        else:
            a, b = value.split([first_dim, self.second_dim], -1)
        return self.first.log_prob(a) + self.second(a).log_prob(b)
