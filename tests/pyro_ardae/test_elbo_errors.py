# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""One row per error: its type, and the words that tell what to do."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    Importance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_ardae import (
    ARDAE,
    Implicit,
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
    elbo_estimate,
)
from pyro_ardae.score import DAE, PaperARDAE

SMALL = partial(ARDAE, hidden_dim=8, depth=1)
ROWS, DIM = 4, 2


def model(dim: int = DIM, rows: int = ROWS) -> None:
    with pyro.plate("rows", rows):
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def guide(
    dim: int = DIM,
    rows: int = ROWS,
    width: int = 3,
    spoil: Callable[[Tensor], Tensor] | None = None,
) -> None:
    weight = pyro.param("weight", torch.full((width, dim), 0.1))
    scale = pyro.param("scale", torch.ones(dim))
    context = torch.linspace(-1, 1, rows * width).reshape(rows, width)

    def sampler(eps: Tensor, c: Tensor) -> Tensor:
        z = c @ weight + scale * eps
        return z if spoil is None else spoil(z)

    with pyro.plate("rows", rows):
        pyro.sample("z", Implicit(sampler, dim, context))


def other_guide(dim: int = DIM, rows: int = ROWS, width: int = 3) -> None:
    guide(dim, rows, width)


def optimizer() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 1e-2})


# ---- gradients that need log q -------------------------------------------------------------------


class Partly(dist.Rejector):
    """Reparameterized in part, as laws that are drawn by rejection: has_rsample, and a score."""

    def __init__(self, alpha: Tensor) -> None:
        self.shape = alpha
        proposal = dist.Gamma(alpha, 1.0)
        super().__init__(proposal, lambda x: -x, torch.tensor(-1.0))

    def log_prob(self, x: Tensor) -> Tensor:
        return dist.Gamma(self.shape, 2.0).log_prob(x)


def test_a_site_that_is_reparameterized_in_part_is_refused_before_an_implicit_one() -> None:
    def partly() -> None:
        a = pyro.sample("a", Partly(pyro.param("alpha", torch.tensor(2.0))))
        pyro.sample("z", Implicit(lambda e, c: e + c, 1, a.reshape(1), (1,)))

    def joint() -> None:
        pyro.sample("a", dist.Gamma(2.0, 2.0))
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(ValueError, match="'a' before it, which is not reparameterized"):
        SVI(joint, partly, optimizer(), TraceImplicit_ELBO(SMALL)).step()
    with pytest.raises(TypeError, match="expected reparameterized noise, got Partly"):
        Implicit(lambda e: e, Partly(torch.tensor(2.0)))


def test_an_infinite_loss_without_a_gradient_is_refused() -> None:
    def infinite() -> None:
        model()
        z = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("f", (z - z).abs().log())

    def shaped() -> None:
        guide()
        at = pyro.param("at", torch.zeros(()))
        pyro.sample("w", Implicit(lambda e: (e + at).squeeze(-1), 1, None, ()))

    svi = SVI(infinite, shaped, optimizer(), TraceImplicit_ELBO(SMALL))
    with pytest.raises(ValueError, match=r"the loss is infinite\. The step was refused"):
        svi.step()
    assert math.isfinite(pyro.param("at").item())


def test_an_infinite_loss_with_a_gradient_is_taken() -> None:
    def infinite() -> None:
        model()
        pyro.sample("x", dist.Uniform(0.0, 1.0, validate_args=False), obs=torch.tensor(2.0))

    svi = SVI(infinite, guide, optimizer(), TraceImplicit_ELBO(SMALL))
    assert svi.step() == math.inf
    assert bool(torch.isfinite(pyro.param("weight")).all())


# ---- what a session does in between --------------------------------------------------------------


def test_an_evaluation_in_inference_mode_may_come_first() -> None:
    guide()  # makes the parameters, which belong to training
    svi = SVI(model, guide, optimizer(), TraceImplicit_ELBO(SMALL))
    with torch.inference_mode():
        svi.evaluate_loss()
    assert math.isfinite(svi.step())


