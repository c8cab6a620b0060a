# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What a loss object keeps between steps, and that a resumed run cannot be told from another."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_ardae import ARDAE, Implicit, TraceImplicit_ELBO
from pyro_ardae.score import DAE, PaperARDAE, ScoreEstimator, SlicedScore
from pyro_ardae.score.whitening import Mode
from tests.conftest import assert_equal

ROWS, DIM, WIDTH = 5, 2, 3
FACTORIES: dict[str, Callable[[int, int], ScoreEstimator]] = {
    "ardae": partial(ARDAE, hidden_dim=8, depth=2),
    "ardae energy": partial(ARDAE, hidden_dim=8, depth=2, parametrization="energy"),
    "ardae full": partial(ARDAE, hidden_dim=8, depth=2, whitening="full"),
    "dae": partial(DAE, hidden_dim=8, depth=2, sigma_start=0.5, anneal_updates=8),
    "paper": partial(PaperARDAE, hidden_dim=8, depth=2),
}
X = torch.linspace(-1, 1, ROWS * DIM).reshape(ROWS, DIM)
Y = torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)


class Model(PyroModule):
    def forward(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        with pyro.plate("rows", ROWS, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(g, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[index])


class Guide(PyroModule):
    """A site without context and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.full((DIM,), 0.1))
        self.scale = PyroParam(torch.ones(DIM))
        self.linear = PyroModule[nn.Linear](WIDTH + DIM, DIM)
        with torch.no_grad():
            for p in self.linear.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).reshape(p.shape))

    def forward(self, x: Tensor) -> None:
        loc, scale, linear = self.loc, self.scale, self.linear
        pyro.sample("g", Implicit(lambda eps: loc + scale * eps, DIM))
        with pyro.plate("rows", ROWS, subsample_size=3) as index:
            q = Implicit(lambda e, c: linear(torch.cat([e, c], -1)), DIM, Y[index])
            pyro.sample("z", q)


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 1e-2})


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copy(state: Any) -> Any:
    return through_a_file(state)


# ---- saving and resuming -------------------------------------------------------------------------


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("file", [True, False])
def test_resumed_run_is_the_uninterrupted_one(factory: str, file: bool) -> None:
    """Parameters + optimizer + loss object + random state: bit for bit."""
    model, guide = Model(), Guide()
    elbo, optim = TraceImplicit_ELBO(FACTORIES[factory]), adam()
    svi = SVI(model, guide, optim, loss=elbo)
    for _ in range(4):
        svi.step(X)
    saved = {
        "guide": guide.state_dict(),
        "optim": optim.get_state(),
        "elbo": elbo.state_dict(),
        "rng": torch.get_rng_state(),
    }
    in_memory = copy({k: saved[k] for k in ("guide", "optim", "rng")})
    restored = through_a_file(saved) if file else {**in_memory, "elbo": saved["elbo"]}

    elbo_2 = TraceImplicit_ELBO(FACTORIES[factory])
    elbo_2.load_state_dict(
        restored["elbo"]
    )  # built later, and untouched by what the first run does
    losses = [svi.step(X) for _ in range(4)]
    final = copy({"guide": guide.state_dict(), "elbo": elbo.state_dict()})

    pyro.clear_param_store()
    guide_2, optim_2 = Guide(), adam()
    guide_2.load_state_dict(restored["guide"])
    optim_2.set_state(restored["optim"])
    svi_2 = SVI(model, guide_2, optim_2, loss=elbo_2)
    torch.set_rng_state(restored["rng"])
    assert [svi_2.step(X) for _ in range(4)] == losses
    assert_equal({"guide": guide_2.state_dict(), "elbo": elbo_2.state_dict()}, final)


def test_resumed_run_that_guesses_its_plates() -> None:
    """A new loss runs model and guide once more to count them; the run it goes on with has not."""
    model, guide = Model(), Guide()
    options: dict[str, Any] = {"num_particles": 2, "vectorize_particles": True}
    elbo, optim = TraceImplicit_ELBO(FACTORIES["ardae"], **options), adam()
    svi = SVI(model, guide, optim, loss=elbo)
    svi.step(X)
    saved = copy([guide.state_dict(), optim.get_state(), elbo.state_dict(), torch.get_rng_state()])
    losses = [svi.step(X) for _ in range(2)]

    pyro.clear_param_store()
    guide, optim, elbo = Guide(), adam(), TraceImplicit_ELBO(FACTORIES["ardae"], **options)
    guide.load_state_dict(saved[0])
    optim.set_state(saved[1])
    elbo.load_state_dict(saved[2])
    svi = SVI(model, guide, optim, loss=elbo)
    torch.set_rng_state(saved[3])
    assert [svi.step(X) for _ in range(2)] == losses


def test_resuming_by_the_modules_of_a_guide_that_is_a_function() -> None:
    """As docs/guides.md has it."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def build() -> tuple[nn.Module, Any, TraceImplicit_ELBO, SVI]:
        pyro.clear_param_store()
        head = nn.Linear(2 * DIM, DIM)

        def guide(x: Tensor) -> None:
            pyro.module("head", head)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", Implicit(lambda e, c: head(torch.cat([e, c], -1)), DIM, x))

        optim, elbo = adam(), TraceImplicit_ELBO(FACTORIES["ardae"])
        return head, optim, elbo, SVI(model, guide, optim, loss=elbo)

    head, optim, elbo, svi = build()
    svi.step(X)
    state = copy([head.state_dict(), optim.get_state(), elbo.state_dict(), torch.get_rng_state()])
    losses = [svi.step(X) for _ in range(2)]
    final = copy(head.state_dict())

    head, optim, elbo, svi = build()
    head.load_state_dict(state[0])
    optim.set_state(state[1])
    elbo.load_state_dict(state[2])
    torch.set_rng_state(state[3])
    assert [svi.step(X) for _ in range(2)] == losses
    assert_equal(head.state_dict(), final)


def test_reset_forgets_the_guessed_plates() -> None:
    def model(size: int) -> None:
        with pyro.plate("data", size) if size else nullcontext():
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(size: int) -> None:
        with pyro.plate("data", size) if size else nullcontext():
            pyro.sample("z", Implicit(lambda e: e[..., 0], 1, event_shape=()))

    elbo = TraceImplicit_ELBO(
        partial(ARDAE, hidden_dim=4), num_particles=4, vectorize_particles=True
    )
    elbo.loss_and_grads(model, guide, 0)
    elbo.reset()
    elbo.loss_and_grads(model, guide, 5)


@pytest.mark.parametrize("factory", FACTORIES)
def test_resumed_module_is_the_uninterrupted_one(factory: str) -> None:
    """The path of torch optimizers: everything of the loss travels in ``module.state_dict()``."""
    with pyro.settings.context(module_local_params=True):

        def build() -> tuple[nn.Module, torch.optim.Optimizer]:
            module = TraceImplicit_ELBO(FACTORIES[factory])(Model(), Guide())
            return module, torch.optim.Adam(module.parameters(), 1e-2)

        def step(module: nn.Module, optim: torch.optim.Optimizer) -> float:
            optim.zero_grad()
            loss = module(X)
            loss.backward()
            optim.step()
            return float(loss.detach())

        module, optim = build()
        for _ in range(4):
            step(module, optim)
        saved = {
            "module": module.state_dict(),
            "optim": optim.state_dict(),
            "rng": torch.get_rng_state(),
        }
        saved = through_a_file(saved)
        losses = [step(module, optim) for _ in range(4)]

        module_2, optim_2 = build()
        module_2.load_state_dict(saved["module"])
        optim_2.load_state_dict(saved["optim"])
        torch.set_rng_state(saved["rng"])
        assert [step(module_2, optim_2) for _ in range(4)] == losses
        assert_equal(module_2.state_dict(), copy(module.state_dict()))


def test_state_is_kept_until_its_site_is_met() -> None:
    elbo = TraceImplicit_ELBO(FACTORIES["ardae"])
    elbo.loss_and_grads(Model(), Guide(), X)
    state = copy(elbo.state_dict())
    fresh = TraceImplicit_ELBO(FACTORIES["ardae"])
    fresh.load_state_dict(state)
    assert fresh.estimators == {}
    assert_equal(fresh.state_dict(), state)
    fresh.reset()
    assert fresh.state_dict() == {}


# ---- what belongs to whom ------------------------------------------------------------------------


def test_estimators_are_no_parameters_of_model_or_guide() -> None:
    elbo = TraceImplicit_ELBO(FACTORIES["ardae"])
    module = elbo(Model(), Guide())
    before = {name for name, _ in module.named_parameters()}
    module(X)
    assert {name for name, _ in module.named_parameters()} == before
    assert len(before) == 4
    assert not any(isinstance(m, ScoreEstimator) for m in module.modules())
    elbo.loss_and_grads(module.model, module.guide, X)
    assert len(pyro.get_param_store()) == 4
    assert set(elbo.estimators) == {"g", "z"}
    assert (elbo.estimators["g"].context_dim, elbo.estimators["z"].context_dim) == (0, WIDTH)


@pytest.mark.parametrize("factory", FACTORIES)
def test_learning_the_score_leaves_no_gradient(factory: str) -> None:
    """Context and guide belong to the user's optimizer."""
    y = Y.clone().requires_grad_()
    weight = torch.ones(WIDTH, DIM, requires_grad=True)
    base = FACTORIES[factory](DIM, WIDTH)
    samples = y @ weight + torch.randn(8, ROWS, DIM)
    context, center = torch.tanh(y), y @ weight
    loss = base.update(samples, context, center=center)
    score = base(samples[:2], samples, context, center=center)
    assert y.grad is None
    assert weight.grad is None
    assert not loss.requires_grad
    assert not score.requires_grad
    assert loss.dim() == 0
    assert all(p.grad is None or not bool(p.grad.any()) for p in base.parameters())


def test_the_loss_itself_has_the_guides_gradients_alone() -> None:
    elbo, guide = TraceImplicit_ELBO(FACTORIES["ardae"]), Guide()
    elbo.loss_and_grads(Model(), guide, X)
    assert all(p.grad is not None for p in guide.parameters())
    for estimator in elbo.estimators.values():
        assert all(p.grad is None or not bool(p.grad.any()) for p in estimator.parameters())


# ---- when estimators learn -----------------------------------------------------------------------


def trained() -> tuple[TraceImplicit_ELBO, SVI]:
    elbo = TraceImplicit_ELBO(FACTORIES["ardae"])
    svi = SVI(Model(), Guide(), adam(), loss=elbo)
    for _ in range(2):
        svi.step(X)
    return elbo, svi


def test_evaluating_the_loss_does_not_train() -> None:
    elbo, svi = trained()
    before = copy(elbo.state_dict())
    svi.evaluate_loss(X)
    elbo.loss(svi.model, svi.guide, X)
    with torch.no_grad():
        elbo.differentiable_loss(svi.model, svi.guide, X)
    assert_equal(elbo.state_dict(), before)


def test_differentiable_loss_trains() -> None:
    elbo, svi = trained()
    before = elbo.estimators["z"].updates
    elbo.differentiable_loss(svi.model, svi.guide, X).backward()
    assert elbo.estimators["z"].updates == before + 1
    with elbo.frozen():
        elbo.differentiable_loss(svi.model, svi.guide, X)
    assert elbo.estimators["z"].updates == before + 1


def test_state_of_another_estimator() -> None:
    elbo, svi = trained()
    other = TraceImplicit_ELBO(SlicedScore)
    other.load_state_dict(elbo.state_dict())
    with pytest.raises(
        ValueError, match="expected the state of a SlicedScore, got that of a ARDAE"
    ):
        other.differentiable_loss(svi.model, svi.guide, X)


def test_evaluating_first_leaves_the_run_as_it_is() -> None:
    """Building an estimator in an evaluation shifts nothing that a later step draws."""
    results = []
    for evaluate in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = Guide()
        svi = SVI(Model(), guide, adam(), loss=TraceImplicit_ELBO(FACTORIES["ardae"]))
        if evaluate:
            state = torch.get_rng_state()
            svi.evaluate_loss(X)
            torch.set_rng_state(state)
        pyro.set_rng_seed(1)
        svi.step(X)
        results.append({name: p.grad is not None for name, p in guide.named_parameters()})
    assert results[0] == results[1]


def test_frozen_does_not_train() -> None:
    elbo, svi = trained()
    before = copy(elbo.state_dict())
    with elbo.frozen():
        svi.step(X)
        with elbo.frozen():
            svi.step(X)
        svi.step(X)
    assert_equal(elbo.state_dict(), before)
    svi.step(X)
    assert elbo.estimators["z"].state_dict()["_extra_state"]["updates"] == 3


def test_module_trains_in_train_mode_with_gradients_alone() -> None:
    elbo = TraceImplicit_ELBO(FACTORIES["ardae"])
    module = elbo(Model(), Guide())
    module(X)
    before = copy(elbo.state_dict())
    with torch.no_grad():
        module(X)
    module.eval()
    module(X).backward()
    assert_equal(elbo.state_dict(), before)
    module.train()
    module(X)
    assert elbo.estimators["z"].state_dict()["_extra_state"]["updates"] == 2


@pytest.mark.parametrize(("updates", "expected"), [(0, 0), (1, 2), (3, 6)])
def test_number_of_score_updates(updates: int, expected: int) -> None:
    elbo = TraceImplicit_ELBO(FACTORIES["ardae"], num_score_updates=updates)
    model, guide = Model(), Guide()
    for _ in range(2):
        elbo.loss_and_grads(model, guide, X)
    assert elbo.estimators["z"].state_dict()["_extra_state"]["updates"] == expected


@pytest.mark.parametrize(("interval", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [1, 1, 2, 2, 3])])
def test_score_learns_in_one_of_some_runs(interval: int, expected: list[int]) -> None:
    """Also when the loss is saved and loaded in between; frozen runs don't count."""
    make = lambda: TraceImplicit_ELBO(FACTORIES["ardae"], score_interval=interval)  # noqa: E731
    elbo, (model, guide), updates = make(), (Model(), Guide()), []
    for _ in range(5):
        elbo.loss_and_grads(model, guide, X)
        with elbo.frozen():
            elbo.loss_and_grads(model, guide, X)
        state = elbo.state_dict()
        updates.append(state["z"]["estimator"]["_extra_state"]["updates"])
        elbo = make()
        elbo.load_state_dict(state)
    assert updates == expected


@pytest.mark.parametrize(("whitening", "draws"), [("centered", [8, 0, 8]), ("pooled", [8, 8, 8])])
def test_no_draws_are_made_that_nobody_reads(whitening: Mode, draws: list[int]) -> None:
    made = []

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(DIM))

        def sampler(noise: Tensor, context: Tensor) -> Tensor:
            made.append(len(noise) if noise.dim() == 3 else None)
            return loc + noise

        with pyro.plate("b", ROWS):
            pyro.sample("z", Implicit(sampler, DIM, torch.randn(ROWS, WIDTH)))

    def model() -> None:
        with pyro.plate("b", ROWS):
            pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))

    estimator = partial(ARDAE, hidden_dim=8, depth=2, whitening=whitening)
    elbo = TraceImplicit_ELBO(estimator, num_score_samples=8, score_interval=2, max_plate_nesting=1)
    seen, diagnostics = [], []
    for _ in range(3):
        made.clear()
        elbo.loss_and_grads(model, guide)
        seen.append(made[-1])  # with the center, where there is one
        diagnostics.append(elbo.diagnostics()["z"]["std"])
    center = whitening == "centered"
    assert seen == [count + center for count in draws]
    assert (diagnostics[0] == diagnostics[1]) == center
    assert diagnostics[1] != diagnostics[2]


