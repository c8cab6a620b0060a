# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates in which every q(z | c) has mean about 0 and covariance about I."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pyro_ardae.score.moments import Moments
from pyro_ardae.score.student import Student

_GAUSSIAN = Student(math.inf, 1.0)

__all__ = ["Frame", "Mode", "Whitening", "per_context"]

Mode = Literal["pooled", "centered", "full", "diagonal", "none"]


def per_context(context_dim: int, mode: Mode) -> bool:
    """Whether every context has moments of its own."""
    return context_dim > 0 and mode not in ("centered", "none")


class Frame(NamedTuple):
    r"""Affine frame :math:`w = A (z - m)` per context, from draws other than those it whitens."""

    mean: Tensor
    """``[..., 1, B, D]``"""
    scale: Tensor
    """``[..., 1, B, D]``, the scales that the network sees."""
    unmix: Tensor
    r"""U in :math:`A = U \mathrm{diag}(1 / scale)`: ``[D, D]`` or ``[..., B, D, D]``."""
    base: Student
    """The law of w if q is Gaussian, given how many draws the frame comes from."""

    def whiten(self, z: Tensor) -> Tensor:
        """``z [..., n, B, D]`` in whitened coordinates."""
        x = (z - self.mean) / self.scale
        if self.unmix.dim() == 2:
            return x @ self.unmix.mT
        return torch.einsum("...nbi,...bji->...nbj", x, self.unmix)

    def pull_back(self, score: Tensor) -> Tensor:
        """A score in w as one in z, ``[..., n, B, D]``."""
        if self.unmix.dim() == 2:
            return (score @ self.unmix) / self.scale
        return torch.einsum("...nbj,...bji->...nbi", score, self.unmix) / self.scale

    def log_abs_det(self) -> Tensor:
        """``[..., B]``: log |det A|."""
        return torch.linalg.slogdet(self.unmix)[1] - self.scale.log().sum(-1).squeeze(-2)

    def log_base(self, w: Tensor) -> Tensor:
        """Log density of the base, but in z: ``w [..., n, B, D]`` to ``[..., n, B]``."""
        return self.base.log_prob(w) + self.log_abs_det()

    def features(self) -> Tensor:
        """``[..., B, 2 D]``: what the network is told of the frame."""
        return torch.cat([self.mean, self.scale.log()], -1).squeeze(-3)


class _Identity(Frame):
    """The frame of z itself: its products and determinants would take longer than a query's."""

    def whiten(self, z: Tensor) -> Tensor:
        return z

    def pull_back(self, score: Tensor) -> Tensor:
        return score

    def log_abs_det(self) -> Tensor:
        return self.mean.new_zeros(())