def test_the_estimator_follows_a_guide_to_another_dtype() -> None:
    kind = torch.float32

    def typed() -> None:
        scale = pyro.param("scale", torch.ones(DIM)).to(kind)
        noise = dist.Normal(torch.zeros(DIM, dtype=kind), 1.0).to_event(1)
        with pyro.plate("rows", ROWS):
            pyro.sample("z", Implicit(lambda e: scale * e, noise))

    loss = TraceImplicit_ELBO(SMALL)
    svi = SVI(model, typed, optimizer(), loss)
    for kind in (torch.float32, torch.float64, torch.float32):
        assert math.isfinite(svi.step())
        assert loss.estimators["z"].weights.dtype == kind


def test_evaluating_a_copy_of_the_guide_warns_of_nothing() -> None:
    loss = TraceImplicit_ELBO(SMALL)
    svi = SVI(model, guide, optimizer(), loss)
    svi.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            loss.loss(model, other_guide)
        svi.step()


def test_a_factory_that_makes_no_estimator() -> None:
    loss = TraceImplicit_ELBO(lambda dim, width: torch.nn.Linear(dim, dim))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"returns a ScoreEstimator.*got a Linear"):
        SVI(model, guide, optimizer(), loss).step()


def test_an_event_shape_is_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"event_shape.*Pass \(2,\)"):
        Implicit(lambda e: e, 2, event_shape=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("enumerate", [None, "parallel"])
def test_a_site_that_is_not_reparameterized(enumerate: str | None) -> None:
    """Its gradient takes the entropies of what follows, which an implicit site does not have."""

    def model() -> None:
        y = pyro.sample("y", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Normal(y.unsqueeze(-1), 1.0).to_event(1))

    net = torch.nn.Linear(1, 1)

    def guide(first: bool) -> None:
        pyro.module("net", net)
        logit, infer = pyro.param("logit", torch.zeros(())), {"enumerate": enumerate}
        if first:
            pyro.sample("y", dist.Bernoulli(logits=logit), infer=infer)
        pyro.sample("z", Implicit(net, 1))
        if not first:
            pyro.sample("y", dist.Bernoulli(logits=logit), infer=infer)

    elbo = TraceImplicitEnum_ELBO(SMALL, max_plate_nesting=0, strict_enumeration_warning=False)
    with pytest.raises(ValueError, match=r"'z': the guide samples 'y' before it.*sum it out"):
        elbo.loss_and_grads(lambda _: model(), guide, True)
    with torch.no_grad():
        assert math.isfinite(elbo.loss(lambda _: model(), guide, True))
    assert math.isfinite(elbo.loss_and_grads(lambda _: model(), guide, False))
    # A guide that is run several times in a step has not sampled it before either.
    elbo = TraceImplicitEnum_ELBO(SMALL, num_particles=2, strict_enumeration_warning=False)
    assert math.isfinite(elbo.loss_and_grads(lambda _: model(), guide, False))


# ---- losses that need log q ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        RenyiELBO(num_particles=2),
        ReweightedWakeSleep(num_particles=2, insomnia=0.0, model_has_params=False),
    ],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("call", ["loss_and_grads", "loss"])
def test_losses_that_need_the_density(loss: Any, call: str) -> None:
    with pytest.raises(NotImplementedError, match=r"no density.*loss=TraceImplicit_ELBO\(\)"):
        getattr(loss, call)(model, guide)


def test_importance_sampling_needs_the_density() -> None:
    with pytest.raises(NotImplementedError, match=r"no density.*Importance"):
        Importance(model, guide, num_samples=2).run()


def test_psis_diagnostic_needs_the_density() -> None:
    with pytest.raises(NotImplementedError, match="no density"):
        pyro.infer.importance.psis_diagnostic(model, guide, num_particles=4)


# ---- the table -----------------------------------------------------------------------------------

