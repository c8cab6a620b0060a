# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""The true posterior of a VAE with two latents by quadrature, and how far a guide is from it.

With the masses of the cells of a fine grid, which covers both posterior and draws, the divergence
KL(q||p) is estimated from counts of draws as in :mod:`inference.shared.grid`; q within a cell is
not seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.shared.grid import cell_divergence
from models.vae import VAE

__all__ = ["PlanePosterior", "plane_posterior"]

#: The prior has 1e-8 of its mass outside of [-LIMIT, LIMIT]^2, which is searched for the posterior.
LIMIT = 6.0
_SEARCH, _CELLS = 240, 160
#: Cells that hold less than this of the posterior's mass are left out of the fine grid's range.
_LEAST = 1e-6
_AT_ONCE = 4096


@dataclass(frozen=True)
class PlanePosterior:
    """The posterior of one image, and draws of its guide."""

    log_px: float
    """log p(x) by quadrature, nats."""
    log_masses: Tensor
    """Log-masses of the posterior in the cells, ``[n, n]`` (row: z1), which add up to 1."""
    centres: tuple[Tensor, Tensor]
    """Centres of the cells, z1 and z2."""
    draws: Tensor
    """Draws of the guide, ``[S, 2]``."""
    kl: float
    """KL(guide || posterior) in nats, corrected for the number of draws."""

    @property
    def negentropy(self) -> float:
        """KL(posterior || Gaussian of its moments), nats: how far it is from any Gaussian."""
        masses, (first, second) = self.log_masses.exp(), self.centres
        points = torch.cartesian_prod(first, second).double()
        weights = masses.flatten().unsqueeze(-1)
        centred = points - (weights * points).sum(0)
        covariance = (weights * centred).mT @ centred
        log_cell = math.log(float(first[1] - first[0]) * float(second[1] - second[0]))
        entropy = -(masses * (self.log_masses - log_cell)).sum()
        gaussian = math.log(2 * math.pi * math.e) + 0.5 * torch.logdet(covariance)
        return float(gaussian - entropy)

    @property
    def shown(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Ranges of z1 and z2 that hold nearly all of both."""
        low, high = (self.draws[:3000].quantile(part, 0) for part in (0.002, 0.998))
        inside = self.log_masses > math.log(1e-5)
        ranges = []
        for axis, centres in enumerate(self.centres):
            held = centres[inside.any(1 - axis)]
            left = min(float(held[0]), float(low[axis]))
            right = max(float(held[-1]), float(high[axis]))
            margin = 0.05 * (right - left)
            ranges.append((left - margin, right + margin))
        return ranges[0], ranges[1]


@torch.no_grad()
def plane_posterior(vae: VAE, x: Tensor, *, num_draws: int = 400_000) -> PlanePosterior:
    """Integrates the posterior of an image on a grid and compares the guide with it.

    :param VAE vae: a model with two latents.
    :param Tensor x: one image, ``[1, X]``.
    :param int num_draws: draws of the guide.
    :raises ValueError: for another number of latents or images.
    """
    if vae.latent_dim != 2 or len(x) != 1:
        raise ValueError(
            f"expected a model with 2 latents and 1 image, got {vae.latent_dim} and {len(x)}"
        )
    draws = vae.posterior(x).sample(torch.Size((num_draws,)))[:, 0]
    axis = torch.linspace(-LIMIT, LIMIT, 2 * _SEARCH + 1, device=x.device)[1::2]
    coarse = _log_joint(vae, x, axis, axis)
    inside = coarse - coarse.logsumexp((0, 1)) > math.log(_LEAST)
    edges = []
    for dim in range(2):
        held = axis[inside.any(1 - dim)]
        margin = 2 * LIMIT / _SEARCH * 1.5
        low = min(float(held[0]) - margin, float(draws[:, dim].min()))
        high = max(float(held[-1]) + margin, float(draws[:, dim].max()))
        edges.append(torch.linspace(low, high, _CELLS + 1, device=x.device))
    # Four points of the midpoint rule in a cell.
    fine = [_midpoints(edge, 2) for edge in edges]
    log_joint = _log_joint(vae, x, *fine).reshape(_CELLS, 2, _CELLS, 2).logsumexp((1, 3))
    width = [float(edge[1] - edge[0]) for edge in edges]
    log_masses = (log_joint + math.log(width[0] * width[1] / 4)).double()
    log_px = log_masses.logsumexp((0, 1))
    cells = [
        ((draws[:, dim] - edges[dim][0]) / width[dim]).long().clamp_(0, _CELLS - 1)
        for dim in range(2)
    ]
    counts = torch.bincount(cells[0] * _CELLS + cells[1], minlength=_CELLS**2).double()
    kl, _ = cell_divergence(counts.reshape(_CELLS, _CELLS), log_masses - log_px)
    return PlanePosterior(
        log_px=float(log_px),
        log_masses=log_masses - log_px,
        centres=(_midpoints(edges[0], 1), _midpoints(edges[1], 1)),
        draws=draws,
        kl=kl,
    )


def _log_joint(vae: VAE, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    points = torch.cartesian_prod(first, second).unsqueeze(1)
    values = torch.cat([vae.log_joint(x, part) for part in points.split(_AT_ONCE)])
    return values.reshape(len(first), len(second))


def _midpoints(edges: Tensor, parts: int) -> Tensor:
    count = (len(edges) - 1) * 2 * parts + 1
    return torch.linspace(float(edges[0]), float(edges[-1]), count, device=edges.device)[1::2]
