# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro ELBOs for guides with :class:`~pyro_ardae.implicit.Implicit` sites."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_ardae.implicit import Implicit
from pyro_ardae.messenger import ScoreMessenger
from pyro_ardae.probe import check_trained
from pyro_ardae.random import fork_rng
from pyro_ardae.score import ARDAE, ScoreEstimator
from pyro_ardae.sites import EstimatorFactory, Sites
from pyro_ardae.traces import advised, refuse_dimensions, traces_of

__all__ = ["TraceImplicitEnum_ELBO", "TraceImplicitMeanField_ELBO", "TraceImplicit_ELBO"]


def _parameters(trace: poutine.Trace) -> list[Tensor]:
    """Those of a trace of parameters, without constraints."""
    values = (site["value"] for site in trace.nodes.values())
    # Those of Pyro's module_local_params are a module's own.
    return [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]


def _finite_gradients(trace: poutine.Trace) -> bool:
    gradients = (parameter.grad for parameter in _parameters(trace))
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


def _draw(
    name: str, source: Implicit, count: int, *, center: bool, checked: bool
) -> tuple[Tensor, Tensor | None]:
    with poutine.block():
        samples, found = source.flat_draws(count, center=center)
    # The estimators keep squares of them.
    wide = torch.promote_types(samples.dtype, torch.float32)  # squares in half precision overflow
    if checked and not torch.isfinite(samples.to(wide).square().sum()):
        raise ValueError(
            f"implicit site '{name}': its sampler returned non-finite values, or some too "
            "large to be squared. The step was refused and no parameter changed. Lower the "
            "learning rate, clip gradients, or check the data for NaN. If every step is "
            "refused, parameters are NaN already: an earlier step had a finite loss "
            "without a finite gradient."
        )
    return samples, found