EPS = torch.zeros(5, 3)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sampler": (lambda: Implicit(3, 2), TypeError, "`sampler` to be a callable.*got int"),
    "noise of size 0": (lambda: Implicit(lambda e: e, 0), ValueError, "size >= 1, got 0"),
    "noise of a wrong type": (
        lambda: Implicit(lambda e: e, 2.5),
        TypeError,
        "int or a reparam.*float",
    ),
    "noise that is a flag": (
        lambda: Implicit(lambda e: e, True),
        TypeError,
        "int or a reparam.*bool",
    ),
    "noise without rsample": (
        lambda: Implicit(lambda e: e, dist.Poisson(torch.ones(2)).to_event(1)),
        TypeError,
        "reparameterized noise",
    ),
    "context that is a list": (
        lambda: Implicit(lambda e, c: e, 2, [1.0]),
        ValueError,
        "tensor.*got list.*Concatenate",
    ),
    "context that is a scalar": (
        lambda: Implicit(lambda e, c: e, 2, torch.tensor(1.0)),
        ValueError,
        "got a scalar tensor",
    ),
    "noise and context do not broadcast": (
        lambda: Implicit(lambda e, c: e, dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), EPS),
        ValueError,
        r"\(4,\) of the noise does not broadcast with \(5,\)",
    ),
    "sampler returns another event shape": (
        lambda: Implicit(lambda e, c: e, 2, EPS, (3,)).rsample(),
        ValueError,
        r"return shape \(5, 3\).*got \(5, 2\).*event_shape",
    ),
    "sampler returns another batch shape": (
        lambda: Implicit(lambda e, c: e[0], 2, EPS).rsample((6,)),
        ValueError,
        r"\(6, 5, 2\).*got \(5, 2\)",
    ),
    "density": (
        lambda: Implicit(lambda e: e, 2).log_prob(torch.zeros(2)),
        NotImplementedError,
        "TraceImplicit_ELBO",
    ),
    "entropy": (lambda: Implicit(lambda e: e, 2).entropy(), NotImplementedError, "entropy"),
    "a sampler's tuple": (
        lambda: Implicit(lambda e: (e, 1), 2).rsample(),
        TypeError,
        "expected the sampler to return a tensor, got a tuple",
    ),
    "a sampler of another dtype": (
        lambda: Implicit(lambda e: torch.nn.Linear(2, 2).double()(e), 2).rsample(),
        RuntimeError,
        r"The noise is torch.float32; pass.*dtype",
    ),
    "a sampler that raises": (
        lambda: Implicit(lambda e: [].index(1), 2).rsample(),
        ValueError,
        r"sampler\(noise \(2,\)\) failed",
    ),
    "the class as a loss": (
        lambda: SVI(model, guide, optimizer(), TraceImplicit_ELBO).step(),
        TypeError,
        r"pass an instance, loss=TraceImplicit_ELBO\(\)",
    ),
    "a state that is a list": (
        lambda: TraceImplicit_ELBO().load_state_dict([1]),  # type: ignore[arg-type]
        TypeError,
        "list",
    ),
    "the state of something else": (
        lambda: TraceImplicit_ELBO().load_state_dict(torch.nn.Linear(1, 1).state_dict()),
        TypeError,
        "state_dict.*an entry 'weight' that is no state.*Tensor",
    ),
    "estimator that is no callable": (
        lambda: TraceImplicit_ELBO("ardae"),
        TypeError,
        r"callable \(dim, context_dim\).*got an instance of str",
    ),
    "estimator in place of a factory": (
        lambda: TraceImplicit_ELBO(ARDAE(DIM, 3)),
        TypeError,
        r"each site gets one of its own; got an instance of ARDAE",
    ),
    "too few draws": (
        lambda: TraceImplicit_ELBO(num_score_samples=1),
        ValueError,
        "num_score_samples >= 2, got 1",
    ),
    "no contexts": (
        lambda: TraceImplicit_ELBO(num_score_contexts=0),
        ValueError,
        "num_score_contexts >= 1, got 0",
    ),
    "no interval": (
        lambda: TraceImplicit_ELBO(score_interval=0),
        ValueError,
        "score_interval >= 1, got 0",
    ),
    "negative updates": (
        lambda: TraceImplicit_ELBO(num_score_updates=-1),
        ValueError,
        "num_score_updates >= 0, got -1",
    ),
    "dim": (lambda: ARDAE(0), ValueError, "ARDAE: expected dim >= 1"),
    "context_dim": (lambda: ARDAE(2, -1), ValueError, "context_dim >= 0"),
    "delta 0": (lambda: ARDAE(2, delta=0.0), ValueError, r"delta in \(0, 1\], got 0"),
    "delta 2": (lambda: ARDAE(2, delta=2.0), ValueError, r"delta in \(0, 1\], got 2"),
    "hidden_dim": (lambda: ARDAE(2, hidden_dim=0), ValueError, "hidden_dim >= 1, got 0"),
    "depth": (lambda: ARDAE(2, depth=0), ValueError, "depth >= 1, got 0"),
    "learning_rate": (lambda: ARDAE(2, learning_rate=0.0), ValueError, "learning_rate > 0"),
    "whitening": (lambda: ARDAE(2, whitening="zca"), ValueError, "'pooled', 'centered'.*'zca'"),
    "parametrization": (
        lambda: ARDAE(2, parametrization="flow"),
        ValueError,
        "'residual' or 'energy', got 'flow'",
    ),
    "samples of another dim": (
        lambda: ARDAE(2).update(torch.randn(8, 3)),
        ValueError,
        r"\[S, \*batch, 2\], got \(8, 3\)",
    ),
    "context of another width": (
        lambda: ARDAE(2, 4).update(torch.randn(8, 5, 2), EPS),
        ValueError,
        r"\[\*batch, 4\], got \(5, 3\)",
    ),
    "context of another batch shape": (
        lambda: ARDAE(2, 3).update(torch.randn(8, 6, 2), EPS),
        ValueError,
        r"batch shape \(6,\).*got \(5, 3\)",
    ),
    "context missing": (
        lambda: ARDAE(2, 3).update(torch.randn(8, 5, 2)),
        ValueError,
        "got none",
    ),
    "value of another shape": (
        lambda: ARDAE(2, 3)(torch.randn(1, 4, 2), torch.randn(8, 5, 2), EPS),
        ValueError,
        r"\(5, 2\).*got \(1, 4, 2\)",
    ),
    "dae sigma": (lambda: DAE(2, sigma=0.0), ValueError, "0 < sigma <= sigma_start"),
    "dae anneals upwards": (
        lambda: DAE(2, sigma=0.5, sigma_start=0.1),
        ValueError,
        "sigma_start=0.1",
    ),
    "paper's input scale": (
        lambda: PaperARDAE(2, input_scale=0.0),
        ValueError,
        "input_scale and delta > 0",
    ),
    "paper's parametrization": (
        lambda: PaperARDAE(2, parametrization="x"),
        ValueError,
        "'energy' or 'res",
    ),
    "paper without center": (
        lambda: PaperARDAE(2).update(torch.randn(8, 2)),
        ValueError,
        "expected center",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_error(row: str) -> None:
    call, error, words = ERRORS[row]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


# ---- one loss object, one guide ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 5}, "event of size 2 and a context of size 3, got 2 and 5"),
        ({"dim": 4}, "event of size 2 and a context of size 3, got 4 and 3"),
    ],
)
def test_other_sizes_need_another_loss_object(arguments: dict[str, int], words: str) -> None:
    elbo = TraceImplicit_ELBO(SMALL)
    elbo.loss_and_grads(model, guide)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=rf"site 'z'.*{words}.*Use one loss object per guide"):
        elbo.loss_and_grads(model, guide, **{"dim": DIM, "rows": ROWS, **arguments})
    elbo.reset()
    pyro.clear_param_store()
    wide = partial(model, arguments.get("dim", DIM))
    elbo.loss_and_grads(wide, partial(guide, **arguments))


