# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What an automatic guide learns: a network of noise, and a triangular map after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ResidualSampler", "TriangularMap"]


class ResidualSampler(nn.Module):
    r"""Noise that a network shifts and scales: the implicit part of an automatic guide.

    .. math::
        y = \epsilon_{1:D} \odot e^{\gamma\, b(h)} + \gamma\, a(h), \qquad
        h = h(\kappa\, \epsilon, c),

    with a trunk h of SiLU layers, whose last layers a and b start at zero: before training y is the
    noise :math:`\epsilon_{1:D}` itself.

    :param latent_dim: dimensions D of y, >= 1.
    :param context_dim: width of the context c; 0 for none.
    :param noise_dim: width of :math:`\epsilon`, ``latent_dim`` at least. More than that lets
        the network choose between modes without folding the noise that spreads them.
    :param hidden_dims: widths of the hidden layers, one at least.
    :param gain: :math:`\gamma > 0`, the speed at which the network departs from the noise.
    :param input_scale: :math:`\kappa > 0`. Above 1 the network starts with higher frequencies,
        which sharp turns and separated modes take.
    :raises ValueError: for an argument out of range.
    """

    #: Bound on the log scale :math:`\gamma b`.
    MAX_LOG_SCALE = 3.0

    def __init__(
        self,
        latent_dim: int,
        context_dim: int = 0,
        *,
        noise_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        gain: float = 0.2,
        input_scale: float = 3.0,
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
        self.latent_dim, self.noise_dim = latent_dim, noise_dim
        self.gain, self.input_scale = gain, input_scale
        self.from_noise = nn.Linear(noise_dim, hidden_dims[0])
        self.from_context = (
            nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        )
        layers: list[nn.Module] = [nn.SiLU()]
        for fan_in, fan_out in pairwise(hidden_dims):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        last = nn.Linear(hidden_dims[-1], 2 * latent_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.trunk = nn.Sequential(*layers, last)

    def bind(self, context: Float[Tensor, "*batch C"] | None = None) -> Callable[..., Tensor]:
        """The sampler of :class:`~pyro_ardae.Implicit` for one context.

        What does not depend on the noise is computed here, once per row and not once per draw.

        :returns: maps noise ``[*sample, *batch, noise_dim]``, and a context that it ignores, to
            draws ``[*sample, *batch, D]``.
        """
        if self.from_context is None or context is None:
            return partial(self._draw, shift=None)
        return partial(self._draw, shift=self.from_context(context))

    def _draw(
        self, noise: Tensor, _context: Tensor | None = None, *, shift: Tensor | None
    ) -> Tensor:
        hidden = self.from_noise(self.input_scale * noise)
        if shift is not None:
            hidden = hidden + shift
        added, log_scale = (self.gain * self.trunk(hidden)).chunk(2, -1)
        scale = _bounded(log_scale, self.MAX_LOG_SCALE).exp()
        return torch.addcmul(added, noise[..., : self.latent_dim], scale)


class TriangularMap(nn.Module):
    r"""Location, scale, correlation and funnels: an invertible map with a known Jacobian.

    .. math::
        z_i = \mu_i + s_i \Big( e^{g_i} y_i + \sum_{j < i} L_{ij} y_j + \sum_j V_{ij} u_j \Big),
        \qquad g_i = \sum_{j < i} B_{ij} y_j + \sum_j C_{ij} u_j,

    with a condition u, for which V and C may differ by row as linear functions of its embedding.
    L, B, V and C start at zero. B makes the width of a latent an exponential of those before
    it, the shape of hierarchical models: of the scale of a group, of its members.

    Since this part is explicit, so is its entropy
    :math:`E[\sum_i \log s_i + g_i]`, and the score is estimated of y alone, where widths are of
    order one.

    :param dim: dimensions D of z.
    :param condition_dim: width of u; 0 for none.
    :param embedding_dim: width of a row's embedding.
    """

    #: Bound on g: a scale that leaves it by more than e^6 is a runaway, not a posterior.
    MAX_LOG_SCALE = 6.0
    #: Factor on L and B: Adam moves them that much faster than the network.
    RATE = 4.0

    def __init__(self, dim: int, condition_dim: int = 0, embedding_dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.mix = nn.Parameter(torch.zeros(dim, dim))
        self.gate = nn.Parameter(torch.zeros(dim, dim))
        self.coupling = (
            nn.Parameter(torch.zeros(2 * dim, condition_dim, 1 + embedding_dim))
            if condition_dim
            else None
        )

    def forward(
        self,
        y: Float[Tensor, "*batch D"],
        loc: Float[Tensor, "*batch D"],
        log_scale: Float[Tensor, "*batch D"],
        u: Float[Tensor, "*batch C"] | None = None,
        embedding: Float[Tensor, "*batch E"] | None = None,
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Values, and the log of every diagonal entry of the Jacobian.

        Batch shapes broadcast.
        """
        added = y @ (self.RATE * self.mix.tril(-1)).mT
        gate = y @ (self.RATE * self.gate.tril(-1)).mT
        if self.coupling is not None and u is not None and embedding is not None:
            constant, by_row = self.coupling[..., 0], self.coupling[..., 1:]
            coupled = u @ constant.mT
            if by_row.shape[-1]:  # rows times particles: the embedding goes last
                weighted = torch.einsum("...c,dce->...de", u, by_row)
                coupled = coupled + (weighted @ embedding.unsqueeze(-1)).squeeze(-1)
            of_loc, of_gate = coupled.chunk(2, -1)
            added, gate = added + of_loc, gate + of_gate
        gate = _bounded(gate, self.MAX_LOG_SCALE)
        z = loc + log_scale.exp() * (y * gate.exp() + added)
        return z, (log_scale + gate).expand_as(z)


def _bounded(value: Tensor, bound: float) -> Tensor:
    return bound * torch.tanh(value / bound)
