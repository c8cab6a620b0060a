# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The network behind an automatic guide: noise to latents, a Gaussian before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ResidualSampler"]

#: Bound on the log scale by which the network may modulate its input noise.
_MAX_LOG_SCALE = 3.0


class ResidualSampler(nn.Module):
    r"""A linear map of noise, which a network shifts and scales.

    .. math::
        z = \mu + s \odot W \big(\epsilon_{1:D} \odot e^{\gamma\, b(h)} + \gamma\, a(h) + V u\big),
        \qquad h = h(\kappa\, \epsilon, u),

    with noise :math:`\epsilon`, a condition :math:`u` (none for an unconditional sampler) and a
    trunk h of SiLU layers. W starts at the identity, V and the last layers a and b at zero: before
    training :math:`z \sim N(\mu, \mathrm{diag}(s^2))` exactly. The scales b are what funnels need,
    the shifts a what curved and separated densities need.

    Location :math:`\mu` and scale s belong to the caller, see :meth:`bind`.

    :param latent_dim: dimensions D of z, >= 1.
    :param condition_dim: width of u; 0 for none.
    :param noise_dim: width of :math:`\epsilon`, ``latent_dim`` at least. More than that lets
        the network choose between modes without folding the noise that spreads them.
    :param hidden_dims: widths of the hidden layers, one at least.
    :param gain: :math:`\gamma > 0`, the speed at which the network departs from the linear map.
    :param input_scale: :math:`\kappa > 0`. Above 1 the network starts with higher frequencies,
        which sharp turns and separated modes take.
    :raises ValueError: for an argument out of range.
    """

    def __init__(
        self,
        latent_dim: int,
        condition_dim: int = 0,
        *,
        noise_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        gain: float = 0.1,
        input_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if noise_dim < latent_dim:
            raise ValueError(
                f"noise_dim: expected at least the {latent_dim} dimensions of the latent, got "
                f"{noise_dim}. With fewer, draws lie on a surface, where no score exists."
            )
        if not hidden_dims:
            raise ValueError("hidden_dims: expected at least one hidden layer, got none.")
        if not (gain > 0 and input_scale > 0):
            raise ValueError(
                f"expected gain > 0 and input_scale > 0, got {gain} and {input_scale}."
            )
        self.latent_dim, self.condition_dim = latent_dim, condition_dim
        self.noise_dim = noise_dim
        self.gain, self.input_scale = gain, input_scale
        self.from_noise = nn.Linear(noise_dim, hidden_dims[0])
        layers: list[nn.Module] = [nn.SiLU()]
        for fan_in, fan_out in pairwise(hidden_dims):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Linear(hidden_dims[-1], 2 * latent_dim))
        self.mix = nn.Parameter(torch.eye(latent_dim))
        nn.init.zeros_(self.trunk[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.trunk[-1].bias)  # type: ignore[arg-type]
        if condition_dim:
            self.from_condition = nn.Linear(condition_dim, hidden_dims[0], bias=False)
            self.coupling = nn.Linear(condition_dim, latent_dim, bias=False)
            nn.init.zeros_(self.coupling.weight)

    def bind(
        self,
        loc: Float[Tensor, "*batch D"],
        log_scale: Float[Tensor, "*batch D"],
        condition: Float[Tensor, "*batch C"] | None = None,
    ) -> Callable[..., Tensor]:
        """The sampler of :class:`~pyro_ardae.Implicit` at given location, scale and condition.

        What does not depend on the noise is computed here, once per row and not once per draw.

        :returns: maps noise ``[*sample, *batch, noise_dim]``, and a context that it ignores, to
            draws ``[*sample, *batch, D]``.
        """
        if condition is None:
            return partial(self._draw, loc=loc, scale=log_scale.exp(), shift=None, offset=None)
        shift, offset = self.from_condition(condition), self.coupling(condition)
        return partial(self._draw, loc=loc, scale=log_scale.exp(), shift=shift, offset=offset)

    def _draw(
        self,
        noise: Tensor,
        _context: Tensor | None = None,
        *,
        loc: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        hidden = self.from_noise(self.input_scale * noise)
        if shift is not None:
            hidden = hidden + shift
        added, log_scale = (self.gain * self.trunk(hidden)).chunk(2, -1)
        log_scale = _MAX_LOG_SCALE * torch.tanh(log_scale / _MAX_LOG_SCALE)
        inner = torch.addcmul(added, noise[..., : self.latent_dim], log_scale.exp())
        if offset is not None:
            inner = inner + offset
        return loc + scale * (inner @ self.mix.mT)
