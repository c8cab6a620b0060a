# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What a loss keeps of the implicit sites of its guide: their score estimators, and the like."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ardae.implicit import Implicit
from pyro_ardae.random import fork_rng
from pyro_ardae.score import ScoreEstimator

__all__ = ["EstimatorFactory", "Site", "Sites"]

#: Makes the score estimator of a site from the sizes of its event and its context.
EstimatorFactory = Callable[[int, int], ScoreEstimator]


class Site:
    """What the loss keeps of one implicit site: its estimator, and what the last step saw."""

    def __init__(self, estimator: ScoreEstimator) -> None:
        self.estimator = estimator
        self.loss: Tensor | None = None
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        self.num_draws: int | None = None
        """Per context, by which it learned last."""
        self.runs = 0
        """Runs of the guide so far in which it might have learned."""
        self._kind: tuple[torch.device, torch.dtype] | None = None

    def follow(self, value: Tensor) -> None:
        """Take the estimator to the device and dtype of the site's value, single precision at
        least: under ``torch.autocast`` a sampler may return half precision.
        """
        kind = value.device, torch.promote_types(value.dtype, torch.float32)
        if kind != self._kind:
            with torch.inference_mode(False):
                self.estimator.to(*kind)
            self._kind = kind

    def learn(self, samples: Tensor, context: Tensor | None, center: Tensor | None) -> None:
        """Update the estimator by draws ``[S, *batch, D]``, in its own precision."""
        with torch.autocast(samples.device.type, enabled=False):
            samples, context, center = self._in_precision(samples, context, center)
            self.loss = self.estimator.update(samples, context, center=center)

    def score(
        self, value: Tensor, samples: Tensor, context: Tensor | None, center: Tensor | None
    ) -> Tensor:
        """The score at values ``[N, *batch, D]``, estimated in the estimator's precision."""
        return self._query(self.estimator, value, samples, context, center).to(value.dtype)

    def log_prob(
        self, value: Tensor, samples: Tensor, context: Tensor | None, center: Tensor | None
    ) -> Tensor:
        """The log-density that an estimator with one has there, ``[N, *batch]``, likewise."""
        estimator: Any = self.estimator
        return self._query(estimator.log_prob, value, samples, context, center)

    def _query(
        self,
        method: Callable[..., Tensor],
        value: Tensor,
        samples: Tensor,
        context: Tensor | None,
        center: Tensor | None,
    ) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            at, samples, context, center = self._in_precision(value, samples, context, center)
            return method(at, samples, context, center=center).detach()

    def _in_precision(self, *tensors: Any) -> tuple[Any, ...]:
        assert self._kind is not None
        return tuple(None if one is None else one.to(self._kind[1]) for one in tensors)

    def diagnostics(self) -> dict[str, float]:
        result = {} if self.loss is None else {"score_loss": float(self.loss)}
        if self.last is None:
            return result
        score, value, samples = self.last
        centered = value - samples.mean(0)
        identity = -(score * centered).sum(-1).flatten() / score.shape[-1]
        result["stein"] = float(identity.mean())
        if len(identity) > 1:
            result["stein_error"] = float(identity.std() / len(identity) ** 0.5)
        result["mean_score"] = float(score.flatten(0, -2).mean(0).norm())
        result["std"] = float(samples.std(0).mean()) if len(samples) > 1 else float("nan")
        return result


class Sites:
    """The sites that a loss has met, by name, and the states of those that it has not met yet.

    :param score_estimator: called once for each site.
    """

    def __init__(self, score_estimator: EstimatorFactory) -> None:
        self.score_estimator = score_estimator
        self.met: dict[str, Site] = {}
        self.pending: dict[str, dict[str, Any]] = {}
        """States that were loaded, until their sites are met."""
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        state = {
            name: {
                "dim": site.estimator.dim,
                "context_dim": site.estimator.context_dim,
                "kind": type(site.estimator).__name__,
                "num_draws": site.num_draws,
                "runs": site.runs,
                "estimator": site.estimator.state_dict(),
            }
            for name, site in self.met.items()
        }
        return {**self.pending, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, and forgets all else.

        :raises TypeError: for anything else.
        """
        if not isinstance(state, dict):
            raise TypeError(
                f"expected what state_dict() of such a loss has given, got a {type(state).__name__}"
            )
        for name, of_site in state.items():
            keys = {*of_site} if isinstance(of_site, dict) else set()
            if not keys >= {"dim", "context_dim", "estimator"}:
                raise TypeError(
                    "expected what state_dict() of such a loss has given, got an entry "
                    f"{name!r} that is no state of a site ({type(of_site).__name__})."
                )
        self.clear()
        self.pending = copy.deepcopy(state)  # neither later training nor an optimizer may share it

    def clear(self) -> None:
        """Forgets all."""
        self.met.clear()
        self.pending.clear()
        self._warned = False

    def meet(self, name: str, fn: Implicit, like: Tensor) -> Site:
        """The site of a name; its estimator is built when it is first met.

        :param like: a value of the site, whose device and dtype the estimator follows.
        :raises TypeError: if what is built is no estimator.
        :raises ValueError: if it was built for other sizes, or its state is of another kind.
        """
        dim = max(1, fn.event_shape.numel())
        width = 0 if fn.context is None else fn.context.shape[-1]
        site = self.met.get(name)
        if site is None:
            # Building must not shift the guide's noise, nor make what cannot be trained later.
            with fork_rng(), torch.inference_mode(False):
                site = self.met[name] = self._build(name, dim, width, like)
        self._check(name, site.estimator.dim, site.estimator.context_dim, dim, width)
        site.follow(like)
        return site

    def check_pending(self) -> None:
        """Warns, once, of states that no site has taken."""
        if self.pending and self.met and not self._warned:
            self._warned = True
            warnings.warn(
                f"the state that was loaded has sites that the guide has not sampled so far: "
                f"{', '.join(map(repr, self.pending))}. Were they renamed?",
                stacklevel=3,
            )

    def _build(self, name: str, dim: int, width: int, like: Tensor) -> Site:
        estimator: Any = self.score_estimator(dim, width)
        if not isinstance(estimator, ScoreEstimator):
            raise TypeError(
                "score_estimator: expected a callable that returns a ScoreEstimator, such as "
                f"ARDAE, got a {type(estimator).__name__} of it."
            )
        site = Site(estimator)
        site.follow(like)
        if name in self.pending:
            state = self.pending[name]
            self._check(name, state["dim"], state["context_dim"], dim, width)
            kind = type(estimator).__name__
            if state.get("kind", kind) != kind:
                raise ValueError(
                    f"implicit site '{name}': expected the state of a {kind}, got that of a "
                    f"{state['kind']}. Build the loss with the score_estimator it was saved of."
                )
            estimator.load_state_dict(state["estimator"])
            site.num_draws = state.get("num_draws")
            site.runs = state.get("runs", 0)
            del self.pending[name]
        return site

    def _check(self, name: str, dim: int, width: int, new_dim: int, new_width: int) -> None:
        if (dim, width) != (new_dim, new_width):
            raise ValueError(
                f"implicit site '{name}': this loss object was built for an event of size {dim} "
                f"and a context of size {width}, got {new_dim} and {new_width}. Use one loss "
                "object per guide, or call reset()."
            )
