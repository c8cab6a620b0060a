# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What estimators share that train a network in whitened coordinates: all but the objective."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.clipping import clip_factor
from pyro_ardae.score.energy import EnergyNetwork
from pyro_ardae.score.residual import ResidualNetwork
from pyro_ardae.score.student import Student
from pyro_ardae.score.trained import TrainedEstimator
from pyro_ardae.score.whitening import Frame, Mode, Whitening, per_context

__all__ = ["WhitenedEstimator"]

#: Horizons of the two averages of the weights, in units of the age.
_HORIZONS = (1 / 4, 1 / 16)

#: Updates between comparisons of the two, and the factor on the age for each update while the
#: shorter one wins.
_CHECK_EVERY, _SHRINK = 4, 0.97

#: Draws, over all contexts, that an optimizer step takes where ``num_folds`` is left open, and the
#: fewest and most steps of an update then. Twice or half of it leave a tenth more error at equal
#: time.
_FOLD, _FOLDS = 512, (4, 8)

#: Age at which the step size has fallen by a factor of the root of 2.
_RATE_AGE = 1000


class WhitenedEstimator(TrainedEstimator):
    r"""Score estimator whose network learns what the whitened q has besides a Gaussian's score.

    - An update cuts the draws into ``num_folds`` and takes one optimizer step on each, whitened by
      the moments of the other folds: what is whitened by its own moments has another law than what
      is queried. Without gradient clipping and weight decay, outliers blow the network up after
      some 10,000 steps.
    - Queries use a running average of the weights. Two are kept, whose horizons are a quarter and a
      sixteenth of the *age*, the number of steps for which q has effectively stood still: it grows
      with every step while the longer average has the smaller loss on draws that neither has seen,
      and shrinks while the shorter one does. The step size falls with the root of the age. So a
      fixed q is averaged over ever more steps, and a moving one is followed.

    :param network: kind of the network; its features are means, log scales and context.
    :param hidden_dim: width of the network, >= 1.
    :param depth: hidden layers of the network, >= 1.
    :param num_folds: see :class:`~pyro_ardae.score.ardae.ARDAE`, also for what follows.
    :param num_steps: optimizer steps of an update.
    :param whitening: mode.
    :param learning_rate: step size.
    :param warm_up: optimizer steps.
    :param clip: bound on a gradient.
    :param weight_decay: decoupled.
    :param min_age: lower bound of the age once as many steps are done.
    :param max_age: upper bound of the age.
    :raises ValueError: for a parameter out of range.
    """

    averages: Tensor
    advantage: Tensor
    gradient_norm: Tensor
    feature_mean: Tensor
    feature_square: Tensor

    def __init__(
        self,
        dim: int,
        context_dim: int,
        network: type[ResidualNetwork] | type[EnergyNetwork],
        *,
        hidden_dim: int,
        depth: int,
        num_folds: int | None,
        num_steps: int | None,
        whitening: Mode,
        learning_rate: float,
        warm_up: int,
        clip: float,
        weight_decay: float,
        min_age: int,
        max_age: int,
    ) -> None:
        super().__init__(dim, context_dim)
        self._check_network(hidden_dim, depth)
        # Pooled moments are those of earlier draws: no fold has to be held out for them.
        least = 2 if per_context(context_dim, whitening) else 1
        if num_folds is not None:
            self._in_range("num_folds", num_folds, num_folds >= least, f">= {least}")
        if num_steps is not None:
            most = max(_FOLDS) if num_folds is None else num_folds
            self._in_range("num_steps", num_steps, 1 <= num_steps <= most, f"in [1, {most}]")
        self._in_range("learning_rate", learning_rate, learning_rate > 0, "> 0")
        self._in_range("clip", clip, clip >= 1, ">= 1")
        self._in_range("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        self._in_range("min_age", min_age, 1 <= min_age <= max_age, f"in [1, max_age={max_age}]")
        self.num_folds, self.num_steps = num_folds, num_steps
        self.min_age, self.max_age = min_age, max_age
        self.learning_rate, self.warm_up, self.clip = learning_rate, warm_up, clip
        self.weight_decay = weight_decay
        self.steps = 0
        self.age = 0.0
        self.slow_wins = True
        self.whitening = Whitening(dim, context_dim, mode=whitening)
        feature_dim = context_dim + (2 * dim if self.whitening.per_context else 0)
        self.network = network(dim, feature_dim, hidden_dim, depth)
        self.weights = torch.nn.Parameter(self.network.initial(), requires_grad=False)
        self.register_buffer("averages", self.weights.detach().repeat(2, 1))
        self.register_buffer("advantage", torch.zeros(()))
        self.register_buffer("gradient_norm", torch.zeros(()))
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_square", torch.ones(feature_dim))

    @property
    def needs_center(self) -> bool:  # type: ignore[override]
        """Whether calls take ``center``: in the mode ``"centered"``."""
        return self.whitening.mode == "centered"

    @property
    def needs_samples(self) -> bool:  # type: ignore[override]
        """Whether queries read samples: where every context has moments of its own."""
        return self.whitening.per_context

    @abstractmethod
    def _loss(self, w: Tensor, features: Tensor, base: Student) -> tuple[Tensor, Tensor]:
        """Loss of ``w [n, B, D]`` with ``features [B, K]``, and its gradient by the weights."""

    @abstractmethod
    def _advantage(self, w: Tensor, features: Tensor, base: Student) -> Tensor:
        """Loss of the longer average minus that of the shorter one, on the same noise."""

    @property
    def averaged(self) -> Tensor:
        """The weights that queries use."""
        return self.averages[0 if self.slow_wins else 1]

    @torch.no_grad()
    def update(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Tensor:
        """``num_steps`` optimizer steps on fresh draws.

        :returns: the mean loss.
        :raises ValueError: for shapes that do not fit, or fewer than ``num_folds`` draws.
        """
        z, context = self._rows(samples, context)
        z = self._less(z, center)
        count, rows, dim = z.shape
        num_folds = self.num_folds or self._count_folds(count, rows)
        num_steps = min(self.num_steps or num_folds, num_folds)
        n = count // num_folds
        if n < 1:
            raise ValueError(
                f"{type(self).__name__}: expected at least num_folds={num_folds} draws per "
                f"context, got {count}. Raise num_score_samples, or lower num_folds."
            )
        if self.whitening.per_context and n * (num_folds - 1) < 2:
            raise ValueError(
                f"{type(self).__name__}: expected at least 2 draws per context besides those of a "
                f"fold, for the moments, got {count} in {num_folds} folds. Raise "
                "num_score_samples."
            )
        folds = z[: n * num_folds].reshape(num_folds, n, rows, dim)
        frame = self.whitening.held_out(folds, context)
        w = frame.whiten(folds)[:num_steps]
        features = self._features(frame, context, fit=True)[:num_steps]
        base = frame.base
        self._grow_older(w[0], features[0], base, num_steps)
        rate = self.learning_rate * (1 + self.age / _RATE_AGE) ** -0.5
        total = z.new_zeros(())
        for fold in range(num_steps):
            loss, gradient = self._loss(w[fold], features[fold], base)
            self.weights.grad = self._clipped(gradient)
            self.steps += 1
            ramp = min(1.0, self.steps / max(1, self.warm_up))
            self.optimizer.param_groups[0]["lr"] = rate * ramp
            self.optimizer.step()
            total += loss
        self.weights.grad = None
        for average, horizon in zip(self.averages, _HORIZONS, strict=True):
            keep = (1 - 1 / (1 + horizon * self.age)) ** num_steps
            average.lerp_(self.weights, 1 - keep)
        self.whitening.pool(folds, context)
        self.updates += 1
        return total / num_steps

    @staticmethod
    def _count_folds(count: int, rows: int) -> int:
        least, most = _FOLDS
        return max(1, min(max(count * rows // _FOLD, least), most, count))

    def _grow_older(self, w: Tensor, features: Tensor, base: Student, num_steps: int) -> None:
        if self.updates % _CHECK_EVERY == _CHECK_EVERY - 1:
            advantage = self._advantage(w, features, base)
            advantage = torch.where(advantage.isfinite(), advantage, self.advantage)
            self.advantage.lerp_(advantage, 0.15)
            self.slow_wins = bool(self.advantage <= 0)
            if not self.slow_wins:
                self.age *= _SHRINK**_CHECK_EVERY
        if self.slow_wins:
            self.age += num_steps
        least = min(self.min_age, self.steps + num_steps)
        self.age = min(max(self.age, least), self.max_age)

    def _clipped(self, gradient: Tensor) -> Tensor:
        """Bound a gradient by a multiple of the running mean of the norms.

        Without a bound, one outlier among the draws moves all weights by some ten step sizes of
        Adam, and then stalls them for as long as Adam remembers its square.
        """
        norm = gradient.norm()
        scaled = gradient.mul_(clip_factor(norm, self.gradient_norm, self.clip))
        return torch.where(norm.isfinite(), scaled, torch.zeros_like(scaled))

    @torch.no_grad()
    def _features(self, frame: Frame, context: Tensor, *, fit: bool = False) -> Tensor:
        """Standardized frame and context, ``[..., K]``."""
        if not self.context_dim:
            return context.expand(*frame.mean.shape[:-3], -1, -1)
        # Constant frames say nothing. The context is the same for all parts of an update.
        parts, at = [], 0
        for raw in (frame.features(), context) if self.whitening.per_context else (context,):
            span = slice(at, at := at + raw.shape[-1])
            mean, square = self.feature_mean[span], self.feature_square[span]
            if fit:
                rate = max(0.02, 1 / (1 + self.updates))
                flat = raw.reshape(-1, raw.shape[-1])
                mean.lerp_(flat.mean(0), rate)
                square.lerp_(flat.square().mean(0), rate)
            scale = (square - mean.square()).clamp_min(0).sqrt() + 1e-3 * mean.abs() + 1e-8
            parts.append(((raw - mean) / scale).clamp_(-5, 5))
        *seen, standard = parts
        standard = standard.expand(*frame.mean.shape[:-3], -1, -1)
        return torch.cat([*seen, standard], -1) if seen else standard

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
        return self._score(value, samples, context, center, sigma=0.0)

    def _score(
        self,
        value: Tensor,
        samples: Tensor,
        context: Tensor | None,
        center: Tensor | None,
        *,
        sigma: float,
    ) -> Tensor:
        frame, w, features = self._query(value, samples, context, center)
        level = w.new_full((*w.shape[:-1], 1), sigma)
        r = self.network.field(self.averaged, w, level, features)
        return frame.pull_back(r + self._base_score(frame.base, w, sigma**2)).reshape(value.shape)

    def _base_score(self, base: Student, w: Tensor, square_sigma: Tensor | float) -> Tensor:
        """What the network's field is added to; the caller may change it in place."""
        return base.score(w, square_sigma)

    def _less(self, z: Tensor, center: Tensor | None) -> Tensor:
        """``z [n, B, D]`` less the center, if it matters."""
        if not self.needs_center:
            return z
        if center is None:
            raise ValueError(
                f"{type(self).__name__}: expected `center` with whitening='centered', got None. "
                "Pass the sampler's output for zero noise, [*batch, dim]."
            )
        return z - center.detach().reshape(1, -1, self.dim)

    def _query(
        self, value: Tensor, samples: Tensor, context: Tensor | None, center: Tensor | None
    ) -> tuple[Frame, Tensor, Tensor]:
        z, context = self._rows(samples, context, least=2 if self.whitening.per_context else 0)
        frame = self.whitening.frame(self._less(z, center), context)
        at = self._less(self._points(value, samples), center)
        return frame, frame.whiten(at), self._features(frame, context)

    def get_extra_state(self) -> dict[str, Any]:
        """As in the base class, with steps and age."""
        own = {"steps": self.steps, "age": self.age, "slow_wins": self.slow_wins}
        return {**super().get_extra_state(), **own}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` gave."""
        super().set_extra_state(state)
        self.steps, self.age, self.slow_wins = state["steps"], state["age"], state["slow_wins"]

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [self.weights],
            self.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.weight_decay,
            fused=True,
        )
