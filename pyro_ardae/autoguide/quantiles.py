# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Quantiles of draws: how many, from which noise, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["checked_levels", "decreases", "fixed_noise", "num_draws", "quantiles_of"]

#: Numbers that a table of draws for quantiles holds at most.
_TABLE = 2**25


def checked_levels(levels: Sequence[float] | Tensor) -> Tensor:
    """The levels as a vector.

    :raises ValueError: for numbers outside of [0, 1].
    """
    result = torch.as_tensor(levels, dtype=torch.float64).flatten()
    if not bool(((result >= 0) & (result <= 1)).all()):
        raise ValueError(f"quantiles: expected numbers in [0, 1], got {result.tolist()}.")
    return result


def decreases(transform: Any) -> bool:
    """Whether a map of single coordinates turns their order around."""
    try:
        return bool((torch.as_tensor(transform.sign) < 0).all())
    except NotImplementedError:
        return False


def num_draws(wanted: int, width: int) -> int:
    """An even number of draws of ``width`` numbers each, as many as wanted if memory allows."""
    return min(wanted, max(256, _TABLE // width)) // 2 * 2


def fixed_noise() -> Callable[[tuple[int, ...], Tensor], Tensor]:
    r"""A function of shape and a tensor of the kind wanted: the same pairs :math:`\pm \epsilon`
    in every call of this one, whatever the global random state.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
        shape = (shape[0] // 2, *shape[1:])
        half = torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu")
        return torch.cat([half, -half]).to(like.device)

    return noise


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of draws along the first dimension, linearly interpolated."""
    ordered = draws.sort(0).values  # torch.quantile takes at most 2**24 elements
    at = levels * (len(draws) - 1)
    below = at.floor().long().clamp(max=len(draws) - 2).to(draws.device)
    weight = (at.to(draws.device) - below).to(draws.dtype)
    weight = weight.reshape(-1, *[1] * (draws.dim() - 1))
    return ordered[below].lerp(ordered[below + 1], weight)
