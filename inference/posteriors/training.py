# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Training of an automatic guide on a posterior for a given time, and its options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.posteriors.reference import flatten
from inference.shared.clock import Clock
from inference.shared.schedules import annealed, cosine_decay, decay_score
from models.posterior_guides import GUIDES
from models.posteriors import POSTERIORS, Posterior
from pyro_ardae import ARDAE, AutoImplicit, TraceImplicit_ELBO
from pyro_ardae.traces import guide_draws
from pyro_ardae.unconstrained import UnconstrainedModel

__all__ = ["MAX_SKIPPED", "Config", "Training"]

#: Steps in a row without a finite gradient that a run survives.
MAX_SKIPPED = 20


@dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    posteriors: tuple[str, ...] = tuple(POSTERIORS)
    """Posteriors to compare guides on."""
    guides: tuple[str, ...] = tuple(GUIDES)
    """Guides to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialization and noise."""
    seconds: float = 30.0
    """Time of training of each guide. The schedules run over it, whatever the machine's speed."""
    clock: Clock = "wall"
    """What the time is measured in: wall-clock, or this process's CPU time, which on one thread is
    the wall-clock of an idle core."""
    steps: int = 1_000_000
    """Training steps at most; the schedules run over whichever limit comes first."""
    particles: int | None = None
    """Draws of the guide per step; the posterior's own number if left out: 256 in the plane, 32
    elsewhere."""
    learning_rate: float = 1e-2
    """Step size of Adam for the normal and multivariate guides."""
    flow_learning_rate: float = 2e-3
    """Step size of Adam for the flows."""
    implicit_learning_rate: float = 5e-3
    """Step size of Adam for the implicit guide: slow enough for the score to follow."""
    decay_start: float = 0.3
    """Share of the run after which step sizes fall, along a cosine, to zero."""
    beta_start: float = 0.01
    """Weight of the data's log-density at the first step, in (0, 1]; it rises to 1 geometrically,
    for every guide, ..."""
    beta_share: float = 0.4
    """... over this share of the run."""
    score_samples: int = 1024
    """Implicit guide: draws by which the score is learned in a step."""
    score_learning_rate: float = 8e-3
    """Implicit guide: step size of the score network."""
    draws: int = 4000
    """Draws of each guide that are compared."""
    reference_draws: int = 1000
    """Reference draws per chain, 4 chains."""
    reference_warm_up: int = 500
    """Warm-up steps of NUTS."""
    threads: int = 1
    """CPU threads of torch; models of this size gain nothing by more."""
    figures: bool = True
    """Whether to draw pair plots."""
    references: Path | None = None
    """Folder of the reference draws; OUT/references if left out."""
    out: Path = Path("runs/posterior")
    """Run folder; new, or to go on with."""


class Training:
    """A guide in training on a posterior.

    :param Posterior posterior: the posterior.
    :param str guide: a name of :data:`models.posterior_guides.GUIDES`.
    :param Config config: options.
    """

    def __init__(self, posterior: Posterior, guide: str, config: Config) -> None:
        self.posterior, self.config = posterior, config
        self.joint = UnconstrainedModel(
            posterior.model, *(posterior.reference_args or posterior.args)
        )
        self.steps_done, self.seconds, self.beta = 0, 0.0, config.beta_start
        self.skipped = 0
        self.guide = GUIDES[guide](posterior.model, posterior.spread)
        rates = {
            **dict.fromkeys(("iaf", "flow"), config.flow_learning_rate),
            "implicit": config.implicit_learning_rate,
        }
        self.rate = rates.get(guide, config.learning_rate)
        self.loss: ELBO = self._loss()
        self.guide(*posterior.args)  # makes its parameters
        self.objective = self.loss(self._tempered, self.guide)
        self.optimizer = torch.optim.Adam(self.guide.parameters(), self.rate, fused=True)

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by seconds, in [0, 1]."""
        config = self.config
        return min(1.0, max(self.steps_done / config.steps, self.seconds / config.seconds))

    def step(self) -> None:
        """Takes one training step, or none where the gradient is not finite.

        :raises ValueError: if that was so too often in a row.
        """
        config, progress = self.config, self.progress
        self.beta = annealed(progress, config.beta_start, config.beta_share)
        decay = cosine_decay(progress, config.decay_start)
        self.optimizer.param_groups[0]["lr"] = self.rate * decay
        decay_score(self.loss, config.score_learning_rate, decay)
        try:
            self.objective(*self.posterior.args).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.guide.parameters(), 100.0)
            taken = bool(torch.isfinite(norm))
        except ValueError:  # of Pyro: a scale that is rounded to 0, say, is outside of its support
            taken = False
        self.skipped = 0 if taken else self.skipped + 1
        if self.skipped > MAX_SKIPPED:
            raise ValueError(f"{self.skipped} steps in a row had no finite gradient")
        if taken:  # a draw far out in a tail must not end the run
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def train(self, clock: Callable[[], float]) -> Iterator[float]:
        """Trains to the end of the time; yields the seconds of every step."""
        started = clock()
        while self.progress < 1:
            before = self.seconds
            self.step()
            self.seconds = clock() - started
            yield self.seconds - before

    def draws(self, num_draws: int) -> Tensor:
        """Draws of the guide, constrained: ``[num_draws, dim]``, float64.

        :raises ValueError: if they are not finite.
        """
        posterior, joint = self.posterior, self.joint
        args = posterior.args
        found = guide_draws(self.guide, joint.sites, args, num_draws, joint.max_plate_nesting)
        shapes = {name: site["value"].shape for name, site in joint.sites.items()}
        return flatten({n: v.reshape(num_draws, *shapes[n]) for n, v in found.items()})[0]

    def _tempered(self, *args: Any) -> None:
        with _Temper(self.beta):
            self.posterior.model(*args)

    def _loss(self) -> ELBO:
        config = self.config
        common: dict[str, Any] = {
            "num_particles": config.particles or self.posterior.particles,
            "vectorize_particles": True,
            "max_plate_nesting": self.joint.max_plate_nesting,
        }
        if not isinstance(self.guide, AutoImplicit):
            return Trace_ELBO(**common)
        estimator = partial(ARDAE, learning_rate=config.score_learning_rate)
        return TraceImplicit_ELBO(
            estimator, num_score_samples=config.score_samples, antithetic=True, **common
        )


class _Temper(Messenger):
    """Scales the log-density of the data, not that of the prior."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self._beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self._beta
