# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The Stein gradient estimator: Stein's identity on the draws, solved for the score."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.kernel import KernelEstimator, distances, gaussian, summed_gradient

__all__ = ["SteinScore"]


class SteinScore(KernelEstimator):
    r"""Stein gradient estimator, by ridge regression on each context's draws.

    Stein's identity :math:`E_{z'}[k(z, z') \nabla \log q(z') + \nabla_{z'} k(z, z')] = 0`, with
    the mean over the draws and z each of them, is a linear system for the scores at the draws. With
    K the kernel matrix and :math:`B_i = \sum_j \nabla_{z_j} k(z_i, z_j)`, its ridge solution is

    .. math:: G = -(K + \eta I)^{-1} B.

    At another z the system is solved with z as one more draw. By the Schur complement of
    :math:`A = K + \eta I`, with :math:`\kappa = (k(z, z_i))_i`, this is

    .. math:: \hat s(z) = -\frac{\sum_i \nabla_{z_i} k(z, z_i) + \kappa^\top G
        - \kappa^\top A^{-1} \nabla_z \kappa}{1 + \eta - \kappa^\top A^{-1} \kappa}.

    Counting z as a draw shifts the estimate a little where q is thin; but the kernel extension
    :math:`-(\sum_i \nabla_{z_i} k(z, z_i) + \kappa^\top G) / \eta`, which does not, divides
    the noise by :math:`\eta`. It assumes a score that vanishes far from the draws, as the
    estimate does: in the tails it is too small.

    The ridge biases the estimate towards 0, by less the more draws there are; without it the small
    eigenvalues of K amplify the noise. No update; a query costs
    :math:`O(S^3 + S^2 (N + D))` a context.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param eta: ridge :math:`\eta`, > 0. The default is the best of 0.01 to 1 over 27 settings (two
        Gaussians and a mixture, 1 to 8 dimensions, 16 to 256 draws): a geometric mean of 0.22 of
        :math:`E \lVert \hat s - s \rVert^2 / E \lVert s \rVert^2`, with 0.57 for 0.01.
    :param bandwidth: h over the median distance of two draws, > 0.
    :raises ValueError: for a parameter out of range; in a call, for shapes that do not fit and
        for fewer than 2 draws.

    Reference: Li & Turner, "Gradient estimators for implicit models", ICLR 2018, sec. 3
    (elsewhere than at the draws: sec. 3.4).
    """

    def __init__(
        self, dim: int, context_dim: int = 0, *, eta: float = 0.5, bandwidth: float = 1.0
    ) -> None:
        super().__init__(dim, context_dim, bandwidth=bandwidth)
        self._in_range("eta", eta, 0.0 < eta < float("inf"), "in (0, inf)")
        self.eta = eta

    @torch.no_grad()
    def at_samples(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
    ) -> Float[Tensor, "S *batch dim"]:
        """G, the scores at the draws themselves, where ``forward`` would count them twice."""
        z = self._draws(samples, context)
        score = torch.empty_like(z)
        for chunk in self._chunks(z):
            score[chunk.rows] = self._fit(chunk.x, chunk.distance)[0] / chunk.bandwidth
        return score.movedim(1, 0).reshape(samples.shape)

    def _fit(self, x: Tensor, distance: Tensor) -> tuple[Tensor, ...]:
        k = gaussian(distance)
        slope = summed_gradient(k, x, x)
        k.diagonal(dim1=-2, dim2=-1).add_(self.eta)
        factor = torch.linalg.cholesky(k)
        return -torch.cholesky_solve(slope, factor), factor

    def _answer(self, y: Tensor, x: Tensor, fitted: tuple[Tensor, ...]) -> Tensor:
        score, factor = fitted
        k = gaussian(distances(y, x))
        solved = torch.cholesky_solve(k.mT, factor).mT
        weight = solved * k
        # The gradient of k(y, x_i) by y is (x_i - y) k(y, x_i).
        own = weight @ x - weight.sum(-1, keepdim=True) * y
        schur = 1 + self.eta - weight.sum(-1, keepdim=True)
        return -(summed_gradient(k, y, x) + k @ score - own) / schur