class _ImplicitELBO:
    """What the three ELBOs share: estimators by site, trained when the guide is traced."""

    max_plate_nesting: int | float
    num_particles: int
    vectorize_particles: bool

    _advice = (
        "Write model and guide so that they broadcast over one more plate, or leave out "
        "vectorize_particles=True: num_particles=8, score_interval=8."
    )

    def __init__(
        self,
        score_estimator: EstimatorFactory = ARDAE,
        num_score_samples: int | None = None,
        num_score_updates: int = 1,
        num_particles: int = 1,
        *,
        num_score_contexts: int | None = None,
        score_interval: int = 1,
        max_plate_nesting: int | float = float("inf"),
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
        antithetic: bool = False,
    ) -> None:
        if not callable(score_estimator) or isinstance(score_estimator, torch.nn.Module):
            raise TypeError(
                "score_estimator: expected a callable (dim, context_dim) -> ScoreEstimator, such "
                "as ARDAE or functools.partial(ARDAE, hidden_dim=128): each site gets one of "
                f"its own; got an instance of {type(score_estimator).__name__}."
            )
        if num_score_samples is not None and not isinstance(num_score_samples, Integral):
            raise TypeError(
                f"num_score_samples: expected a number, got {type(num_score_samples).__name__}. As "
                f"the loss of SVI pass an instance, loss={type(self).__name__}()."
            )
        if num_score_samples is not None and num_score_samples < 2:
            raise ValueError(f"expected num_score_samples >= 2, got {num_score_samples}.")
        if num_score_contexts is not None and num_score_contexts < 1:
            raise ValueError(f"expected num_score_contexts >= 1, got {num_score_contexts}.")
        if num_score_updates < 0:
            raise ValueError(f"expected num_score_updates >= 0, got {num_score_updates}.")
        if score_interval < 1:
            raise ValueError(f"expected score_interval >= 1, got {score_interval}.")
        if antithetic and not (vectorize_particles and num_particles % 2 == 0):
            raise ValueError(
                "antithetic=True: expected an even num_particles and vectorize_particles=True, got "
                f"{num_particles} and {vectorize_particles}."
            )
        super().__init__(  # type: ignore[call-arg]
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        self._given_nesting = self.max_plate_nesting  # Pyro has counted the particles' plate
        self.antithetic = antithetic
        self.num_score_samples = num_score_samples
        self.num_score_contexts = num_score_contexts
        self.num_score_updates = num_score_updates
        self.score_interval = score_interval
        self._sites = Sites(score_estimator)
        self._guide: Any = None
        self._frozen = False
        self._learning, self._checked = False, True
        self._attached: list[Implicit] = []
        self._probed: set[str] = set()
        self._samplers: dict[str, torch.nn.Module] | None = None  # of the sites of a step of SVI
        self._checked_samplers: set[str] = set()
        self._warned = False

    # ---- what users call -------------------------------------------------------------------------

    @property
    def score_estimator(self) -> EstimatorFactory:
        """What makes the estimators."""
        return self._sites.score_estimator

    @property
    def estimators(self) -> dict[str, ScoreEstimator]:
        """The score estimators by site name; empty before the first step."""
        return {name: site.estimator for name, site in self._sites.met.items()}

    def diagnostics(self) -> dict[str, dict[str, float]]:
        r"""How well each implicit site's score was estimated in the last step in which draws of it
        were made (see ``score_interval``).

        - ``score_loss``: the estimator's own loss; a weak monitor.
        - ``stein``: :math:`-E[s(z)^\top (z - \bar z)] / D`, with standard error ``stein_error``,
          which a single draw does not have. It is 1 for the true score, and moves first when the
          estimate goes wrong. Necessary, not sufficient.
        - ``mean_score``: norm of the mean score over draws and contexts, 0 for the true score up to
          sampling error.
        - ``std``: standard deviation of the draws, averaged over contexts and dimensions.
        """
        return {name: site.diagnostics() for name, site in self._sites.met.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; loads with ``torch.load(…, weights_only=True)``."""
        return self._sites.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the estimators of ``state``; they are built when their sites are next sampled.

        :raises TypeError: for anything else than what :meth:`state_dict` has given.
        """
        self._sites.load_state_dict(state)
        self._forget()

    def reset(self) -> None:
        """Forget all estimators, so that another guide can be trained."""
        self._sites.clear()
        self._forget()

    def _forget(self) -> None:
        """Forgets the guide."""
        self._probed.clear()
        self._checked_samplers.clear()
        self._warned = False
        self._guide = None
        self.max_plate_nesting = self._given_nesting

    def __getstate__(self) -> dict[str, Any]:
        """A copy need not know the guide; one that is defined in a function cannot be pickled."""
        return {**self.__dict__, "_guide": None}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this context the score estimators answer, but do not learn."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    # ---- what Pyro calls -------------------------------------------------------------------------

    def __call__(self, model: torch.nn.Module, guide: torch.nn.Module) -> ELBOModule:
        return _ImplicitELBOModule(model, guide, self)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Train the score estimators, then differentiate the loss (the path of ``SVI.step``)."""
        with self._learn(), poutine.trace(param_only=True) as seen:
            self._samplers = {}
            try:
                loss = super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[misc]
                if math.isnan(loss) or (math.isinf(loss) and not _finite_gradients(seen.trace)):
                    raise ValueError(
                        f"the loss is {'NaN' if math.isnan(loss) else 'infinite'}. The step was "
                        "refused, model and guide are as before. "
                        "Check the data for NaN, the model's parameters for overflow, or lower "
                        "the learning rate."
                    )
                self._check(seen.trace)
                return loss
            except Exception:  # earlier particles have left their gradients
                pyro.infer.util.zero_grads(_parameters(seen.trace))
                raise
            finally:
                self._samplers = None

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor, for a loop of one's own; trains the score estimators first, unless
        gradients are off.
        """
        with self._learn() if torch.is_grad_enabled() else nullcontext():
            loss: Tensor = super().differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[misc]
            return loss

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        self._watch(guide)
        # Messenger.__call__, not functools.wraps: poutine.unwrap() finds a GuideMessenger under it.
        messenger = ScoreMessenger(self._attach, self._probed)
        scored = messenger(guide)

        def alone() -> None:
            with self.frozen():
                traces_of(partial(model, **kwargs), partial(scored, **kwargs), args)

        try:
            if self.antithetic:
                if self.max_plate_nesting == math.inf:
                    self._guess_max_plate_nesting(model, scored, args, kwargs)
                messenger.paired_dim = -int(self.max_plate_nesting)  # that of the particles
            vectorized = self.vectorize_particles and self.num_particles > 1
            in_plate = partial(advised, self.num_particles, alone, self._advice)
            of_pyro = super()._get_traces(model, scored, args, kwargs)  # type: ignore[misc]
            while True:
                with in_plate() if vectorized else nullcontext():
                    traces = next(of_pyro, None)
                if traces is None:
                    return
                if vectorized and not isinstance(self, TraceEnum_ELBO):  # which looks itself
                    refuse_dimensions(traces, int(self.max_plate_nesting), self._advice)
                yield traces
        finally:
            self._detach()

    def _detach(self) -> None:
        """A guide may keep its distributions: outside the ELBO they have no log_prob."""
        while self._attached:
            self._attached.pop().score = None

    def _restore(self, guide: Any, args: Any) -> None:
        """Build the estimators whose state was loaded, if they have not met their sites yet."""
        if self._sites.pending:
            with torch.no_grad(), self.frozen(), poutine.block():
                try:
                    ScoreMessenger(self._attach, self._probed)(guide)(*args)
                finally:
                    self._detach()

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        # A run that goes on has guessed before, so this must not shift its noise.
        resumed = fork_rng() if self._sites.pending else nullcontext()
        with self.frozen(), resumed:
            super()._guess_max_plate_nesting(model, guide, args, kwargs)  # type: ignore[misc]

    # ---- the score -------------------------------------------------------------------------------

    @contextmanager
    def _learn(self, *, checked: bool = True) -> Iterator[None]:
        """Learns within; where it is not ``checked``, draws are taken for finite, by which a GPU is
        not waited for.
        """
        before = self._learning, self._checked
        self._learning, self._checked = True, checked
        try:
            yield
        finally:
            self._learning, self._checked = before

    def _watch(self, guide: Any) -> None:
        if not self._learning:
            return
        guide = poutine.unwrap(guide)
        while isinstance(guide, partial):
            guide = poutine.unwrap(guide.func)
        guide = (getattr(guide, "__self__", None), getattr(guide, "__func__", guide))
        if self._guide is None:
            self._guide = guide
        elif self._guide != guide and self._sites.met:
            warnings.warn(
                f"{type(self).__name__} was trained on another guide, and its score estimators "
                "describe that one. Use one loss object per guide, or call reset().",
                stacklevel=2,
            )
            self._guide = guide

    def _attach(self, name: str, fn: Implicit, value: Tensor) -> None:
        """Give ``fn`` its score: draw from it, let the site's estimator learn, and bind it."""
        source = fn.distinct()
        context = None if source.context is None else source.context.detach()
        site = self._sites.meet(name, fn, value)
        if self._samplers is not None and isinstance(fn.sampler, torch.nn.Module):
            self._samplers[name] = fn.sampler

        learning = self._learning and not self._frozen
        if learning and self.num_particles == 1 and fn.batch_shape.numel() == 1:
            self._warn_of_one_draw(name)
        learns = learning and site.runs % self.score_interval == 0
        draws = learns or site.estimator.needs_samples
        count = self._num_draws(source.batch_shape.numel()) if draws else 0
        draw = partial(_draw, name, source, count, checked=self._checked)
        samples, center = draw(center=site.estimator.needs_center)
        for update in range(self.num_score_updates if learns else 0):
            if update:
                samples, _ = draw(center=False)
            site.num_draws = count
            site.learn(*self._some((samples, context, center), source.batch_shape))
        site.runs += learning

        def score(of: Implicit, at: Tensor) -> Tensor:
            shape = at.shape  # a transform may give the site's value another one
            at = of.flat(at)
            batch = samples.shape[1:]
            with torch.no_grad():
                at = at.reshape((-1, *batch))
                result = site.score(at, samples, context, center)
            if draws:
                site.last = (result, at, samples)
            return result.reshape(shape)

        fn.score = score
        self._attached.append(fn)

    def _check(self, trace: poutine.Trace) -> None:
        """Warns, once each, of samplers that SVI does not train and of states without a site."""
        samplers = self._samplers or {}
        for name in samplers.keys() - self._checked_samplers:
            self._checked_samplers.add(name)
            check_trained(name, samplers[name], _parameters(trace))
        self._sites.check_pending()

    def _warn_of_one_draw(self, name: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"implicit site '{name}': a step has one draw of it. A network's gradient by one "
                "is so noisy that posteriors come out too wide, several times for some. Take "
                "num_particles=16, vectorize_particles=True; where model or guide do not broadcast "
                "over one more plate, num_particles=8, score_interval=8.",
                stacklevel=2,
            )

    def _some(
        self, tensors: tuple[Tensor, Tensor | None, Tensor | None], batch: torch.Size
    ) -> tuple[Any, ...]:
        """Draws ``[S, *batch, D]``, context ``[*batch, C]`` and center ``[*batch, D]`` of
        ``num_score_contexts`` random contexts, if there are more.
        """
        count, wanted = batch.numel(), self.num_score_contexts
        if wanted is None or count <= wanted:
            return tensors
        samples, *others = tensors
        chosen = torch.randperm(count, device=samples.device)[:wanted]
        samples = samples.reshape(len(samples), count, -1).index_select(1, chosen)
        rows = (None if x is None else x.reshape(count, -1)[chosen] for x in others)
        return (samples, *rows)

    def _num_draws(self, contexts: int) -> int:
        """Draws per context by which the score is learned in a step."""
        return self.num_score_samples or max(16, 2048 // max(1, contexts))


class _ImplicitELBOModule(ELBOModule):
    """Loss of a fixed model and guide; trains the score estimators in train mode.

    Its parameters are the model's and the guide's; estimators travel as extra state.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with nullcontext() if self.training else self.elbo.frozen():
            return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        return self.elbo.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.elbo.load_state_dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for estimator in self.elbo.estimators.values():
            estimator._apply(fn)
        return super()._apply(fn, recurse)


class TraceImplicit_ELBO(_ImplicitELBO, Trace_ELBO):
    """:class:`pyro.infer.Trace_ELBO` for guides with implicit sites: swap it in.

    Example::

        >>> svi = pyro.infer.SVI(model, guide, optim, loss=TraceImplicit_ELBO())  # doctest: +SKIP

    Guides without implicit sites train as with Pyro's own loss. The value of the loss lacks the
    entropies of the implicit sites: it is **no bound**, can't be compared between guides, and can
    fall while a guide collapses; log it as "loss", never as ELBO.

    :param score_estimator: ``(dim, context_dim) -> ScoreEstimator``, called once per implicit site.
    :param num_score_samples: draws per context and step by which the score is learned, >= 2. By
        default 2048 over the number of contexts, but at least 16.
    :param num_score_updates: calls of ``estimator.update`` per run of the guide, each on fresh
        draws; 0 for an estimator that is trained elsewhere. A step runs the guide once, or for each
        particle where particles are not vectorized.
    :param num_particles: draws of the guide per step, as in Pyro.
    :param num_score_contexts: contexts per update of the estimator, a random subset of those of the
        step; all by default. Fewer make an update cheaper, and bound its memory for large plates;
        the sampler is run for all of them.
    :param score_interval: runs of the guide to one in which the estimators learn, the first of
        them; an estimator whose queries need no draws has none made in the others. The guide moves
        little from one step to the next.
    :param max_plate_nesting: as in Pyro.
    :param vectorize_particles: as in Pyro.
    :param strict_enumeration_warning: as in Pyro.
    :param retain_graph: as in Pyro.
    :param antithetic: draw the particles in pairs, whose implicit sites have opposite noise. Each
        particle has the law of the guide, so the gradient's expectation is the same, and the part
        of its noise that is odd in theirs cancels: most of that of a location, and what tips a
        guide from one mode into another. Takes ``vectorize_particles``, an even ``num_particles``
        and normal noise.
    :raises TypeError: if ``score_estimator`` is not callable, or returns no estimator in a step.
    :raises ValueError: for counts out of range, and an odd or not vectorized number of antithetic
        particles; in a step, for non-finite draws of a site, a loss that is not finite, a second
        guide whose sites have other sizes, a site that is not reparameterized before an implicit
        one, and a model that does not broadcast over vectorized particles.
    :raises RuntimeError: in a step, for what torch or Pyro fails at with vectorized particles, with
        the remedy.
    :warns UserWarning: once, where a step has a single draw of a site, where a second guide has the
        same sites, and for each site whose sampler reads what its context lacks.

    Reference: Lim, Courville, Pal, Huang, "AR-DAE: Towards Unbiased Neural Entropy Gradient
    Estimation", ICML 2020, eq. 3 (entropy gradient) and eq. 8 (score estimate).
    """


class TraceImplicitMeanField_ELBO(_ImplicitELBO, TraceMeanField_ELBO):
    """:class:`pyro.infer.TraceMeanField_ELBO` for guides with implicit sites.

    Explicit sites get their closed-form KL terms, implicit ones the estimated score. Parameters,
    errors and the meaning of the loss are those of :class:`TraceImplicit_ELBO`.
    """


class TraceImplicitEnum_ELBO(_ImplicitELBO, TraceEnum_ELBO):
    """:class:`pyro.infer.TraceEnum_ELBO` for guides with implicit sites.

    Enumerated discrete sites of the model are summed out. Parameters, errors and the meaning of the
    loss are those of :class:`TraceImplicit_ELBO`.
    """
