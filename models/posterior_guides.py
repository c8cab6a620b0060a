# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides of any Pyro model, to compare :class:`~pyro_ardae.AutoImplicit` with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from models.unconditional import FlowPosterior
from pyro_ardae import AutoImplicit

__all__ = ["GUIDES", "AutoFlow"]


class AutoFlow(AutoContinuous):
    """A neural spline flow of zuko over all latents, on the reals.

    :param callable model: a Pyro model.
    :param int transforms: number of autoregressive transforms.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers of each.
    :param int bins: pieces of each spline.
    :param float spread: scale of the draws before training; the splines bend what is within 5 of
        it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        transforms: int = 3,
        hidden_dims: tuple[int, ...] = (64, 64),
        bins: int = 8,
        spread: float = 1.0,
    ) -> None:
        super().__init__(model)
        self.options = {"transforms": transforms, "hidden_dims": hidden_dims, "bins": bins}
        self.spread = spread

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        self.flow = FlowPosterior(self.latent_dim, **self.options, spread=self.spread, loc=loc)

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The distribution of all latents on the reals."""
        return self.flow()


GUIDES: dict[str, Callable[[Callable[..., Any], float], AutoGuide]] = {
    "normal": lambda model, spread: AutoNormal(model, init_scale=spread),
    "multivariate": lambda model, spread: AutoMultivariateNormal(model, init_scale=spread),
    "iaf": lambda model, spread: AutoIAFNormal(model, num_transforms=2),
    "flow": lambda model, spread: AutoFlow(model, spread=max(1.0, spread)),
    "implicit": lambda model, spread: AutoImplicit(model, init_scale=spread),
}
"""Guides by name: ``(model, spread)`` to a guide whose draws have that scale on the reals before
training. That of an inverse autoregressive flow is 1, that of a spline flow at least 1."""
