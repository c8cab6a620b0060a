# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The score of a kernel density estimate."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.kernel import KernelEstimator, distances

__all__ = ["KernelDensityScore"]


class KernelDensityScore(KernelEstimator):
    r"""Score of the Gaussian kernel density estimate of each context's draws.

    .. math:: \hat s(z) = \nabla \log \sum_{i=1}^S k(z, z_i)
        = \frac{1}{h^2} \Big( \frac{\sum_i k(z, z_i)\, z_i}{\sum_i k(z, z_i)} - z \Big),

    the mean-shift vector over :math:`h^2`. It assumes a q of few dimensions whose scales are alike
    in all of them, and values that are not among the draws.

    It aims at the score of :math:`q * N(0, h^2 I)`, which is off by :math:`O(h^2)`, with a
    variance of :math:`O(1 / (S h^{D + 2} q(z)))` around it: in many dimensions no h makes both
    small. For a Gaussian of variance :math:`\sigma^2` it is too small by the factor
    :math:`\sigma^2 / (\sigma^2 + h^2)`, about 1 / (1 + 2 D) when h is the median distance itself,
    which is why that is not the default. No update; a query costs :math:`O(S (S + N) D)` a context.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param bandwidth: h over the median distance of two draws, > 0. ``None`` is the best h for the
        gradient of the density of a spherical Gaussian,
        :math:`h = \sigma (4 / ((D + 4) S))^{1 / (D + 6)}` (Chacón, Duong & Wand 2011), with
        :math:`\sigma` read off the median distance.
    :raises ValueError: for a parameter out of range; in a call, for shapes that do not fit and
        for fewer than 2 draws.

    References: Fukunaga & Hostetler, "The estimation of the gradient of a density function, with
    applications in pattern recognition", IEEE Trans. Information Theory 1975; Chacón, Duong & Wand,
    "Asymptotics for general multivariate kernel density derivative estimators", Statistica Sinica
    2011.
    """

    def __init__(self, dim: int, context_dim: int = 0, *, bandwidth: float | None = None) -> None:
        super().__init__(dim, context_dim, bandwidth=1.0 if bandwidth is None else bandwidth)
        self.normal_reference = bandwidth is None

    @torch.no_grad()
    def log_prob(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch"]:
        r"""The log of the density estimate, :math:`\log \frac1S \sum_i N(z; z_i, h^2 I)`."""
        z = self._draws(samples, context)
        at = self._points(value, samples).movedim(1, 0)
        result = at.new_empty(at.shape[:-1])
        for chunk in self._chunks(z):
            volume = self.dim * (chunk.bandwidth.log().squeeze(-1) + 0.5 * math.log(2 * math.pi))
            for where, y in chunk.points(at):
                exponent = -0.5 * distances(y, chunk.x).square()
                result[where] = exponent.logsumexp(-1) - math.log(z.shape[1]) - volume
        return result.movedim(1, 0).reshape(value.shape[:-1])

    def _factor(self, draws: int) -> float:
        if not self.normal_reference:
            return self.bandwidth
        dim = self.dim
        # The squared distance of two draws is 2 sigma^2 times a chi-square variable, whose median
        # is D (1 - 2 / 9 D)^3 to within 4 % (Wilson & Hilferty 1931).
        median = math.sqrt(2 * dim * (1 - 2 / (9 * dim)) ** 3)
        return float((4 / ((dim + 4) * draws)) ** (1 / (dim + 6)) / median)

    def _fit(self, x: Tensor, distance: Tensor) -> tuple[Tensor, ...]:
        return ()

    def _answer(self, y: Tensor, x: Tensor, fitted: tuple[Tensor, ...]) -> Tensor:
        return torch.softmax(-0.5 * distances(y, x).square(), -1) @ x - y
