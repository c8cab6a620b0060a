# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A bound on gradients in units of the running mean of their norm."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clip_factor"]

#: Share of a new norm in the running mean.
_RATE = 0.02


@torch.no_grad()
def clip_factor(norm: Tensor, mean: Tensor, clip: float) -> Tensor:
    """What a gradient is multiplied by so that its norm is ``clip`` means at most; moves the mean.

    A GPU is not waited for. A norm that is not finite has no part in the mean, and a factor of 0.

    :param norm: norm of the gradient, ``[]``.
    :param mean: running mean of bounded norms, ``[]``, changed in place; 0 before the first, which
        is its start.
    :param clip: bound in units of the mean, >= 1.
    """
    finite = norm.isfinite()
    norm = torch.where(finite, norm, mean)
    mean.copy_(torch.where(mean > 0, mean, norm))
    bounded = norm.minimum(clip * mean)
    mean.lerp_(bounded, _RATE)
    return finite * bounded / norm.clamp_min(1e-30)