def test_state_of_other_sizes() -> None:
    elbo, fresh = TraceImplicit_ELBO(SMALL), TraceImplicit_ELBO(SMALL)
    elbo.loss_and_grads(model, guide)
    pyro.clear_param_store()
    fresh.load_state_dict(elbo.state_dict())
    with pytest.raises(ValueError, match="context of size 3, got 2 and 5"):
        fresh.loss_and_grads(model, partial(guide, width=5))


def test_another_guide_of_the_same_sizes_warns_once() -> None:
    elbo = TraceImplicit_ELBO(SMALL)
    elbo.loss_and_grads(model, guide)
    with pytest.warns(UserWarning, match="trained on another guide.*reset"):
        elbo.loss_and_grads(model, other_guide)
    elbo.loss_and_grads(model, other_guide)  # any further warning is an error
    elbo.reset()
    elbo.loss_and_grads(model, guide)


def test_a_guide_with_bound_arguments_is_the_same_guide() -> None:
    elbo = TraceImplicit_ELBO(SMALL)
    for _ in range(2):
        elbo.loss_and_grads(model, partial(guide, width=3))  # a new object; a warning is an error


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_loss_does_not_know_the_guide(copied: Callable[[Any], Any]) -> None:
    def nested() -> None:  # cannot be pickled
        guide()

    elbo = TraceImplicit_ELBO(SMALL)
    elbo.loss_and_grads(model, nested)
    other = copied(elbo)
    for value, expected in zip(snapshot(other), snapshot(elbo), strict=True):
        assert torch.equal(value, expected)
    other.loss_and_grads(model, guide)  # any warning is an error


