# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Implicit sites as the losses see them: where they are sampled, and what is kept of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ardae.implicit import Implicit, find_implicit, is_reparameterized, unwrapped
from pyro_ardae.probe import check_context, check_noise
from pyro_ardae.score import ScoreEstimator

__all__ = ["ScoreMessenger", "Site"]


class ScoreMessenger(Messenger):
    """Attach a score to every implicit site that a guide samples, when it is sampled."""

    def __init__(self, attach: Callable[[str, Implicit, Tensor], None], probed: set[str]) -> None:
        super().__init__()
        self._attach = attach
        self._probed = probed
        self.paired_dim: int | None = None
        self._earlier: dict[str, Tensor] = {}
        self._not_reparameterized: list[str] = []

    def __enter__(self) -> Any:
        self._earlier.clear()  # of another run of the guide
        self._not_reparameterized.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = None if self.paired_dim is None else find_implicit(msg["fn"])
        if fn is not None:
            fn.paired_dim = self.paired_dim  # expanded by the particles' plate later

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            return
        fn = find_implicit(msg["fn"])
        if fn is not None:
            for drawn in (fn, fn.expanded_from):
                if drawn is not None:  # later draws of it are independent
                    drawn.paired_dim = None
            if self._not_reparameterized and torch.is_grad_enabled():
                self._refuse(msg["name"])
            if msg["name"] not in self._probed and msg["value"].requires_grad:
                self._probed.add(msg["name"])
                check_context(msg["name"], fn, self._earlier)
                check_noise(msg["name"], fn)
            self._attach(msg["name"], fn, msg["value"])
        elif not site_is_subsample(msg) and not is_reparameterized(msg["fn"]):
            self._not_reparameterized.append(msg["name"])
        if not isinstance(unwrapped(msg["fn"]), Delta):  # which varies by what it is made of only
            self._earlier[msg["name"]] = msg["value"]

    def _refuse(self, name: str) -> None:
        """Pyro differentiates by such a site through the value of what follows it."""
        before = self._not_reparameterized[0]
        raise ValueError(
            f"implicit site '{name}': the guide samples '{before}' before it, which is not "
            "reparameterized. Its gradient takes the value of log q of what follows, and an "
            f"implicit site has none. Leave '{before}' out of the guide and let "
            f"TraceImplicitEnum_ELBO sum it out of the model; or, if '{name}' does not depend on "
            "it, sample it afterwards."
        )


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
