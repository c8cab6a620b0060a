# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Implicit sites when a guide samples them."""

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

__all__ = ["ScoreMessenger"]


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