def test_one_draw_in_a_step_is_warned_of_once() -> None:
    elbo = TraceImplicit_ELBO(SMALL)
    with pytest.warns(UserWarning, match="a step has one draw of it.*num_particles=16, vector"):
        elbo.loss_and_grads(one_model, one_guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss_and_grads(one_model, one_guide)
        TraceImplicit_ELBO(SMALL, num_particles=2).loss_and_grads(one_model, one_guide)
        with torch.no_grad():
            TraceImplicit_ELBO(SMALL).loss(one_model, one_guide)
        pyro.clear_param_store()
        TraceImplicit_ELBO(SMALL).loss_and_grads(model, guide)  # of as many draws as rows


def one_model(x: Tensor | None = None) -> None:
    """Its mean does not broadcast as it should: a plate of draws is there twice."""
    w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
    if x is not None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w.mT).squeeze(-1), 1.0), obs=torch.zeros(len(x)))


def one_guide(x: Tensor | None = None) -> None:
    scale = pyro.param("scale", torch.ones(1, 3))
    pyro.sample("w", Implicit(lambda eps: eps.unflatten(-1, (1, 3)) * scale, 3, None, (1, 3)))


@pytest.mark.parametrize("kind", [TraceImplicit_ELBO, TraceImplicitMeanField_ELBO])
def test_what_does_not_broadcast_over_particles_is_refused(kind: Any) -> None:
    """The loss would count each observation as often as there are particles. With enumeration,
    Pyro looks itself.
    """
    x = torch.randn(5, 3)
    elbo = kind(SMALL, num_particles=4, vectorize_particles=True)
    words = r"site 'y': expected 2 dimensions.*shape \(4, 4, 5\).*num_particles=8"
    with pytest.raises(ValueError, match=words):
        elbo.loss_and_grads(one_model, one_guide, x)
    for parameter in pyro.get_param_store()._params.values():
        assert parameter.grad is None or not bool(parameter.grad.any())
    kind(SMALL, num_particles=4).loss_and_grads(one_model, one_guide, x)


