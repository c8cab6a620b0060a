# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Targets of score estimation: distributions that can be sampled and whose score is known.

=====================  ====  =======  ==============================================================
name                   dim.  context  what it is
=====================  ====  =======  ==============================================================
``mixture1``              1           two Gaussians of unequal width
``ring``                  2           eight Gaussians on a circle
``moons``                 2           two half circles of 32 narrow Gaussians each
``swissroll``             2           a spiral of 400 narrow Gaussians
``hierarchy``             2           semi-implicit: Gaussian noise around a curve
``funnel``                2           Neal's funnel: the width of one coordinate is the other
``thin``                  2           Gaussian, condition number 10^4, 30 degrees off the axes
``heavy``                 4           multivariate Student's t, 3 degrees of freedom
``mixture2``, ``8``,   2, 8,       4  three Gaussians; location, scale (by a factor e) and positions
``32``                    32          depend on the context
``mixture8-rotated``       8       4  the same, not aligned with the axes
``moving8``                8       4  the same as ``mixture8``; components turn by 0.02 an update
=====================  ====  =======  ==============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.densities import Funnel, StudentT, Target
from models.mixtures import ConditionalMixture, GaussianMixture, Hierarchy

__all__ = ["TARGETS", "Target"]


def _equal(means: Tensor, scale: float) -> GaussianMixture:
    count, dim = means.shape
    one = torch.ones(count, dtype=means.dtype)
    return GaussianMixture(dim, 0, one, means, torch.full_like(means, scale))


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _mixture1() -> GaussianMixture:
    weights, means, scales = torch.tensor(
        [[0.4, 0.6], [-1.5, 1.0], [0.4, 0.7]], dtype=torch.float64
    )
    return GaussianMixture(1, 0, weights, means[:, None], scales[:, None])


def _ring() -> GaussianMixture:
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    return _equal(_polar(torch.full_like(angle, 2.0), angle), 0.35)


def _moons() -> GaussianMixture:
    angle = torch.linspace(0, math.pi, 32, dtype=torch.float64)
    upper = _polar(torch.ones_like(angle), angle)
    offset = torch.tensor([0.5, 0.25], dtype=torch.float64)
    return _equal(2 * torch.cat([upper - offset, offset - upper]), 0.2)


def _swissroll() -> GaussianMixture:
    # Radius and angle grow together; their square uniform, for about equal distances.
    angle = torch.linspace(1.5**2, 4.5**2, 400, dtype=torch.float64).sqrt() * math.pi
    return _equal(_polar(angle / math.pi, angle), 0.15)


def _thin() -> GaussianMixture:
    angle = torch.tensor([math.pi / 6, math.pi * 2 / 3], dtype=torch.float64)
    frame = _polar(torch.ones_like(angle), angle).mT
    one, scales = torch.ones(1, dtype=torch.float64), torch.tensor([[1, 0.01]], dtype=torch.float64)
    return GaussianMixture(2, 0, one, torch.zeros_like(scales), scales, frame)


# Radius, at which the Gaussian with the exact moments has the relative errors .67, .47 and .29,
# and frequency.
_CONDITIONAL = {2: (2.31, 1.0), 8: (2.52, 0.5), 32: (2.53, 0.5)}


def _conditional(dim: int, rotated: bool = False, drift: float = 0.0) -> ConditionalMixture:
    radius, frequency = _CONDITIONAL[dim]
    return ConditionalMixture(dim, 4, radius, frequency, rotated, drift)


TARGETS: dict[str, Callable[[], Target]] = {
    "mixture1": _mixture1,
    "ring": _ring,
    "moons": _moons,
    "swissroll": _swissroll,
    "hierarchy": lambda: Hierarchy(2, 0),
    "funnel": lambda: Funnel(2, 0, 1.5),
    "thin": _thin,
    "heavy": lambda: StudentT(4, 0, 3),
    "mixture2": lambda: _conditional(2),
    "mixture8": lambda: _conditional(8),
    "mixture32": lambda: _conditional(32),
    "mixture8-rotated": lambda: _conditional(8, rotated=True),
    "moving8": lambda: _conditional(8, drift=0.02),
}
"""Targets by name: each call makes one."""
