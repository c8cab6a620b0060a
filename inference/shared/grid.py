# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""How far draws in the plane are from a density known up to its integral: KL and modes, on a grid.

With cells :math:`A_i` of a square grid, masses :math:`P_i = \int_{A_i} p` by quadrature and counts
:math:`n_i` of N draws of q, K of them positive,

.. math:: \widehat{KL} = \sum_i \frac{n_i}{N} \log \frac{n_i}{N P_i} - \frac{K - 1}{2 N}.

Two errors, of opposite sign. By the data-processing inequality the divergence of the cells' masses
is at most KL(q||p): what q does within a cell is not seen. It is seen in the difference between two
cell widths h, as the rest falls with h². Sampling error makes the plug-in too large by
(K - 1) / (2 N) to first order (Miller 1955), which is subtracted. Cells with few draws leave some
of it: a third, measured with draws of p itself. With four million draws and h = 0.05 the
correction is 0.002 to 0.003 nats, and 0.0003 to 0.0007 are left. Draws outside of the grid count
in the cells at its border.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.energies import Energy

__all__ = [
    "LIMIT",
    "Divergence",
    "cell_divergence",
    "cell_log_masses",
    "count",
    "divergence",
    "modes",
    "sample",
]

#: The grid covers [-LIMIT, LIMIT]^2; 1e-8 of the mass of the energies lies outside.
LIMIT = 10.0
#: Cells a side: 0.05 wide. Pairs of them make the coarse cells, 0.1 wide.
SIZE = 400
_POINTS = 4  # quadrature points a side of a cell
_THRESHOLD = 0.1


@dataclass(frozen=True)
class Divergence:
    """Estimates of KL(q||p) in nats, and what q leaves in the modes of p."""

    kl: float
    """With cells 0.05 wide, corrected for the number of draws."""
    kl_coarse: float
    """The same with cells 0.1 wide."""
    correction: float
    """What was subtracted in ``kl``."""
    shares: tuple[float, ...]
    """Share of the draws in each mode."""
    expected: tuple[float, ...]
    """Mass of each mode."""

    @property
    def found(self) -> int:
        """Modes with at least half of the draws that belong there."""
        pairs = zip(self.shares, self.expected, strict=True)
        return sum(share >= expected / 2 for share, expected in pairs)


@lru_cache(maxsize=8)
def cell_log_masses(energy: Energy) -> Tensor:
    """Log P_i by the midpoint rule in every cell: ``[SIZE, SIZE]`` (row: z1), float64."""
    size = SIZE * _POINTS
    axis = torch.linspace(-LIMIT, LIMIT, 2 * size + 1, dtype=torch.float64)[1::2]
    log_density = -energy(torch.cartesian_prod(axis, axis))
    within = log_density.reshape(SIZE, _POINTS, SIZE, _POINTS).logsumexp((1, 3))
    return within - within.logsumexp((0, 1))


def count(draws: Iterable[Tensor]) -> Tensor:
    """Counts of draws in the cells: ``[SIZE, SIZE]``, float64.

    :param Iterable draws: batches ``[n, 2]``; one at a time is held in memory.
    :raises ValueError: if a draw is not finite.
    """
    counts = torch.zeros(SIZE * SIZE, dtype=torch.float64)
    for batch in draws:
        if not torch.isfinite(batch).all():
            raise ValueError("expected finite draws, found NaN or infinity")
        cells = ((batch + LIMIT) * (SIZE / (2 * LIMIT))).floor().long().clamp_(0, SIZE - 1)
        counts += torch.bincount(cells[:, 0] * SIZE + cells[:, 1], minlength=SIZE * SIZE)
    return counts.reshape(SIZE, SIZE)


def divergence(counts: Tensor, energy: Energy) -> Divergence:
    """KL(q||p) and modes from the counts of draws of q."""
    log_masses = cell_log_masses(energy)
    kl, correction = cell_divergence(counts, log_masses)
    coarse = (SIZE // 2, 2, SIZE // 2, 2)
    coarse_masses = log_masses.reshape(coarse).logsumexp((1, 3))
    coarse_counts = counts.reshape(coarse).sum((1, 3))
    labels = modes(energy).flatten()
    shares, expected = (
        torch.zeros(int(labels.max()) + 1, dtype=torch.float64).index_add_(0, labels, mass)[1:]
        for mass in ((coarse_counts / counts.sum()).flatten(), coarse_masses.exp().flatten())
    )
    return Divergence(
        kl=kl,
        kl_coarse=cell_divergence(coarse_counts, coarse_masses)[0],
        correction=correction,
        shares=tuple(shares.tolist()),
        expected=tuple(expected.tolist()),
    )


@lru_cache(maxsize=8)
def modes(energy: Energy) -> Tensor:
    """Labels of the coarse cells, ``[SIZE / 2, SIZE / 2]``: 1, 2, ... in a mode, 0 in none.

    A mode is a connected region (cells that share a side) where the density is above a tenth of its
    maximum, after the lines ``energy.cuts`` have cut the plane. Regions with less than 1 % of the
    mass are no modes.
    """
    coarse = (SIZE // 2, 2, SIZE // 2, 2)
    log_masses = cell_log_masses(energy).reshape(coarse).logsumexp((1, 3))
    inside = log_masses > log_masses.max() + math.log(_THRESHOLD)
    axis = torch.linspace(-LIMIT, LIMIT, SIZE + 1)[1::2]
    strip = sum(((axis > cut).long() for cut in energy.cuts), torch.zeros(len(axis)).long())
    result = torch.zeros(inside.shape, dtype=torch.long)
    found = 0
    for index in range(len(energy.cuts) + 1):
        for region in _components(inside & (strip == index).unsqueeze(1)):
            if log_masses[region].exp().sum() >= 0.01:
                found += 1
                result[region] = found
    return result


def sample(energy: Energy, num_draws: int, generator: torch.Generator) -> Tensor:
    """Draws ``[num_draws, 2]`` of p, exact but for a uniform law within each cell."""
    cells = cell_log_masses(energy).exp().flatten().cumsum(0)
    uniform = torch.rand(num_draws, generator=generator, dtype=torch.float64) * cells[-1]
    index = torch.searchsorted(cells, uniform).clamp_(max=len(cells) - 1)
    corner = torch.stack([index // SIZE, index % SIZE], -1)
    within = torch.rand(num_draws, 2, generator=generator, dtype=torch.float64)
    return (corner + within) * (2 * LIMIT / SIZE) - LIMIT


def cell_divergence(counts: Tensor, log_masses: Tensor) -> tuple[float, float]:
    """KL from the counts of draws in cells to the cells' masses, and the correction in it."""
    total = float(counts.sum())
    hit = counts > 0
    share = counts[hit] / total
    correction = (int(hit.sum()) - 1) / (2 * total)
    return float((share * (share.log() - log_masses[hit])).sum()) - correction, correction


def _components(inside: Tensor) -> list[Tensor]:
    """The connected regions of a mask, each as a mask."""
    left, regions = inside.clone(), []
    cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    while left.any():
        region = torch.zeros_like(left)
        region.view(-1)[int(left.flatten().long().argmax())] = True
        size = 0
        while size != (size := int(region.sum())):
            for _ in range(16):
                grown = F.conv2d(region.float()[None, None], cross, padding=1)[0, 0] > 0
                region = grown & inside
        regions.append(region)
        left &= ~region
    return regions
