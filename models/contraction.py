# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Linear layers that bring no two inputs further apart than they are."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["SILU_SLOPE", "contracted", "spectral_bound"]

#: The largest slope of SiLU, at 2.3994, rounded up.
SILU_SLOPE = 1.09985


def spectral_bound(weight: Tensor) -> Tensor:
    r"""An upper bound of the largest singular value: :math:`(\sum_i \sigma_i^{16})^{1/16}`.

    The Schatten norm of order 16, by four small products. It is above the spectral norm by a factor
    of :math:`r^{1/16}` at most, r the rank: 1.3 for 64, 1.05 to 1.15 in practice. Unlike a power
    iteration it holds exactly, is smooth and keeps no state.

    :param Tensor weight: a matrix.
    :returns: a positive scalar.
    """
    gram = weight.mT @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.mT
    scale = gram.diagonal().sum() + 1e-12  # powers of what is above it would overflow
    power = gram / scale
    for _ in range(2):
        power = power @ power
    return (power.square().sum() + 1e-30) ** (1 / 16) * scale.sqrt()


def contracted(layers: nn.Module) -> dict[str, Tensor]:
    """Matrices of ``layers``, each over its :func:`spectral_bound` where that is above 1, by the
    name of the parameter: for :func:`torch.func.functional_call`.
    """
    return {
        name: weight / spectral_bound(weight).clamp_min(1.0)
        for name, weight in layers.named_parameters()
        if weight.dim() == 2
    }