class Whitening(nn.Module):
    r"""Estimate frames from samples, and keep what is pooled over contexts and updates.

    - ``"pooled"``: mean and scale per context, times the inverse root of the correlation pooled
      over contexts and updates. A full Cholesky factor of few draws is noisy, a diagonal one lets
      thin correlated directions collapse; the pooled correlation does neither. Its eigenvalues
      within ``[low, high]`` are left alone and the others brought to that border.
    - ``"centered"``: of z less the sampler's output for zero noise, which the estimator subtracts:
      mean and covariance pooled over contexts and updates. For guides whose location and scale are
      a transform after the implicit distribution: no moment is estimated from a few draws then.
    - ``"full"``: mean and Cholesky factor per context. Needs at least 2 D draws, or else
      ``"diagonal"`` is used, with one warning.
    - ``"diagonal"``: mean and scale per context.
    - ``"none"``: z itself.

    Without context all rows are draws of one q: mean and covariance are then pooled over rows and
    updates, and whitened in full unless the mode says otherwise.

    :param dim: dimensions D of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param mode: see above.
    :param pooled_draws: draws over which pooled statistics effectively average, >= 1: by default
        2,048 in the mode ``"centered"`` and else 16,384. Where a transform follows, the scale of z
        is undetermined: an average that lags behind lets it grow and grow (to 14 in 10,000 steps of
        the MNIST guide, with 16,384).
    :param low: lowest eigenvalue of the pooled correlation that is left alone, in (0, 1].
    :param high: highest one, >= 1.
    """

    pooled_mean: Tensor
    pooled_cov: Tensor
    pooled_corr: Tensor
    unmix: Tensor

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        mode: Mode = "pooled",
        pooled_draws: int | None = None,
        low: float = 0.2,
        high: float = 3.0,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"whitening: expected one of {get_args(Mode)}, got {mode!r}.")
        self.dim, self.mode = dim, mode
        self.conditional = context_dim > 0 and mode != "centered"
        self.per_context = per_context(context_dim, mode)
        regressed = self.per_context and context_dim <= Moments.MAX_CONTEXT_DIM
        self.moments = Moments(dim, context_dim) if regressed else None
        self.pooled_draws = pooled_draws or (2048 if mode == "centered" else 16_384)
        self.low, self.high = low, high
        self._warned = False
        self.register_buffer("pooled_mean", torch.zeros(dim))
        self.register_buffer("pooled_cov", torch.eye(dim))
        self.register_buffer("pooled_corr", torch.eye(dim))
        self.register_buffer("unmix", torch.eye(dim))
        # Numbers, not buffers: a GPU would be waited for to read one.
        self.pools = 0
        self.fell_back = False

    def get_extra_state(self) -> dict[str, Any]:
        """What is no tensor."""
        return {"pools": self.pools, "fell_back": self.fell_back}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` gave."""
        self.pools, self.fell_back = state["pools"], state["fell_back"]

    @torch.no_grad()
    def held_out(self, folds: Tensor, context: Tensor) -> Frame:
        """Frames ``[F, …]`` of ``folds [F, n, B, D]``, each from the draws of the other folds.

        :param context: ``[B, C]``.
        """
        count, n, rows, _ = folds.shape
        if self._from_pool:
            if self.pools == 0:
                self.pool(folds, context)
            return self._pooled_frame((count, 1, rows))
        if self.mode == "none":
            return self._identity((count, 1, rows))
        rest = n * (count - 1)
        center = folds.mean((0, 1))
        centered = folds - center
        first = centered.sum(1, keepdim=True)
        mean = (first.sum(0, keepdim=True) - first) / rest
        full = self._is_full(rest)
        self.fell_back = self.mode == "full" and not full
        if full:
            second = torch.einsum("fnbi,fnbj->fbij", centered, centered)
            outer = mean.squeeze(1).unsqueeze(-1) * mean.squeeze(1).unsqueeze(-2)
            cov = (second.sum(0, keepdim=True) - second) / rest - outer
            return self._full_frame(mean + center, cov * rest / (rest - 1), rest)
        square = centered.square().sum(1, keepdim=True)
        variance = (square.sum(0, keepdim=True) - square) / rest - mean.square()
        return self._scaled_frame(mean + center, variance * rest / (rest - 1), rest, context)

    @torch.no_grad()
    def frame(self, samples: Tensor, context: Tensor) -> Frame:
        """Frames from ``samples [S, B, D]``, for values that are not among them."""
        count, rows, _ = samples.shape
        if self._from_pool:
            return self._pooled_frame((1, rows))
        if self.mode == "none":
            return self._identity((1, rows))
        mean = samples.mean(0, keepdim=True)
        centered = samples - mean
        # One rule in training and query: a query has more draws than a fold in training.
        if self._is_full(count) and not self.fell_back:
            cov = torch.einsum("sbi,sbj->bij", centered, centered) / (count - 1)
            return self._full_frame(mean, cov, count)
        variance = centered.square().sum(0, keepdim=True) / (count - 1)
        return self._scaled_frame(mean, variance, count, context)

    @torch.no_grad()
    def pool(self, folds: Tensor, context: Tensor) -> None:
        """Move the pooled statistics towards those of ``folds [F, n, B, D]``."""
        if self.moments is not None and (self.mode != "full" or self.fell_back):
            half = folds.shape[0] * folds.shape[1] // 2
            halves = folds.flatten(0, 1)[: 2 * half].unflatten(0, (2, half))
            self.moments.fit(halves, context)
        draws = folds.shape[:-1].numel()
        rate = max(min(1.0, draws / self.pooled_draws), 1.0 / (1.0 + self.pools))
        if self.conditional:
            if self.mode != "pooled":
                return
            centered = folds.flatten(0, 1)
            centered = centered - centered.mean(0)
            scaled = centered / centered.square().sum(0).clamp_min(1e-30).sqrt()
            flat = scaled.reshape(-1, self.dim)
            self.pooled_corr.lerp_(flat.mT @ flat / folds.shape[2], rate)
        else:
            flat = folds.reshape(-1, self.dim)
            mean = flat.mean(0)
            centered = flat - (mean if self.pools == 0 else self.pooled_mean)
            self.pooled_cov.lerp_(centered.mT @ centered / draws, rate)
            self.pooled_mean.lerp_(mean, rate)
            scale = self.pooled_cov.diagonal().clamp_min(1e-30).sqrt()
            self.pooled_corr.copy_(self.pooled_cov / (scale.unsqueeze(-1) * scale))
        self.pools += 1
        unmixes = self.mode in ("pooled", "centered")
        unmixes |= self.mode == "full" and not self.conditional
        # It changes little from one update to the next, and an eigendecomposition takes a while.
        if unmixes and (self.pools <= 16 or self.pools % 4 == 0):
            self._refresh_unmix(draws / rate)

    def _refresh_unmix(self, draws: float) -> None:
        eye = torch.eye(self.dim, dtype=self.pooled_corr.dtype, device=self.pooled_corr.device)
        shrink = (self.dim / (self.dim + draws)) ** 2  # of full rank from the first update on
        values, vectors = torch.linalg.eigh((1 - shrink) * self.pooled_corr + shrink * eye)
        values = values.clamp_min(1e-6)
        if self.conditional:
            one = torch.ones_like(values)
            values = (values / self.low).minimum(one) * (values / self.high).maximum(one)
        self.unmix.copy_((vectors * values.rsqrt()) @ vectors.mT)

    @property
    def _from_pool(self) -> bool:
        return not self.conditional and self.mode != "none"

    def _is_full(self, draws: int) -> bool:
        if self.mode != "full":
            return False
        if draws >= 2 * self.dim:
            return True
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"full whitening of {self.dim} dimensions needs at least {2 * self.dim} draws per "
                f"context besides those it whitens, got {draws}: whitening is diagonal. Raise "
                "num_score_samples, or use whitening='pooled'.",
                stacklevel=2,
            )
        return False

    def _pooled_frame(self, batch: tuple[int, ...]) -> Frame:
        shape = (*batch, self.dim)
        scale = self.pooled_cov.diagonal().clamp_min(1e-30).sqrt()
        # A constant dimension: what its draws differ by is rounding.
        scale = scale.maximum(4 * torch.finfo(scale.dtype).eps * self.pooled_mean.abs())
        return Frame(self.pooled_mean.expand(shape), scale.expand(shape), self.unmix, _GAUSSIAN)

    def _identity(self, batch: tuple[int, ...]) -> Frame:
        shape = (*batch, self.dim)
        zero, one = self.unmix.new_zeros(()), self.unmix.new_ones(())
        return _Identity(zero.expand(shape), one.expand(shape), self.unmix, _GAUSSIAN)

    def _scaled_frame(self, mean: Tensor, variance: Tensor, draws: int, context: Tensor) -> Frame:
        # A context far thinner than the others would turn rounding errors into outliers.
        floor = 1e-6 * variance.mean(-2, keepdim=True) + 1e-20
        scale, effective = variance.maximum(floor).sqrt(), float(draws)
        if self.moments is not None:
            mean, scale, effective = self.moments.combine(mean, scale, draws, context)
        return Frame(mean, scale, self.unmix, Student.predictive(effective))

    def _full_frame(self, mean: Tensor, cov: Tensor, draws: int) -> Frame:
        scale = cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-20).sqrt()
        corr = cov / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
        eye = torch.eye(self.dim, dtype=cov.dtype, device=cov.device)
        factor = torch.linalg.cholesky(corr + 1e-5 * eye)
        unmix = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        return Frame(mean, scale.unsqueeze(-3), unmix, Student.predictive(draws, self.dim))
