# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The exact score in place of an estimate, how far off one is, noise to compare gradients by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from pyro_ardae.score import ScoreEstimator

Score = Callable[[Tensor, Tensor | None], Tensor]


class QuietNormal(dist.Normal):
    """Noise whose draws for the score leave the random stream as it is for the explicit guide."""

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        if not sample_shape:
            return super().rsample()
        with torch.random.fork_rng(devices=[]):
            return super().rsample(sample_shape)


class PathNormal(dist.Normal):
    """Normal whose log density depends on its value alone: what is left is the path gradient."""

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(self.loc.detach(), self.scale.detach()).log_prob(value)


class Oracle(ScoreEstimator):
    """The exact score in place of an estimate."""

    def __init__(self, dim: int, context_dim: int, score: Score) -> None:
        super().__init__(dim, context_dim)
        self.score = score

    def update(self, samples: Tensor, context: Tensor | None = None, **_: Any) -> Tensor:
        return samples.new_zeros(())

    def forward(
        self, value: Tensor, samples: Tensor, context: Tensor | None = None, **_: Any
    ) -> Tensor:
        return self.score(value, context).detach()


def relative_error(estimate: Tensor, score: Tensor) -> float:
    """E |s' - s|^2 / E |s|^2."""
    return float((estimate - score).square().sum() / score.square().sum())


def relative_errors(estimate: Tensor, score: Tensor) -> Tensor:
    """One for each context."""
    return (estimate - score).square().sum((0, 2)) / score.square().sum((0, 2))