@pytest.mark.parametrize("kind", [TraceImplicit_ELBO, TraceImplicitEnum_ELBO])
def test_what_fails_over_particles_says_what_to_do(kind: Any) -> None:
    """A layer whose weight is random takes no plate of them: what torch says of it is no help."""

    def linear(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            mean = torch.nn.functional.linear(x, w).squeeze(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(len(x)))

    x, options = torch.randn(5, 3), {"num_particles": 4, "max_plate_nesting": 1}
    elbo = kind(SMALL, vectorize_particles=True, strict_enumeration_warning=False, **options)
    with pytest.raises(RuntimeError, match=r"plate of 4 draws.*num_particles=8, score_interval=8"):
        elbo.loss_and_grads(linear, one_guide, x)
    elbo = kind(SMALL, strict_enumeration_warning=False, **options)
    elbo.loss_and_grads(linear, one_guide, x)


@pytest.mark.parametrize("nesting", [math.inf, 1])
def test_what_fails_without_a_plate_too_is_not_the_plates_fault(nesting: float) -> None:
    def failing(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        raise RuntimeError("the user's own")

    elbo = TraceImplicit_ELBO(
        SMALL, num_particles=4, vectorize_particles=True, max_plate_nesting=nesting
    )
    with pytest.raises(RuntimeError, match=r"^the user's own"):
        elbo.loss_and_grads(failing, one_guide, torch.randn(5, 3))


# ---- what trains nothing -------------------------------------------------------------------------


def test_a_sampler_that_svi_does_not_train_is_warned_of_once() -> None:
    net = torch.nn.Linear(2, 2)

    def prior() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def bare() -> None:
        pyro.sample("z", Implicit(net, 2, event_shape=(2,)))

    def registered() -> None:
        pyro.module("net", net)
        bare()

    def svi(one: Any) -> SVI:
        return SVI(prior, one, optimizer(), TraceImplicit_ELBO(SMALL, num_particles=2))

    untrained = svi(bare)
    with pytest.warns(UserWarning, match=r"site 'z'.*SVI does not train.*pyro\.module"):
        untrained.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untrained.step()
        svi(registered).step()
        net.requires_grad_(False)  # which is meant
        svi(bare).step()


def test_parameters_of_modules_alone() -> None:
    """Under Pyro's setting that modules keep their own, they are not in its store."""

    class OfModule(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.ones(DIM), dist.constraints.positive)

        def forward(self) -> None:
            scale = self.scale
            with pyro.plate("rows", ROWS):
                pyro.sample("z", Implicit(lambda e: scale * e, DIM))

    with pyro.settings.context(module_local_params=True):
        one = OfModule()
        TraceImplicit_ELBO(SMALL).loss_and_grads(model, one)
    assert one.scale_unconstrained.grad is not None


def test_no_warning_of_what_an_evaluation_has_met() -> None:
    net = torch.nn.Linear(DIM, DIM)

    def bare() -> None:
        with pyro.plate("rows", ROWS):
            pyro.sample("z", Implicit(net, DIM))

    loss = TraceImplicit_ELBO(SMALL)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        loss.loss(model, bare)
    net = torch.nn.Linear(DIM, DIM)
    pyro.module("net", net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.loss_and_grads(model, lambda: (pyro.module("net", net), bare()))


def test_state_of_sites_that_the_guide_has_not_is_warned_of_once() -> None:
    loss = TraceImplicit_ELBO(SMALL)
    svi = SVI(model, guide, optimizer(), loss)
    svi.step()
    state = loss.state_dict()
    loss.load_state_dict({"renamed": state["z"]})
    with pytest.warns(UserWarning, match="has not sampled so far: 'renamed'"):
        svi.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step()


# ---- non-finite draws ----------------------------------------------------------------------------


class Spoiler:
    """Let the sampler return NaN or infinity from its n-th call on, until told otherwise."""

    def __init__(self, value: float) -> None:
        self.value, self.calls, self.first = value, 0, float("inf")

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z * self.value if self.calls >= self.first else z


def snapshot(elbo: TraceImplicit_ELBO) -> list[Tensor]:
    state = [p.detach().clone() for p in pyro.get_param_store()._params.values()]
    for estimator in elbo.estimators.values():
        state += [p.detach().clone() for p in estimator.state_dict().values() if torch.is_tensor(p)]
    return state


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("elbo_class", [TraceImplicit_ELBO, TraceImplicitEnum_ELBO])
def test_non_finite_draws_are_refused(value: float, elbo_class: Any) -> None:
    spoiler = Spoiler(value)
    elbo = elbo_class(SMALL, strict_enumeration_warning=False, max_plate_nesting=1)
    svi = SVI(model, partial(guide, spoil=spoiler), optimizer(), loss=elbo)
    for _ in range(3):
        svi.step()
    before = snapshot(elbo)
    spoiler.first = spoiler.calls + 1
    with pytest.raises(ValueError, match=r"site 'z'.*non-finite.*no parameter changed"):
        svi.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(elbo), strict=True))
    spoiler.first = float("inf")
    svi.step()
    assert all(bool(torch.isfinite(p).all()) for p in snapshot(elbo))


def test_a_particle_whose_model_fails_leaves_no_gradient_of_earlier_ones() -> None:
    """As a Cholesky decomposition does, with a RuntimeError."""
    runs = 0

    def failing() -> None:
        nonlocal runs
        runs += 1
        if runs == 2:
            torch.linalg.cholesky(-torch.eye(2))
        model()

    elbo = TraceImplicit_ELBO(SMALL, num_particles=2, max_plate_nesting=1)
    with pytest.raises(RuntimeError, match="cholesky"):
        elbo.loss_and_grads(failing, guide)
    for parameter in pyro.get_param_store()._params.values():
        assert parameter.grad is None or not bool(parameter.grad.any())


def test_refused_particle_leaves_no_gradient_of_earlier_ones() -> None:
    """Two particles in turn: the first has run its backward pass when the second is refused."""
    spoiler = Spoiler(float("nan"))
    elbo = TraceImplicit_ELBO(SMALL, num_particles=2)
    svi = SVI(model, partial(guide, spoil=spoiler), optimizer(), loss=elbo)
    svi.step()
    calls = spoiler.calls
    svi.step()
    per_step = spoiler.calls - calls
    before = [p.detach().clone() for p in pyro.get_param_store()._params.values()]
    spoiler.first = spoiler.calls + per_step // 2 + 1
    with pytest.raises(ValueError, match="site 'z'"):
        svi.step()
    for old, new in zip(before, pyro.get_param_store()._params.values(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None or not bool(new.grad.any())


# ---- full whitening needs draws ------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 18])
def test_full_whitening_of_few_draws_falls_back_with_one_warning(count: int) -> None:
    """18 draws in 4 folds: 12 are left to whiten a fold, 16 to answer; the rule is one for both."""
    full = TraceImplicit_ELBO(partial(SMALL, whitening="full"), num_score_samples=count)
    diagonal = TraceImplicit_ELBO(partial(SMALL, whitening="diagonal"), num_score_samples=count)
    results = []
    for elbo in (full, diagonal):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(partial(model, 7), partial(guide, 7), optimizer(), loss=elbo)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                svi.step()
        results.append(pyro.param("scale").detach().clone())
        expected = 1 if elbo is full else 0
        assert len([w for w in caught if "whitening" in str(w.message)]) == expected
        assert len(caught) == expected
    assert torch.equal(*results)


def test_no_warning_of_one_draw_where_there_are_more_or_nothing_learns() -> None:
    """Any warning is an error."""

    def guide() -> None:
        with pyro.plate("rows", 5):
            pyro.sample("z", Implicit(lambda eps: eps * pyro.param("s", torch.ones(2)), 2))

    def model() -> None:
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    TraceImplicit_ELBO(SMALL).loss_and_grads(model, guide)
    elbo_estimate(one_model, one_guide, num_samples=2, num_updates=2, parallel=False)