class Recorder(ARDAE):
    """Keeps what it is to learn from."""

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__(dim, context_dim, hidden_dim=8, depth=2, whitening="centered")
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(
        self, samples: Tensor, context: Tensor | None = None, *, center: Tensor | None = None
    ) -> Tensor:
        assert context is not None
        assert center is not None
        self.seen.append((samples, context, center))
        return super().update(samples, context, center=center)


@pytest.mark.parametrize("count", [None, 1, 4, ROWS, 99])
def test_score_learns_from_a_random_subset_of_the_contexts(count: int | None) -> None:
    rows = torch.randn(2, ROWS, WIDTH)
    identity = torch.eye(DIM, WIDTH)

    def guide() -> None:
        scale = pyro.param("scale", torch.tensor(1e-3))
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", ROWS, dim=-1):
            sampler = lambda noise, c: c @ identity.mT + scale * noise  # noqa: E731
            pyro.sample("z", Implicit(sampler, DIM, rows))

    def model() -> None:
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", ROWS, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))

    elbo = TraceImplicit_ELBO(Recorder, num_score_samples=8, num_score_contexts=count)
    for _ in range(2):
        elbo.loss_and_grads(model, guide)
    estimator = elbo.estimators["z"]
    assert isinstance(estimator, Recorder)
    wanted = 2 * ROWS if count is None or count > 2 * ROWS else count
    for samples, context, center in estimator.seen:
        flat = context.reshape(-1, WIDTH)
        assert len(flat) == wanted == len(flat.unique(dim=0))
        # Every draw lies at its own context, whose image the center is.
        image = flat @ identity.mT
        torch.testing.assert_close(center.reshape(-1, DIM), image)
        assert (samples.reshape(8, -1, DIM) - image).abs().max() < 0.01
    first, second = (seen[1].reshape(-1, WIDTH) for seen in estimator.seen)
    assert torch.equal(first, second) == (wanted == 2 * ROWS)
    assert elbo.diagnostics()["z"]["std"] > 0


