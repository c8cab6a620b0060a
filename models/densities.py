# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions whose score is known: what they have in common, and two with heavy tails."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["Funnel", "StudentT", "Target"]


@dataclass(frozen=True, eq=False)
class Target(ABC):
    r"""A distribution q(z | c) with a known score.

    Contexts are a tensor ``[B, C]`` always: a target without context has C = 0, and B rows of
    draws of one distribution.
    """

    dim: int
    """Dimensions D of z."""
    context_dim: int
    """Dimensions C of the context; 0 for none."""

    def contexts(self, num_contexts: int, *, generator: Generator | None = None) -> Tensor:
        """Fresh contexts ``[num_contexts, C]``, standard normal."""
        return torch.randn(num_contexts, self.context_dim, generator=generator)

    def at(self, num_updates: int) -> Target:
        """The target after that many updates; itself unless it moves."""
        del num_updates
        return self

    @abstractmethod
    def sample(
        self, num_samples: int, context: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Draws ``[num_samples, B, D]`` for ``context [B, C]``, in its dtype."""

    @abstractmethod
    def log_prob(self, value: Tensor, context: Tensor) -> Tensor:
        """Normalized log density ``[N, B]`` at ``value [N, B, D]``, in nats."""

    @abstractmethod
    def score(self, value: Tensor, context: Tensor) -> Tensor:
        """Gradient ``[N, B, D]`` of the log density at ``value [N, B, D]``."""

    @abstractmethod
    def moments(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Exact mean ``[B, D]`` and covariance ``[B, D, D]``."""

    def gaussian_score(self, value: Tensor, context: Tensor) -> Tensor:
        """Score ``[N, B, D]`` of the Gaussian that has the exact mean and covariance."""
        mean, cov = self.moments(context)
        return -torch.einsum("bij,nbj->nbi", torch.linalg.inv(cov), value - mean)

    def relative_error(self, estimate: Tensor, value: Tensor, context: Tensor) -> Tensor:
        r"""Relative squared error of a score in whitened units, a scalar.

        :math:`E \lVert L^\top (\hat s - s) \rVert^2 / E \lVert L^\top s \rVert^2` over values and
        contexts, with the exact covariance :math:`L L^\top` of each context: the same whatever
        linear map is applied to z. The score of a Gaussian with the exact moments has the error
        :math:`1 - D / E \lVert L^\top s \rVert^2`, the zero score has 1.

        :param Tensor estimate: ``[N, B, D]``.
        :param Tensor value: ``[N, B, D]``, draws of the target.
        :param Tensor context: ``[B, C]``.
        """
        exact = self.score(value, context)
        # In double precision: thin directions lose digits otherwise.
        exact, error = exact.double(), (estimate - exact).double()
        cov = self.moments(context)[1].double()

        def size(score: Tensor) -> Tensor:
            return torch.einsum("nbi,bij,nbj->", score, cov, score)

        return size(error) / size(exact)


@dataclass(frozen=True, eq=False)
class Funnel(Target):
    r"""Neal's funnel, y ~ N(0, ``scale``^2) and x | y ~ N(0, exp(y)): z = (y, x).

    With Neal's own scale, 3, the squared score in whitened units, of mean
    :math:`e^{\text{scale}^2}` in x, is that of a few draws in a million; hence 1.5 in
    :data:`models.targets.TARGETS`.

    Reference: Neal, "Slice sampling", Annals of Statistics 2003, sec. 8.
    """

    scale: float

    def sample(
        self, num_samples: int, context: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Draws ``[num_samples, B, 2]``."""
        noise = torch.randn(num_samples, len(context), 2, generator=generator).to(context)
        y = self.scale * noise[..., 0]
        return torch.stack([y, (y / 2).exp() * noise[..., 1]], -1)

    def log_prob(self, value: Tensor, context: Tensor) -> Tensor:
        """Normalized log density ``[N, B]``."""
        y, x = value.unbind(-1)
        square = (y / self.scale).square() + x.square() * (-y).exp()
        return -0.5 * (square + y) - math.log(2 * math.pi * self.scale)

    def score(self, value: Tensor, context: Tensor) -> Tensor:
        """Gradient ``[N, B, 2]``."""
        y, x = value.unbind(-1)
        along = x * (-y).exp()
        return torch.stack([-y / self.scale**2 + 0.5 * (x * along - 1), -along], -1)

    def moments(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Exact mean and covariance; x and y are uncorrelated."""
        variances = context.new_tensor([self.scale**2, math.exp(self.scale**2 / 2)])
        return context.new_zeros(len(context), 2), variances.diag().expand(len(context), 2, 2)


@dataclass(frozen=True, eq=False)
class StudentT(Target):
    r"""Multivariate Student's t with unit scale matrix and ``degrees`` > 2 of freedom."""

    degrees: int

    def sample(
        self, num_samples: int, context: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Draws ``[num_samples, B, D]``."""
        shape = num_samples, len(context)
        noise = torch.randn(*shape, self.dim, generator=generator).to(context)
        chi = torch.randn(*shape, self.degrees, generator=generator).to(context)
        return noise / chi.square().mean(-1, keepdim=True).sqrt()

    def log_prob(self, value: Tensor, context: Tensor) -> Tensor:
        """Normalized log density ``[N, B]``."""
        total = self.degrees + self.dim
        constant = math.lgamma(total / 2) - math.lgamma(self.degrees / 2)
        constant -= 0.5 * self.dim * math.log(self.degrees * math.pi)
        return constant - 0.5 * total * (value.square().sum(-1) / self.degrees).log1p()

    def score(self, value: Tensor, context: Tensor) -> Tensor:
        """Gradient ``[N, B, D]``: bounded, and proportional to 1 / |z| far out."""
        square = value.square().sum(-1, keepdim=True)
        return -(self.degrees + self.dim) * value / (self.degrees + square)

    def moments(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Exact mean and covariance."""
        rows, variance = len(context), self.degrees / (self.degrees - 2)
        cov = variance * torch.eye(self.dim).to(context)
        return context.new_zeros(rows, self.dim), cov.expand(rows, -1, -1)
