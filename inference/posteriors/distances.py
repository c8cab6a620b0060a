# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Distances between draws of a guide and draws of the posterior, coordinates standardized.

All take draws ``[n, dim]`` in units of the posterior's standard deviations (:func:`standardize`),
float64. Draws of the posterior itself are not at distance 0: state that floor beside them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.shared.randomness import forked_rng

__all__ = [
    "c2st",
    "kolmogorov_smirnov",
    "modes_found",
    "moment_errors",
    "sliced_wasserstein",
    "standardize",
]


def standardize(draws: Tensor, reference: Tensor) -> Tensor:
    """In units of the reference's standard deviations, from its mean."""
    return (draws - reference.mean(0)) / reference.std(0).clamp_min(1e-30)


def sliced_wasserstein(
    first: Tensor, second: Tensor, *, num_projections: int = 256, seed: int = 0
) -> float:
    r"""The sliced 2-Wasserstein distance, the root of the mean squared distance of projections.

    .. math:: \Big( E_{\theta} \int_0^1 \big(F^{-1}_{\theta^\top x}(u)
        - F^{-1}_{\theta^\top y}(u)\big)^2 du \Big)^{1/2}, \qquad \lVert \theta \rVert = 1.

    Two Gaussians with equal covariances whose means differ by m are at distance
    :math:`\lVert m \rVert / \sqrt D`.

    :param Tensor first: draws ``[n, dim]``.
    :param Tensor second: draws ``[m, dim]``.
    :param int num_projections: directions, the same for a seed.
    :param int seed: seed of the directions.

    Reference: Bonneel, Rabin, Peyré, Pfister, "Sliced and Radon Wasserstein barycenters of
    measures", JMIV 2015.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(first.shape[1], num_projections, generator=generator, dtype=torch.double)
    theta = F.normalize(theta, dim=0)
    x, y = ((draws.double() @ theta).sort(0).values for draws in (first, second))
    if len(x) != len(y):  # at common quantiles
        level = (torch.arange(min(len(x), len(y)), dtype=torch.double) + 0.5) / min(len(x), len(y))
        x, y = (_quantiles(values, level) for values in (x, y))
    return float((x - y).square().mean().sqrt())


def kolmogorov_smirnov(first: Tensor, second: Tensor) -> Tensor:
    """The Kolmogorov–Smirnov distance of every coordinate: ``[dim]``, in [0, 1]."""
    both = torch.cat([first, second]).double().mT.contiguous().sort(-1).values
    shares = [
        torch.searchsorted(draws.double().mT.contiguous().sort(-1).values, both, right=True)
        / len(draws)
        for draws in (first, second)
    ]
    return (shares[0] - shares[1]).abs().amax(-1)


def moment_errors(draws: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of mean and standard deviation of every coordinate, ``[dim]`` each, signed.

    Both are in units of the reference's standard deviation.
    """
    scale = reference.std(0).clamp_min(1e-30)
    return (draws.mean(0) - reference.mean(0)) / scale, (draws.std(0) - reference.std(0)) / scale


def c2st(first: Tensor, second: Tensor, *, seed: int = 0, num_steps: int = 300) -> float:
    """Accuracy of a classifier that tells the two apart: 0.5 where it cannot, 1 at the most.

    A network with two hidden layers of 64 learns on one half of the draws, equally many of each,
    and is tested on the other half, then the other way round. The global random state is left as it
    was.

    Reference: Lopez-Paz, Oquab, "Revisiting classifier two-sample tests", ICLR 2017.
    """
    count = min(len(first), len(second)) // 2 * 2
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        draws[torch.randperm(len(draws), generator=generator)[:count]].float()
        for draws in (first, second)
    )
    # Heavy tails would saturate the network.
    x, y = (draws.sign() * draws.abs().log1p() for draws in (x, y))
    hits = 0.0
    with forked_rng(seed):
        for train, test in (
            (slice(0, None, 2), slice(1, None, 2)),
            (slice(1, None, 2), slice(0, None, 2)),
        ):
            net = nn.Sequential(
                nn.Linear(x.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
            )
            optimizer = torch.optim.Adam(net.parameters(), 5e-3, weight_decay=1e-4)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
            for _ in range(num_steps):
                rows = torch.randint(count // 2, (256,))
                logits = net(torch.cat([x[train][rows], y[train][rows]])).squeeze(-1)
                target = torch.cat([torch.zeros(256), torch.ones(256)])
                loss = F.binary_cross_entropy_with_logits(logits, target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
            with torch.no_grad():
                hits += float(
                    (net(x[test]) < 0).double().mean() + (net(y[test]) > 0).double().mean()
                )
    return hits / 4


def modes_found(labels: Tensor, reference: Tensor) -> int:
    """How many of two modes have at least half of the draws that belong there.

    :param Tensor labels: mode of each draw, 0 or 1.
    :param Tensor reference: the same of the posterior's draws.
    """
    found = 0
    for mode in (0, 1):
        expected = float((reference == mode).double().mean())
        found += (
            math.isclose(expected, 0.0) or float((labels == mode).double().mean()) >= expected / 2
        )
    return found


def _quantiles(values: Tensor, level: Tensor) -> Tensor:
    """Quantiles of sorted columns, linear between the draws."""
    at = (level * len(values) - 0.5).clamp(0, len(values) - 1)
    low = at.floor().long()
    high = (low + 1).clamp_max(len(values) - 1)
    return torch.lerp(values[low], values[high], (at - low).unsqueeze(-1))
