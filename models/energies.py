# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Four unnormalized densities of the plane, exp(-U), of Rezende & Mohamed (2015), table 1.

With :math:`w_1 = \sin(\pi z_1 / 2)`, :math:`w_2 = 3 \exp(-\tfrac12 ((z_1 - 1) / 0.6)^2)` and
:math:`w_3 = 3 / (1 + \exp(-(z_1 - 1) / 0.3))`,

.. math::
    U_1 &= \tfrac12 \left(\tfrac{\lVert z \rVert - 2}{0.4}\right)^2 - \log \left(
        e^{-\frac12 ((z_1 - 2) / 0.6)^2} + e^{-\frac12 ((z_1 + 2) / 0.6)^2} \right) \\
    U_2 &= \tfrac12 \left(\tfrac{z_2 - w_1}{0.4}\right)^2 \\
    U_3 &= -\log \left( e^{-\frac12 ((z_2 - w_1) / 0.35)^2}
        + e^{-\frac12 ((z_2 - w_1 + w_2) / 0.35)^2} \right) \\
    U_4 &= -\log \left( e^{-\frac12 ((z_2 - w_1) / 0.4)^2}
        + e^{-\frac12 ((z_2 - w_1 + w_3) / 0.35)^2} \right)

U2, U3 and U4 are ridges without end along :math:`z_1`, and their densities have no integral. All
four therefore get a soft box, :math:`\sum_i \max(|z_i| - 6, 0)^2`.

Reference: Rezende, Mohamed, "Variational Inference with Normalizing Flows", ICML 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

__all__ = ["BOX", "ENERGIES", "Energy", "log_normalizer"]

#: Half the width of the soft box.
BOX = 6.0


@dataclass(frozen=True)
class Energy:
    """An energy of the plane, and the Pyro model whose posterior is its density.

    :param str name: ``"u1"`` to ``"u4"``.
    :param Callable formula: points ``[*, 2]`` to the energy of the paper ``[*]``.
    :param tuple[float, ...] cuts: values of z1 at which ridges part or join. The pieces into which
        these lines cut the region of high density are the modes that are counted.
    :param Callable with_gradient: points to the formula's value ``[*]`` and gradient ``[*, 2]``, if
        not by autograd, which takes three times as long.
    """

    name: str
    formula: Callable[[Tensor], Tensor]
    cuts: tuple[float, ...] = ()
    with_gradient: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The energy with the soft box: ``[*, 2]`` to ``[*]``."""
        return self.formula(z) + F.softshrink(z, BOX).square().sum(-1)

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The energy with the soft box and its gradient: ``[*, 2]`` to ``[*]`` and ``[*, 2]``."""
        outside = F.softshrink(z, BOX)
        value, gradient = (self.with_gradient or self._by_autograd)(z)
        return value + outside.square().sum(-1), torch.add(gradient, outside, alpha=2)

    def _by_autograd(self, z: Tensor) -> tuple[Tensor, Tensor]:
        def total(z: Tensor) -> tuple[Tensor, Tensor]:
            value = self.formula(z)
            return value.sum(), value

        gradient, value = torch.func.grad(total, has_aux=True)(z)
        return value, gradient

    def slope(self, z: Tensor) -> Tensor:
        """The gradient of the energy with the soft box: ``[*, 2]`` to ``[*, 2]``."""
        return self.value_and_slope(z)[1]

    def model(self, beta: float = 1.0) -> None:
        """The Pyro model: one latent ``z``, whose log-density is ``-beta * U(z)``, unnormalized.

        :param float beta: inverse temperature, positive; below 1 while it is annealed.
        """
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("energy", -beta * self(z))


def log_normalizer(energy: Energy, *, limit: float = 10.0, size: int = 1000) -> float:
    """Log of the integral of exp(-U), by the midpoint rule on a square grid.

    The density vanishes smoothly at the border of the grid, and the rule's error with it: 500 and
    2000 points a side agree to 1e-6.

    :param Energy energy: the energy.
    :param float limit: the grid covers ``[-limit, limit]^2``; 1e-8 of the mass lies outside of 10.
    :param int size: points a side.
    """
    axis = torch.linspace(-limit, limit, 2 * size + 1, dtype=torch.float64)[1::2]
    total = energy(torch.cartesian_prod(axis, axis)).neg().logsumexp(0)
    return float(total) + 2 * math.log(2 * limit / size)


