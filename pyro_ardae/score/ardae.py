# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""AR-DAE: the amortized residual denoising autoencoder, in whitened coordinates."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.network import EnergyNetwork, ResidualNetwork
from pyro_ardae.score.student import Student
from pyro_ardae.score.trained import TrainedEstimator
from pyro_ardae.score.whitening import Frame, Mode, Whitening

__all__ = ["ARDAE"]


class ARDAE(TrainedEstimator):
    r"""Amortized residual denoising autoencoder, the default score estimator.

    A network f learns from noised samples by

    .. math:: E_{z \sim q}\, E_{u \sim N(0, I)}\, E_{\sigma \sim N(0, \delta^2)}
        \lVert u + \sigma f(z + \sigma u; \sigma, c) \rVert^2,

    whose minimizer is :math:`f^* = \nabla \log (q * N(0, \sigma^2 I))` for every :math:`\sigma`
    (Lim et al. 2020, eq. 8; Vincent 2011). It is queried at :math:`\sigma = 0`, in the middle of
    the range on which it is trained. Differences from the paper's own setting
    (:class:`~pyro_ardae.score.paper.PaperARDAE`):

    - f acts on :math:`w = A_c (z - m_c)`, with moments of other draws of the same q, and is
      a network plus the score of what w would be for a Gaussian q, a Student's t, as the moments
      come from few draws. It starts there and learns how q deviates; :math:`\delta` is relative
      to q's own width.
    - The noise comes in pairs :math:`\pm u`, which cancels the O(:math:`\sigma`) part of the noise
      in the loss's gradient.
    - An update cuts the draws into ``num_folds`` and takes one optimizer step on each, whitened by
      the moments of the other folds. What is whitened by its own moments has another law than what
      is queried.
    - Queries use a running average of the weights.

    The estimate is unbiased only if the network is exact; a finite one is not.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param parametrization: ``"residual"`` (r is the network's output) or ``"energy"`` (minus the
        gradient of a scalar network, which also gives :meth:`log_prob`, at the price of a second
        backward pass).
    :param hidden_dim: width of the network.
    :param depth: hidden layers of the network.
    :param whitening: see :class:`~pyro_ardae.score.whitening.Whitening`.
    :param delta: scale of :math:`\sigma`, in standard deviations of q, in (0, 1].
    :param num_folds: optimizer steps per update, >= 2; each takes ``S // num_folds`` draws of every
        context.
    :param learning_rate: Adam's step size, after ``warm_up`` steps.
    :param warm_up: optimizer steps over which the step size grows linearly.
    :param clip: bound on the norm of a gradient, in units of its running mean, >= 1.
    :param weight_decay: decoupled, per unit of step size, >= 0; it keeps the network from growing
        into a field that explodes between the draws of a long run.
    :param average: weight of the past in the running average of the network, in [0, 1).
    :param autocast: run the hidden layers in bfloat16 where the device gains by it.
    :param num_normalizer_samples: draws for the normalizing constant in :meth:`log_prob`.
    :raises ValueError: for a parameter out of range.

    Reference: Lim, Courville, Pal, Huang, "AR-DAE: Towards Unbiased Neural Entropy Gradient
    Estimation", ICML 2020.
    """

    averaged: Tensor
    gradient_norm: Tensor
    feature_mean: Tensor
    feature_square: Tensor

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        parametrization: Literal["residual", "energy"] = "residual",
        hidden_dim: int = 64,
        depth: int = 3,
        whitening: Mode = "pooled",
        delta: float = 0.2,
        num_folds: int = 4,
        learning_rate: float = 4e-3,
        warm_up: int = 50,
        clip: float = 2.0,
        weight_decay: float = 0.05,
        average: float = 0.98,
        autocast: bool = False,
        num_normalizer_samples: int = 128,
    ) -> None:
        super().__init__(dim, context_dim)
        _in_range("delta", delta, 0.0 < delta <= 1.0, "in (0, 1]")
        _in_range("num_folds", num_folds, num_folds >= 2, ">= 2")
        _in_range("hidden_dim", hidden_dim, hidden_dim >= 1, ">= 1")
        _in_range("depth", depth, depth >= 1, ">= 1")
        _in_range("learning_rate", learning_rate, learning_rate > 0, "> 0")
        _in_range("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        _in_range("clip", clip, clip >= 1, ">= 1")
        _in_range("average", average, 0 <= average < 1, "in [0, 1)")
        if parametrization not in ("residual", "energy"):
            raise ValueError(
                f"ARDAE: expected parametrization 'residual' or 'energy', got {parametrization!r}."
            )
        self.parametrization = parametrization
        self.delta, self.num_folds, self.average = delta, num_folds, average
        self.learning_rate, self.warm_up, self.clip = learning_rate, warm_up, clip
        self.weight_decay = weight_decay
        self.autocast, self.num_normalizer_samples = autocast, num_normalizer_samples
        self.whitening = Whitening(dim, context_dim > 0, mode=whitening)
        width = 2 * dim + context_dim if context_dim else 0
        kind = EnergyNetwork if parametrization == "energy" else ResidualNetwork
        self.network: EnergyNetwork | ResidualNetwork = kind(dim, width, hidden_dim, depth)
        self.weights = torch.nn.Parameter(self.network.initial(), requires_grad=False)
        self.register_buffer("averaged", self.weights.detach().clone())
        self.register_buffer("gradient_norm", torch.zeros(()))
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_square", torch.ones(width))

    # ---- learning --------------------------------------------------------------------------------

    @torch.no_grad()
    def update(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Tensor:
        """``num_folds`` optimizer steps on fresh draws.

        :raises ValueError: for shapes that do not fit, or fewer than ``num_folds`` draws.
        """
        z, context = self._rows(samples, context)
        count, rows, dim = z.shape
        n = count // self.num_folds
        if n < 1:
            raise ValueError(
                f"ARDAE: expected at least num_folds={self.num_folds} draws per context, got "
                f"{count}. Raise num_score_samples, or lower num_folds."
            )
        folds = z[: n * self.num_folds].reshape(self.num_folds, n, rows, dim)
        frame = self.whitening.held_out(folds)
        w = frame.whiten(folds)
        features = self._features(frame, context, fit=True)
        optimizer = self.optimizer
        total = z.new_zeros(())
        for fold in range(self.num_folds):
            loss, gradient = self._loss(w[fold], features[fold], frame.base)
            self.weights.grad = self._clipped(gradient)
            self.steps += 1
            ramp = min(1.0, self.steps / max(1, self.warm_up))
            optimizer.param_groups[0]["lr"] = self.learning_rate * ramp
            optimizer.step()
            keep = min(self.average, self.steps / (self.steps + 9))
            self.averaged.lerp_(self.weights, 1 - keep)
            total += loss
        self.weights.grad = None
        self.whitening.pool(folds)
        self.updates += 1
        return total / (self.num_folds * self.delta**2)

    def _loss(self, w: Tensor, features: Tensor, base: Student) -> tuple[Tensor, Tensor]:
        """Denoising loss on antithetic pairs, and its gradient; the Gaussian in closed form."""
        sigma = self.delta * torch.randn(*w.shape[:-1], 1, dtype=w.dtype, device=w.device)
        u = torch.randn_like(w)
        step = sigma * u
        x = torch.cat([w + step, w - step])
        sigma, u = torch.cat([sigma, sigma]), torch.cat([u, -u])
        target = torch.addcmul(u, sigma, base.score(x, sigma.square()))
        with torch.autocast(w.device.type, torch.bfloat16, enabled=self.autocast):
            return self.network.loss(self.weights, x, sigma, features, target, sigma)

    def _clipped(self, gradient: Tensor) -> Tensor:
        """Bound a gradient by a multiple of the running mean of the norms.

        Without a bound, one outlier among the draws moves all weights by some ten step sizes of
        Adam, and then stalls them for as long as Adam remembers its square.
        """
        norm = gradient.norm()
        finite = norm.isfinite()
        norm = torch.where(finite, norm, torch.ones_like(norm))
        if self.steps == 0:
            self.gradient_norm.copy_(norm)
        bounded = norm.minimum(self.clip * self.gradient_norm)
        self.gradient_norm.lerp_(bounded, 0.02)
        scaled = gradient.mul_(bounded / norm.clamp_min(1e-30))
        return torch.where(finite, scaled, torch.zeros_like(scaled))

    @torch.no_grad()
    def _features(self, frame: Frame, context: Tensor, *, fit: bool = False) -> Tensor:
        """Standardized frame and context, ``[..., K]``."""
        if not self.context_dim:
            return context.expand(*frame.mean.shape[:-3], -1, -1)
        seen = frame.features()
        raw = torch.cat([seen, context.expand(*seen.shape[:-1], -1)], -1)
        if fit:
            rate = max(0.02, 1 / (1 + self.updates))
            flat = raw.reshape(-1, raw.shape[-1])
            self.feature_mean.lerp_(flat.mean(0), rate)
            self.feature_square.lerp_(flat.square().mean(0), rate)
        variance = (self.feature_square - self.feature_mean.square()).clamp_min(0)
        scale = variance.sqrt() + 1e-3 * self.feature_mean.abs() + 1e-8
        return ((raw - self.feature_mean) / scale).clamp_(-5, 5)

    # ---- answering -------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch dim"]:
        """The score at ``value``: the averaged network at sigma = 0."""
        frame, w, features = self._query(value, samples, context)
        with torch.autocast(w.device.type, torch.bfloat16, enabled=self.autocast):
            r = self.network.field(self.averaged, w, w.new_zeros(*w.shape[:-1], 1), features)
        score = frame.pull_back(r + frame.base.score(w))
        return score.reshape(value.shape)

    @torch.no_grad()
    def log_prob(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch"]:
        r"""The normalized log density,

        .. math:: \log t(w) - E(w, 0, c) - \log \hat Z(c) + \log |\det A_c|.

        Z is estimated by ``num_normalizer_samples`` draws of the t, the same for all values.

        :raises NotImplementedError: with the residual parametrization.
        """
        if not isinstance(self.network, EnergyNetwork):
            return super().log_prob(value, samples, context)
        frame, w, features = self._query(value, samples, context)
        shape = (self.num_normalizer_samples, *w.shape[1:])
        draws = frame.base.sample(torch.Size(shape), w)
        points = torch.cat([w, draws])
        sigma = points.new_zeros(*points.shape[:-1], 1)
        energy = self.network.energy(self.averaged, points, sigma, features)
        energy, of_draws = energy.split([len(w), len(draws)])
        log_z = torch.logsumexp(-of_draws, 0) - math.log(self.num_normalizer_samples)
        volume = frame.log_abs_det()
        result = frame.base.log_prob(w) - energy + volume - log_z
        return result.reshape(value.shape[:-1])

    def _query(
        self, value: Tensor, samples: Tensor, context: Tensor | None
    ) -> tuple[Frame, Tensor, Tensor]:
        z, context = self._rows(samples, context)
        if value.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"ARDAE: expected value [N, *batch, dim] with the samples' batch shape and dim "
                f"{tuple(samples.shape[1:])}, got {tuple(value.shape)}."
            )
        frame = self.whitening.frame(z)
        at = value.detach().reshape(len(value), -1, self.dim)
        return frame, frame.whiten(at), self._features(frame, context)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [self.weights],
            self.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.weight_decay,
            fused=True,
        )


def _in_range(name: str, value: float, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"ARDAE: expected {name} {expected}, got {value}.")
