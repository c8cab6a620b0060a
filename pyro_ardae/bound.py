# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A real ELBO of an implicit guide: its entropy from an energy network fitted to the guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_ardae.elbo import (
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from pyro_ardae.implicit import Implicit
from pyro_ardae.score import ARDAE
from pyro_ardae.traces import OR_EACH, latent_sites, plate_nesting, traces_of

__all__ = ["ElboEstimate", "elbo_estimate"]


@dataclass(frozen=True)
class ElboEstimate:
    """An estimate of the evidence lower bound of a guide."""

    value: float
    """Nats, of all data (scaled up where a plate is subsampled, as in training)."""
    error: float
    """Standard error over the draws of the guide, nats. It holds none of the bias."""
    implicit_sites: tuple[str, ...]
    """Sites whose entropy was estimated; empty where the value is unbiased."""
    num_samples: int
    """Draws of the guide."""

    def __str__(self) -> str:
        text = f"ELBO {self.value:.3f} ± {self.error:.3f} nats ({self.num_samples} draws)"
        if self.implicit_sites:
            sites = ", ".join(self.implicit_sites)
            text += f"; too high by KL(q || energy model) at {sites}"
        return text


class _Density:
    """The loss with estimates of log q itself at implicit sites, in place of its gradient."""

    _advice = OR_EACH

    def _attach(self, name: str, fn: Implicit, value: Tensor) -> None:
        super()._attach(name, fn, value)  # type: ignore[misc]
        site = self._sites.met[name]  # type: ignore[attr-defined]
        source, dims = fn.distinct(), len(fn.event_shape)
        context = None if source.context is None else source.context.detach()
        count = max(64, 4096 // max(1, source.batch_shape.numel()))

        def density(of: Implicit, at: Tensor) -> Tensor:
            with torch.no_grad():
                samples, center = source.flat_draws(count, center=site.estimator.needs_center)
                rows = of.flat(at).reshape(-1, *samples.shape[1:])
                result: Tensor = site.log_prob(rows, samples, context, center)
            return result.reshape(at.shape[: at.dim() - dims])

        fn.density = density

    def _warn_of_one_draw(self, name: str) -> None:
        """No guide learns here."""

    def _get_traces(self, *args: Any) -> Any:
        attached: list[Implicit] = self._attached  # type: ignore[attr-defined]
        for pair in super()._get_traces(*args):  # type: ignore[misc]
            fns = list(attached)
            try:
                yield pair
            finally:  # a guide may keep its distributions
                for fn in fns:
                    fn.density = None


def elbo_estimate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_updates: int = 300,
    loss: TraceImplicit_ELBO | TraceImplicitEnum_ELBO | TraceImplicitMeanField_ELBO | None = None,
    parallel: bool = True,
) -> ElboEstimate:
    r"""Estimates the ELBO, including the entropies that the training loss lacks.

    .. math:: E_{q}[\log p(x, z) - \log \hat q(z)], \qquad
        \log \hat q(z) = \log t(w) - E(w) - \log \hat Z + \log |\det A|

    at every implicit site, with an energy network fitted to draws of the guide, which stays as it
    is (:meth:`ARDAE.log_prob <pyro_ardae.score.ARDAE.log_prob>`); explicit sites have their own
    density.

    .. warning:: The bias: :math:`-E_q[\log \hat q]` is a cross-entropy, so the estimate is **too
        high by** :math:`KL(q \| \hat q) \ge 0` in expectation, and can lie above
        :math:`\log p(x)`: it is no bound. The bias falls with more ``num_updates``. The estimate
        of :math:`\log \hat Z` by S draws (``num_normalizer_samples`` of ARDAE) acts the other way,
        by about :math:`\mathrm{Var}(\hat Z) / (2 S Z^2)`. For a figure that errs to the safe side
        use :func:`~pyro_ardae.log_likelihood`.

    Without implicit sites it is the ordinary, unbiased ELBO.

    :param callable model: a Pyro model.
    :param callable guide: a guide.
    :param args: arguments of both; keyword arguments by ``functools.partial``.
    :param int num_samples: draws of the guide, at least 2.
    :param int num_updates: updates by which the energy networks learn the guide as it is, >= 0.
    :param loss: the loss object of the training, an ELBO of this package. It names the kind of ELBO
        (``TraceImplicitEnum_ELBO`` for enumerated sites), and if its estimators have a density
        (``ARDAE(…, parametrization="energy")``) they are where the networks start, and learn from
        as many draws as in training.
    :param bool parallel: take the draws in one more plate; set ``False`` where model or guide do
        not broadcast.
    :returns: the estimate and its standard error.
    :raises ValueError: for a number out of its range, and for discrete sites of the model that the
        guide and the kind of ELBO leave out.
    :raises RuntimeError: where model or guide fail in one more plate, with the advice to take
        ``parallel=False``.

    Reference: Lim, Courville, Pal, Huang, "AR-DAE: Towards Unbiased Neural Entropy Gradient
    Estimation", ICML 2020: the energy parametrization and its normalizing constant.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2, got {num_samples}")
    if num_updates < 0:
        raise ValueError(f"num_updates: expected at least 0, got {num_updates}")
    kinds = (TraceImplicitEnum_ELBO, TraceImplicitMeanField_ELBO)
    base = next((kind for kind in kinds if isinstance(loss, kind)), TraceImplicit_ELBO)
    drawn, joint = traces_of(model, guide, args)
    for name, site in latent_sites(joint).items():
        discrete = site["fn"].support.is_discrete and name not in drawn.nodes
        if discrete and base is not TraceImplicitEnum_ELBO:
            raise ValueError(
                f"site '{name}': it is discrete, and the guide has none of it. Sum it out: the "
                "model under config_enumerate, and loss=TraceImplicitEnum_ELBO(…), that of the "
                "training or a new one."
            )
    density_loss: Any = type("_DensityELBO", (_Density, base), {})
    if loss is not None:
        loss._restore(guide, args)
    trained = [] if loss is None else list(loss.estimators.values())
    started = bool(trained) and all(
        isinstance(estimator, ARDAE) and estimator.parametrization == "energy"
        for estimator in trained
    )
    factory = loss.score_estimator if loss is not None and started else _energy
    # Batches, whose means are independent, so that a loss that sums over particles will do.
    batches = min(num_samples, 20 if parallel else num_samples)
    particles = math.ceil(num_samples / batches)
    elbo = density_loss(
        factory,
        loss.num_score_samples if loss is not None and started else None,
        num_score_contexts=loss.num_score_contexts if loss is not None else None,
        num_particles=particles,
        max_plate_nesting=plate_nesting(drawn, joint),
        vectorize_particles=parallel and particles > 1,
        strict_enumeration_warning=loss is None or loss.strict_enumeration_warning,
    )
    if loss is not None and started:
        elbo.load_state_dict(loss.state_dict())
    with torch.no_grad():
        elbo.loss(model, guide, *args)  # builds the estimators
        if elbo.estimators:
            with elbo._learn():
                for _ in range(num_updates):
                    elbo.loss(model, guide, *args)
        values = [-float(elbo.loss(model, guide, *args)) for _ in range(batches)]
    result = torch.tensor(values, dtype=torch.double)
    return ElboEstimate(
        value=float(result.mean()),
        error=float(result.std() / math.sqrt(batches)),
        implicit_sites=tuple(elbo.estimators),
        num_samples=batches * particles,
    )


_energy = partial(ARDAE, parametrization="energy")