def _bump(x: Tensor, scale: float) -> Tensor:
    """Logarithm of a Gaussian bump of height 1."""
    return -0.5 * (x / scale).square()


def _ridge(z: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * z[..., 0])


def _u1(z: Tensor) -> Tensor:
    # hypot has no gradient at the origin; this far below rounding nothing else changes.
    radius = (z.square().sum(-1) + 1e-12).sqrt()
    left_and_right = torch.logaddexp(_bump(z[..., 0] - 2, 0.6), _bump(z[..., 0] + 2, 0.6))
    return -_bump(radius - 2, 0.4) - left_and_right


def _u1_with_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    x = z[..., 0]
    radius = (z.square().sum(-1) + 1e-12).sqrt()
    left, right = _bump(x + 2, 0.6), _bump(x - 2, 0.6)
    off = (radius - 2) / 0.4
    gradient = z * (off / (0.4 * radius)).unsqueeze(-1)
    # Of the two bumps, the difference of their shares is a hyperbolic tangent.
    gradient[..., 0] += (x - 2 * torch.tanh((right - left) / 2)) / 0.6**2
    return 0.5 * off.square() - torch.logaddexp(left, right), gradient


def _u2(z: Tensor) -> Tensor:
    return -_bump(z[..., 1] - _ridge(z), 0.4)


def _u2_with_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    x, y = z.unbind(-1)
    angle = math.pi / 2 * x
    off = (y - angle.sin()) / 0.4
    across = off / 0.4
    return 0.5 * off.square(), torch.stack([-math.pi / 2 * angle.cos() * across, across], -1)


def _fork(z: Tensor, apart: Tensor, scale: float) -> Tensor:
    """The energy of two ridges, the lower one ``apart`` below and 0.35 wide."""
    above = z[..., 1] - _ridge(z)
    return -torch.logaddexp(_bump(above, scale), _bump(above + apart, 0.35))


def _fork_with_gradient(
    z: Tensor, apart: Tensor, slope: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """It and its gradient, with the derivative of ``apart`` by z1."""
    x, y = z.unbind(-1)
    angle = math.pi / 2 * x
    above = y - angle.sin()
    below = above + apart
    upper_log, lower_log = _bump(above, scale), _bump(below, 0.35)
    share = torch.sigmoid(lower_log - upper_log)
    lower = share * below / 0.35**2
    across = torch.addcmul(lower, 1 - share, above, value=1 / scale**2)
    along = lower * slope - math.pi / 2 * angle.cos() * across
    return -torch.logaddexp(upper_log, lower_log), torch.stack([along, across], -1)


def _u3_apart(z: Tensor) -> Tensor:
    return 3 * _bump(z[..., 0] - 1, 0.6).exp()


def _u3(z: Tensor) -> Tensor:
    return _fork(z, _u3_apart(z), 0.35)


def _u3_with_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    apart = _u3_apart(z)
    return _fork_with_gradient(z, apart, -apart * (z[..., 0] - 1) / 0.6**2, 0.35)


def _u4_apart(z: Tensor) -> Tensor:
    return 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)


def _u4(z: Tensor) -> Tensor:
    return _fork(z, _u4_apart(z), 0.4)


def _u4_with_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    apart = _u4_apart(z)
    return _fork_with_gradient(z, apart, apart * (1 - apart / 3) / 0.3, 0.4)


#: The energies by name. The ridges of U3 part at z1 = 0.3 and meet again at 1.7, those of U4 part
#: at 1.1: where the valley between them is a tenth of the highest density deep.
ENERGIES: dict[str, Energy] = {
    "u1": Energy("u1", _u1, with_gradient=_u1_with_gradient),
    "u2": Energy("u2", _u2, with_gradient=_u2_with_gradient),
    "u3": Energy("u3", _u3, (0.3, 1.7), _u3_with_gradient),
    "u4": Energy("u4", _u4, (1.1,), _u4_with_gradient),
}
