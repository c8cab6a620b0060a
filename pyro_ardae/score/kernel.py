# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What estimators with a Gaussian kernel share: a bandwidth per context, and bounded memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.estimator import ScoreEstimator

__all__ = ["CHUNK_BYTES", "Chunk", "KernelEstimator", "distances", "gaussian", "summed_gradient"]

CHUNK_BYTES = 64 * 2**20
"""Bound on the size of a temporary. One context alone exceeds it from 4096 draws on (float32)."""


class Chunk(NamedTuple):
    """Some of the contexts, their draws in units of the bandwidth."""

    rows: slice
    """Which contexts."""
    x: Tensor
    """Draws ``[b, S, D]``, centered, over the bandwidth."""
    distance: Tensor
    """Distances of the draws from each other ``[b, S, S]``, over the bandwidth."""
    center: Tensor
    """``[b, 1, D]``, what was subtracted."""
    bandwidth: Tensor
    """``[b, 1, 1]``"""

    def points(self, at: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Of points ``at [B, N, D]`` those of this chunk, scaled like x, with their indices."""
        count, draws, _ = self.x.shape
        step = max(1, CHUNK_BYTES // (self.x.element_size() * count * draws))
        for start in range(0, at.shape[1], step):
            where = self.rows, slice(start, start + step)
            yield where, (at[where] - self.center) / self.bandwidth


class KernelEstimator(ScoreEstimator):
    r"""Score estimator that is a function of the draws alone, by way of a Gaussian kernel.

    The kernel is :math:`k(z, z') = \exp(-\lVert z - z' \rVert^2 / 2 h^2)`, and h for each context
    its median rule: a factor times the median distance of two of its draws. Contexts are
    never pooled, and their values not looked at.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param bandwidth: factor of the median distance, > 0.
    :raises ValueError: for a parameter out of range; in a call, for shapes that do not fit and
        for fewer than 2 draws.
    """

    def __init__(self, dim: int, context_dim: int = 0, *, bandwidth: float = 1.0) -> None:
        super().__init__(dim, context_dim)
        self._in_range("bandwidth", bandwidth, 0.0 < bandwidth < float("inf"), "in (0, inf)")
        self.bandwidth = bandwidth

    @abstractmethod
    def _fit(self, x: Tensor, distance: Tensor) -> tuple[Tensor, ...]:
        """What a chunk's draws and their distances determine, all in units of the bandwidth."""

    @abstractmethod
    def _answer(self, y: Tensor, x: Tensor, fitted: tuple[Tensor, ...]) -> Tensor:
        """Scores ``[b, n, D]`` at ``y [b, n, D]``, all in units of the bandwidth."""

    def update(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Tensor:
        """Nothing is learned: 0, after a check of the shapes."""
        return self._draws(samples, context).new_zeros(())

    @torch.no_grad()
    def forward(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch dim"]:
        """The score at ``value``, from ``samples`` alone."""
        z = self._draws(samples, context)
        at = self._points(value, samples).movedim(1, 0)
        score = torch.empty_like(at)
        for chunk in self._chunks(z):
            fitted = self._fit(chunk.x, chunk.distance)
            for where, y in chunk.points(at):
                score[where] = self._answer(y, chunk.x, fitted) / chunk.bandwidth
        return score.movedim(1, 0).reshape(value.shape)

    def _chunks(self, z: Tensor) -> Iterator[Chunk]:
        """Split ``z [B, S, D]`` so that no kernel matrix exceeds ``CHUNK_BYTES``."""
        contexts, draws, _ = z.shape
        step = max(1, CHUNK_BYTES // (z.element_size() * draws**2))
        first, second = torch.triu_indices(draws, draws, 1, device=z.device)
        for start in range(0, contexts, step):
            rows = slice(start, start + step)
            x = z[rows]
            center = x.mean(1, keepdim=True)
            distance = distances(x, x)
            median = distance[:, first, second].median(-1).values.reshape(-1, 1, 1)
            # The floor keeps a collapsed q finite.
            h = (self._factor(draws) * median).clamp_min(1e-12)
            yield Chunk(rows, (x - center) / h, distance / h, center, h)

    def _factor(self, draws: int) -> float:
        """Bandwidth over median distance."""
        return self.bandwidth

    def _draws(self, samples: Tensor, context: Tensor | None) -> Tensor:
        """Checked and detached samples ``[B, S, D]``."""
        return self._rows(samples, context, least=2)[0].movedim(1, 0)


def distances(y: Tensor, x: Tensor) -> Tensor:
    """``[b, n, S]``, by differences: a product of matrices loses those of close draws."""
    return torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist")


def gaussian(distance: Tensor) -> Tensor:
    """The kernel, of distances in units of the bandwidth."""
    return torch.exp(-0.5 * distance.square())


def summed_gradient(k: Tensor, y: Tensor, x: Tensor) -> Tensor:
    r""":math:`\sum_j \nabla_{x_j} k(y, x_j)`, ``[b, n, D]``, of the kernel ``k [b, n, S]``."""
    return k.sum(-1, keepdim=True) * y - k @ x
