# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Moments of q(z | c): those of a few draws, combined with what other contexts say."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Moments"]


class Moments(nn.Module):
    r"""Regression of means and log scales on the context, weighed against those of the draws.

    The regression is linear in random features of the context, solved exactly by recursive least
    squares with forgetting. A prediction :math:`\hat m` and the mean :math:`\bar z` of n draws are
    combined as in a Kalman filter,

    .. math:: m = \hat m + k (\bar z - \hat m), \quad k = e^2 / (e^2 + v / n).

    The squared error :math:`e^2` of the prediction is the mean over contexts of the product of the
    residuals of two halves of the draws, whose errors are independent; :math:`v / n`, the variance
    of a moment of n draws, comes from the difference of the halves. Both are known per dimension,
    for means (in units of the scale) and for log scales. Where q moves faster than the regression
    follows, k goes to 1, and the moments are those of the draws.

    The context is standardized by moments of its own. Where a running estimate of them leaves those
    in use, by a factor of 2 or by a standard deviation, as with an encoder that starts at zero, the
    regression begins anew.

    :param dim: dimensions D of z.
    :param context_dim: dimensions C of the context, >= 1.
    :param num_features: random features besides the context itself, >= 0.
    :param memory: contexts per feature that the regression effectively remembers, > 0.
    """

    context_mean: Tensor
    context_variance: Tensor
    offset: Tensor
    unit: Tensor
    weight: Tensor
    bias: Tensor
    gram: Tensor
    cross: Tensor
    solution: Tensor
    square_error: Tensor
    variance: Tensor

    #: The widest context that is regressed on. Wider ones need more contexts than a guide in
    #: training stands still for.
    MAX_CONTEXT_DIM = 64

    def __init__(
        self, dim: int, context_dim: int, *, num_features: int = 256, memory: float = 16.0
    ) -> None:
        super().__init__()
        self.dim, self.context_dim = dim, context_dim
        self.memory = memory
        width = 1 + context_dim + num_features
        self.register_buffer("context_mean", torch.zeros(context_dim))
        self.register_buffer("context_variance", torch.zeros(context_dim))
        self.register_buffer("offset", torch.zeros(context_dim))
        self.register_buffer("unit", torch.ones(context_dim))
        self.register_buffer("weight", torch.randn(context_dim, num_features) / context_dim**0.5)
        self.register_buffer("bias", torch.randn(num_features))
        self.register_buffer("gram", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("cross", torch.zeros(width, 2 * dim, dtype=torch.float64))
        self.register_buffer("solution", torch.zeros(width, 2 * dim))
        self.register_buffer("square_error", torch.zeros(2 * dim))
        self.register_buffer("variance", torch.ones(2 * dim))
        # Numbers, not buffers: a GPU would be waited for to read one.
        self.seen, self.fits = 0, 0

    def get_extra_state(self) -> dict[str, int]:
        """What is no tensor."""
        return {"seen": self.seen, "fits": self.fits}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take what :meth:`get_extra_state` gave."""
        self.seen, self.fits = state["seen"], state["fits"]

    def combine(
        self, mean: Tensor, scale: Tensor, draws: int, context: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Mean and scale ``[..., B, D]`` of ``draws`` draws, combined with the prediction.

        :returns: mean, scale, and the number of draws that would be as good for the mean.
        """
        if self.fits < 2:
            return mean, scale, draws
        gain = self.square_error / (self.square_error + self.variance / draws)
        of_mean, of_scale = gain.chunk(2)
        predicted, log_scale = (self._features(context) @ self.solution).chunk(2, -1)
        mean = predicted.lerp(mean, of_mean)
        scale = log_scale.lerp(scale.log(), of_scale).exp()
        return mean, scale, draws / max(0.05, float(of_mean.mean()))

    def fit(self, halves: Tensor, context: Tensor) -> None:
        """Learn from draws ``[2, n, B, D]`` in halves, of contexts ``[B, C]``."""
        count, rows = halves.shape[1], halves.shape[2]
        if count < 2:
            return
        self._standardize(context)
        variance, mean = torch.var_mean(halves, 1)
        moments = torch.cat([mean, 0.5 * variance.clamp_min(1e-20).log()], -1)
        together = moments.mean(0)
        features = self._features(context)
        if self.fits:
            residual = moments - features @ self.solution
            residual[..., : self.dim] /= together[:, self.dim :].exp()
            # Where a context has collapsed to a point, squares would overflow, for good.
            first, second = residual.clamp_(-1e3, 1e3)
            rate = 0.05 if self.fits > 1 else 1.0
            self.square_error.lerp_((first * second).mean(0).clamp_min(0), rate)
            noise = (first - second).square().mean(0) * (0.5 * count)
            self.variance.lerp_(noise.clamp_min(1e-12), rate)
        wide = features.double()
        forget = max(0.0, 1 - rows / (self.memory * len(self.gram)))
        self.gram.mul_(forget).addmm_(wide.mT, wide)
        self.cross.mul_(forget).addmm_(wide.mT, together.double())
        ridge = 1e-5 * self.gram.diagonal().mean()
        gram = self.gram.clone()
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram)
        self.solution.copy_(torch.cholesky_solve(self.cross, factor))
        self.fits += 1

    def _standardize(self, context: Tensor) -> None:
        """Follow the moments of the context; where they have moved, begin anew with them."""
        rate = max(0.02, 1 / (1 + self.seen))
        variance, mean = torch.var_mean(context, 0, correction=0)
        shift = mean - self.context_mean
        self.context_variance.lerp_(variance + (1 - rate) * shift.square(), rate)
        self.context_mean.add_(shift, alpha=rate)
        self.seen += 1
        unit = self.context_variance.sqrt().clamp_min(1e-6)
        ratio = (unit / self.unit).log().abs()
        moved = (ratio > math.log(2)) | ((self.context_mean - self.offset).abs() > self.unit)
        if self.seen > 1 and not bool(moved.any()):
            return
        self.offset.copy_(self.context_mean)
        self.unit.copy_(unit)
        self.gram.zero_()
        self.cross.zero_()
        self.fits = 0

    def _features(self, context: Tensor) -> Tensor:
        standard = ((context - self.offset) / self.unit).clamp(-5, 5)
        one = standard.new_ones(*standard.shape[:-1], 1)
        return torch.cat([one, standard, F.silu(standard @ self.weight + self.bias)], -1)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep the normal equations double: smooth features of one context are all but collinear,
        and in single precision every other factorization of them failed.
        """
        gram, cross = self.gram, self.cross
        super()._apply(fn, recurse)
        self.gram, self.cross = gram.to(self.gram.device), cross.to(self.cross.device)
        return self