def test_diagnostics() -> None:
    elbo, _ = trained()
    diagnostics = elbo.diagnostics()
    assert diagnostics.keys() == {"g", "z"}
    for site in diagnostics.values():
        assert site.keys() >= {"score_loss", "stein", "mean_score", "std"}
        assert all(isinstance(value, float) for value in site.values())
    assert TraceImplicit_ELBO().diagnostics() == {}


# ---- random numbers, dtype -----------------------------------------------------------------------


def test_building_an_estimator_does_not_shift_the_random_stream() -> None:
    drawn = []
    for width in (4, 32):

        def guide(x: Tensor, kept: list[Tensor]) -> None:
            def sampler(eps: Tensor) -> Tensor:
                kept.append(eps)
                return eps + loc

            loc = pyro.param("loc", torch.zeros(DIM))
            pyro.sample("g", Implicit(sampler, DIM))

        def model(x: Tensor, kept: list[Tensor]) -> None:
            pyro.sample("g", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        kept: list[Tensor] = []
        elbo = TraceImplicit_ELBO(partial(ARDAE, hidden_dim=width), num_score_updates=0)
        for _ in range(2):
            elbo.loss_and_grads(model, guide, X, kept)
        drawn.append(kept)
    assert len(drawn[0]) == len(drawn[1]) == 5  # one of them the probe's
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("factory", FACTORIES)
def test_module_to_moves_the_estimators_and_their_optimizers(factory: str) -> None:
    class Local(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.zeros(DIM))

        def forward(self, y: Tensor) -> None:
            loc = self.loc
            q = Implicit(lambda e, c: loc + (1 + c.sum(-1, keepdim=True) ** 2) * e, DIM, y)
            with pyro.plate("rows", ROWS):
                pyro.sample("z", q)

    class Prior(PyroModule):
        def forward(self, y: Tensor) -> None:
            with pyro.plate("rows", ROWS):
                pyro.sample("z", dist.Normal(y.new_zeros(DIM), 1.0).to_event(1))

    with pyro.settings.context(module_local_params=True):
        elbo = TraceImplicit_ELBO(FACTORIES[factory])
        module = elbo(Prior(), Local())
        module(Y).backward()
        module.to(torch.float64)
        estimator = elbo.estimators["z"]
        floats = [t for t in estimator.state_dict().values() if torch.is_tensor(t)]
        assert {t.dtype for t in floats if t.is_floating_point()} == {torch.float64}
        loss = module(Y.double())
        loss.backward()
        assert loss.dtype == torch.float64
        optimizer = estimator.get_extra_state()["optimizer"]
        entries = [e for s in optimizer["state"].values() for k, e in s.items() if k != "step"]
        assert {e.dtype for e in entries if torch.is_tensor(e)} == {torch.float64}
