# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""AutoImplicit as Pyro's own automatic guides are used: one case for each of their abilities."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, config_enumerate
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn

from pyro_ardae import (
    ARDAE,
    AutoImplicit,
    Implicit,
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from pyro_ardae.implicit import find_implicit

SMALL = partial(ARDAE, hidden_dim=16, depth=1)
ELBOS = [TraceImplicit_ELBO, TraceImplicitMeanField_ELBO, TraceImplicitEnum_ELBO]
every_elbo = pytest.mark.parametrize("elbo_class", ELBOS, ids=lambda c: c.__name__)


def make_elbo(elbo_class: Any = TraceImplicit_ELBO, **kwargs: Any) -> Any:
    options = {"num_score_samples": 32, "strict_enumeration_warning": False, **kwargs}
    return elbo_class(SMALL, **options)


def fit(model: Any, guide: Any, *args: Any, steps: int = 2, elbo: Any = None, **kwargs: Any) -> Any:
    elbo = make_elbo() if elbo is None else elbo
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
    for _ in range(steps):
        assert torch.isfinite(torch.tensor(svi.step(*args, **kwargs)))
    return elbo


def normal_of_five() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5)))


def three_supports() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 2):
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))


# ---- sites ---------------------------------------------------------------------------------------


def test_sites_of_the_trace() -> None:
    guide = AutoImplicit(three_supports)
    trace = poutine.trace(guide).get_trace()
    assert find_implicit(trace.nodes["_AutoImplicit_latent"]["fn"]) is not None
    assert trace.nodes["_AutoImplicit_latent"]["infer"]["is_auxiliary"]
    assert guide.latent_dim == 5
    for name in "xyz":
        assert isinstance(trace.nodes[name]["fn"], dist.Delta)
    model_trace = poutine.trace(poutine.replay(three_supports, trace)).get_trace()
    check_model_guide_match(model_trace, trace)
    assert "_AutoImplicit_latent" not in model_trace.nodes


@every_elbo
@pytest.mark.parametrize("vectorize", [False, True])
def test_factor(elbo_class: Any, vectorize: bool) -> None:
    def model(log_factor: Tensor) -> None:
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("f1", log_factor)
        pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("plate", 3):
            pyro.factor("f2", log_factor)
            pyro.sample("z3", dist.Normal(torch.zeros(3), 1.0))

    guide = AutoImplicit(model)
    elbo = make_elbo(
        elbo_class, num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1
    )
    elbo.loss(model, guide, torch.tensor(0.0))
    losses = []
    for log_factor in (5.0, 4.0):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide, torch.tensor(log_factor)))
    assert losses[0] - losses[1] == pytest.approx(-1 - 3, abs=1e-4)


@every_elbo
@pytest.mark.parametrize(
    "init_loc_fn", [init_to_feasible, init_to_mean, init_to_median, init_to_sample]
)
def test_shapes(elbo_class: Any, init_loc_fn: Any) -> None:
    def model() -> None:
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("plate", 3):
            pyro.sample("z3", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
        masked = dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0)
        pyro.sample("z6", masked.to_event(1))
        pyro.sample("z7", dist.LKJCholesky(3, 1.0))

    guide = AutoImplicit(model, init_loc_fn=init_loc_fn)
    fit(model, guide, elbo=make_elbo(elbo_class))
    expected = {name: site["value"].shape for name, site in guide._latents()}
    assert {name: value.shape for name, value in guide().items()} == expected
    assert {name: value.shape for name, value in guide.median().items()} == expected
    draws = guide.sample_posterior(4)
    assert {name: value.shape[1:] for name, value in draws.items()} == expected
    for name, site in guide._latents():
        assert bool(site["fn"].support.check(draws[name]).all())


@every_elbo
@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}, "vectorized"])
def test_nested_plates(elbo_class: Any, particles: Any) -> None:
    """Globals, a full plate, subsampled plates, and latents inside of several."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        wide = a.unsqueeze(-1).expand(*a.shape, 2)
        d = pyro.plate("d", 7, subsample_size=4, dim=-1)
        t = pyro.plate("t", 3, dim=-2)
        e = pyro.plate("e", 5, subsample_size=2, dim=-3)
        with t:
            b = pyro.sample("b", dist.LogNormal(a, 1.0))
        with d:
            c = pyro.sample("c", dist.Normal(wide, 1.0).to_event(1))
        with e, t, d:
            f = pyro.sample("f", dist.Normal(b + c.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(f, 1.0), obs=torch.zeros(2, 3, 4))

    if particles == "vectorized":
        particles = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 3}
    guide = AutoImplicit(model, hidden_dims=(8,))
    elbo = fit(model, guide, elbo=make_elbo(elbo_class, **particles))
    assert sorted(elbo.estimators) == [
        "_AutoImplicit_d_latent",
        "_AutoImplicit_e__d_latent",
        "_AutoImplicit_latent",
    ]
    shapes = {name: tuple(value.shape) for name, value in guide.sample_posterior(6).items()}
    assert shapes == {"a": (6,), "b": (6, 3, 1), "c": (6, 7, 2), "f": (6, 5, 3, 7)}


def test_one_row_of_a_plate_stays_that_row() -> None:
    """With rows far apart, a subsample's draws lie where those rows lie."""

    def model() -> None:
        with pyro.plate("d", 20, subsample_size=5):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoImplicit(model)
    guide()
    rows = guide.posterior.plate_d.rows
    loc = 10.0 * torch.randn(20, 2)
    guide.posterior.plate_d.init_loc.data.copy_(loc)
    assert rows.shape == (20, 4 + 4)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace()
        index = trace.nodes["d"]["value"]
        assert float((trace.nodes["z"]["value"].detach() - loc[index]).abs().max()) < 1.0
    draws = guide.sample_posterior(50)["z"]
    assert float((draws - loc).abs().max()) < 1.0


# ---- where it starts -----------------------------------------------------------------------------


def test_init_loc_fn() -> None:
    inits = {"x": torch.randn(()), "y": torch.randn(5)}
    guide = AutoImplicit(normal_of_five, init_loc_fn=lambda site: inits[site["name"]])
    guide()
    median = guide.median()
    for name, value in inits.items():
        torch.testing.assert_close(median[name], value)


@pytest.mark.parametrize("init_scale", [1.0, 1e-1, 1e-4])
def test_init_scale(init_scale: float) -> None:
    def model() -> None:
        normal_of_five()
        with pyro.plate("plate", 50):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with pyro.plate("local", 30, subsample_size=10):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoImplicit(model, init_scale=init_scale, init_loc_fn=init_to_feasible)
    draws = guide.sample_posterior(2000)
    unconstrained = torch.cat(
        [draws["x"].unsqueeze(-1), draws["y"], draws["z"].log(), draws["w"]], -1
    )
    deviation = unconstrained.std(0) / init_scale
    # 86 standard deviations, each of error 1 / sqrt(4000) = 0.016: 0.1 is six of those
    assert float((deviation - 1).abs().max()) < 0.1
    assert float(unconstrained.mean(0).abs().max()) < 0.15 * init_scale


# ---- median and quantiles ------------------------------------------------------------------------


def list_x(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    guide.append(AutoImplicit(poutine.block(model, hide=["x"])))
    return guide


def list_of_two(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoImplicit(poutine.block(model, expose=["x"])))
    guide.append(AutoImplicit(poutine.block(model, hide=["x"])))
    return guide


def list_callable(model: Any) -> AutoGuideList:
    def guide_x() -> None:
        loc = pyro.param("x_loc", torch.tensor(1.0))
        scale = pyro.param("x_scale", torch.tensor(0.1), constraint=dist.constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale))

    guide = AutoGuideList(model)
    median = {"x": lambda: pyro.param("x_loc").detach()}
    guide.append(AutoCallable(model, guide_x, lambda: {k: v() for k, v in median.items()}))
    guide.append(AutoImplicit(poutine.block(model, hide=["x"])))
    return guide


def list_module(model: Any) -> AutoGuideList:
    class GuideX(AutoGuide):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.x_loc = nn.Parameter(torch.tensor(1.0))
            self.x_scale = PyroParam(torch.tensor(0.1), dist.constraints.positive)

        def forward(self) -> dict[str, Tensor]:
            return {"x": pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))}

        def median(self) -> dict[str, Tensor]:
            return {"x": self.x_loc.detach()}

    guide = AutoGuideList(model)
    guide.custom = GuideX(model)
    guide.implicit = AutoImplicit(poutine.block(model, hide=["x"]))
    return guide


def nested_list(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    inner = AutoGuideList(poutine.block(model, hide=["x"]))
    inner.z = AutoImplicit(poutine.block(model, hide=["x"]))
    guide.append(inner)
    return guide


@pytest.mark.parametrize("make_guide", [AutoImplicit, list_x, list_callable, nested_list])
def test_median_after_training(make_guide: Any) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))

    guide = make_guide(model)
    elbo = TraceImplicit_ELBO(
        num_particles=50, num_score_samples=512, vectorize_particles=True, max_plate_nesting=0
    )
    optim = pyro.optim.ClippedAdam({"lr": 0.01, "betas": (0.8, 0.99), "lrd": 0.985})
    svi = SVI(model, guide, optim, elbo)
    for _ in range(150):
        svi.step()
    median = guide.median()
    # explicit parts of a list get no further at this step size
    own = ("x", "y", "z") if make_guide is AutoImplicit else ("y", "z")
    expected = {"x": 0.0, "y": 1.0, "z": 0.5}
    for name in own:
        assert float(median[name]) == pytest.approx(expected[name], abs=0.2), name


@pytest.mark.parametrize("make_guide", [AutoImplicit, list_of_two])
def test_quantiles(make_guide: Any) -> None:
    guide = make_guide(three_supports)
    guide()
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    median = guide.median()
    assert {name: value.shape for name, value in quantiles.items()} == {
        "x": (3,),
        "y": (3, 2),
        "z": (3, 2),
    }
    for name, value in quantiles.items():
        assert torch.equal(value[1], median[name])
        assert bool((value.diff(dim=0) > 0).all())
    again = guide.quantiles(torch.tensor([0.1]))
    torch.testing.assert_close(again["y"][0], quantiles["y"][0])


def test_quantiles_where_the_support_is_mapped_in_reverse() -> None:
    def model() -> None:
        pyro.sample("y", dist.ImproperUniform(dist.constraints.less_than(2.0), (), ()))

    guide = AutoImplicit(model, init_loc_fn=init_to_value(values={"y": torch.tensor(1.0)}))
    guide()
    low, middle, high = guide.quantiles([0.05, 0.5, 0.95])["y"].tolist()
    assert low < middle < high < 2
    torch.testing.assert_close(guide.median()["y"], torch.tensor(middle))


def test_quantiles_are_those_of_a_gaussian_at_the_start(
    standard_errors: Callable[[int], float],
) -> None:
    """Location 0.3 and scale 0.5 on the reals, y = exp: known in closed form."""
    guide = AutoImplicit(
        lambda: pyro.sample("y", dist.LogNormal(0.0, 1.0)),
        init_loc_fn=lambda site: torch.tensor(0.3).exp(),
        init_scale=0.5,
    )
    guide()
    levels = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    value = guide.quantiles(levels)["y"].log()
    standard = torch.distributions.Normal(0.0, 1.0)
    exact = standard.icdf(levels)
    # pairs of noise halve the number of independent draws, at worst
    density = standard.log_prob(exact).exp()
    error = (levels * (1 - levels) / (guide.num_quantile_draws / 2)).sqrt() / density
    off = ((value - 0.3) / 0.5 - exact) / error
    assert float(off.abs().max()) < standard_errors(len(levels))


def test_quantiles_leave_the_random_stream_alone() -> None:
    guide = AutoImplicit(normal_of_five)
    guide()
    state = torch.get_rng_state()
    guide.quantiles([0.2])
    assert torch.equal(torch.get_rng_state(), state)


def test_quantiles_of_many_rows_take_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of all draws of all rows would not fit into memory."""

    def model() -> None:
        with pyro.plate("d", 1000, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoImplicit(model, init_loc_fn=init_to_feasible)
    guide()
    counts = []
    draw = guide._draw
    monkeypatch.setattr("pyro_ardae.autoguide.quantiles._TABLE", 500_000)
    monkeypatch.setattr(guide, "_draw", lambda n, *rest: counts.append(n) or draw(n, *rest))
    median = guide.median()["z"]
    assert counts == [500]
    assert median.shape == (1000,)
    assert float(median.abs().max()) < 1e-3  # 0 up to rounding: the noise comes in pairs


# ---- copies and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("make_guide", [AutoImplicit, list_of_two, nested_list])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_draw_the_same(make_guide: Any, how: str) -> None:
    guide = make_guide(three_supports)
    fit(three_supports, guide)
    pyro.set_rng_seed(2)
    expected = guide()
    if how == "pickle":
        other = pickle.loads(pickle.dumps(guide))
    elif how == "deepcopy":
        other = copy.deepcopy(guide)
    else:
        file = io.BytesIO()
        torch.save(guide, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in guide.named_parameters()]
    pyro.set_rng_seed(2)
    for name, value in other().items():
        assert torch.equal(value, expected[name]), name
    if make_guide is AutoImplicit:  # Pyro's lists lose their model when copied
        assert guide.model is not None
        fit(three_supports, guide)


def test_state_dict() -> None:
    guide = AutoImplicit(three_supports)
    fit(three_supports, guide)
    pyro.clear_param_store()
    other = AutoImplicit(three_supports)
    other()
    assert not torch.equal(other.median()["y"], guide.median()["y"])
    other.load_state_dict(guide.state_dict())
    for name, value in guide.quantiles([0.1, 0.9]).items():
        assert torch.equal(other.quantiles([0.1, 0.9])[name], value)


def test_param_store_resumes() -> None:
    """As AutoNormal: the store of a fitted guide, loaded before a fresh guide's first call."""
    guide = AutoImplicit(three_supports)
    fit(three_supports, guide)
    expected = guide.median()
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    for call in (lambda g: None, lambda g: g(), lambda g: g.sample_posterior(2)):
        fresh = AutoImplicit(three_supports)
        call(fresh)
        for name, value in fresh.median().items():
            torch.testing.assert_close(value, expected[name])


def test_the_store_of_another_model_is_refused() -> None:
    fit(normal_of_five, AutoImplicit(normal_of_five))
    with pytest.raises(ValueError, match=r"globals.*another model.*clear_param_store"):
        AutoImplicit(three_supports)()


def test_unused_copy_says_what_to_do() -> None:
    other = pickle.loads(pickle.dumps(AutoImplicit(three_supports)))
    with pytest.raises(RuntimeError, match=r"before its first call.*Call the guide once"):
        other()


# ---- lists and modules ---------------------------------------------------------------------------


@every_elbo
def test_guide_list(elbo_class: Any) -> None:
    guide = AutoGuideList(normal_of_five)
    guide.append(AutoImplicit(poutine.block(normal_of_five, expose=["x"])))
    guide.append(AutoNormal(poutine.block(normal_of_five, expose=["y"])))
    assert set(guide()) == {"x", "y"}
    elbo = fit(normal_of_five, guide, elbo=make_elbo(elbo_class))
    assert list(elbo.estimators) == ["_AutoGuideList.0_latent"]


@pytest.mark.parametrize("returns", [False, True])
def test_list_with_a_callable(returns: bool) -> None:
    def guide_x() -> dict[str, Tensor] | None:
        x = pyro.sample("x", dist.Delta(pyro.param("x_loc", torch.tensor(0.0))))
        return {"x": x} if returns else None

    guide = AutoGuideList(normal_of_five)
    guide.append(guide_x)
    guide.append(AutoImplicit(poutine.block(normal_of_five, expose=["y"])))
    assert set(guide()) == ({"x", "y"} if returns else {"y"})


@every_elbo
def test_nested_autoguide(elbo_class: Any) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.x_loc = nn.Parameter(torch.tensor(1.0))
            self.x_scale = PyroParam(torch.tensor(0.1), dist.constraints.positive)

        def forward(self) -> None:
            pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))
            with pyro.plate("plate", 2):
                pyro.sample("y", dist.Normal(2.0, 0.1))

    model = Model()
    guide = nested_list(model)
    for _, module in guide.named_modules():
        if isinstance(module, AutoGuide) and module is not guide:
            assert module.master is not None
            assert module.master() is guide
    fit(model, guide, elbo=make_elbo(elbo_class))
    guide_trace = poutine.trace(guide).get_trace()
    check_model_guide_match(poutine.trace(model).get_trace(), guide_trace)
    prefixes = ("AutoGuideList.0", "AutoGuideList.1.z")
    assert all(name.startswith(prefixes) for name in guide_trace.param_nodes)
    assert {"x", "y", "_AutoGuideList.1.z_latent"} <= set(guide_trace.stochastic_nodes)


class RandomLinear(nn.Linear, PyroModule):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = PyroSample(
            dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2)
        )
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))


class LinearRegression(PyroModule):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = RandomLinear(dim, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("plate", len(x)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


@every_elbo
def test_linear_regression(elbo_class: Any) -> None:
    x, y = torch.randn(10, 3), torch.randn(10)
    model = LinearRegression(3)
    guide = AutoImplicit(model)
    fit(model, guide, x, y, elbo=make_elbo(elbo_class))
    assert guide.latent_dim == 5
    assert guide.median(x)["linear.weight"].shape == (1, 3)


# ---- predictions ---------------------------------------------------------------------------------


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """Globals with and without event dimensions; the plate holds data alone."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("plate", x.shape[-2]):
        mean = (x * weight).sum(-1)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def test_predictive() -> None:
    x, y = torch.randn(3, 2), torch.randn(3)
    guide = AutoImplicit(regression)
    guide(x, y)
    predictive = Predictive(regression, guide=guide, num_samples=10)
    samples = predictive(torch.randn(6, 2))  # other data than it was built with
    model_trace = prune_subsample_sites(poutine.trace(regression).get_trace(x))
    assert set(model_trace.stochastic_nodes) <= set(samples)
    assert samples["y"].shape == (10, 6)
    assert samples["weight"].squeeze().shape == (10, 2)
    assert len(samples["sigma"].unique()) == 10


def _by_product(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("plate", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 0.001), obs=y)


def _by_first(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("plate", len(x)):
        pyro.sample("y", dist.Normal(weight[0] * x[:, 0], 0.001), obs=y)


class _Layer(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1, bias=False)
        self.layer.weight = PyroSample(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("plate", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.001), obs=y)


@pytest.mark.parametrize("case", ["product", "first", "layer"])
def test_predictions_are_those_of_each_draw(case: str) -> None:
    """Latents come to the model as its own are, without dimensions for plates they are not in."""
    model: Any = {"product": _by_product, "first": _by_first, "layer": _Layer()}[case]
    x, y = torch.randn(2, 2), torch.randn(2)
    guide = AutoImplicit(model, init_scale=1.0)
    guide(x, y)
    sites = ("layer.weight" if case == "layer" else "weight", "y")
    found = Predictive(model, guide=guide, num_samples=20, return_sites=sites)(x)
    weight = found[sites[0]].reshape(20, 2)
    expected = weight[:, :1] * x[:, 0] if case == "first" else weight @ x.mT
    assert float((found["y"] - expected).abs().max()) < 0.01


def test_parallel_predictions_of_scalars() -> None:
    """As with Pyro's guides; a vector outside of plates needs a dimension for them."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("plate", len(x)):
            pyro.sample("y", dist.Normal(slope + (x * weight).sum(-1), 0.001), obs=y)

    x = torch.randn(3, 2)
    draws = AutoImplicit(model, init_scale=1.0).sample_posterior(10, x, torch.randn(3))
    expected = draws["slope"].unsqueeze(1) + draws["weight"] @ x.mT
    draws["weight"] = draws["weight"].unsqueeze(1)
    found = Predictive(model, draws, parallel=True)(x)["y"]
    assert float((found - expected).abs().max()) < 0.01


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_with_locals(parallel: bool) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("d", 6, subsample_size=4):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    guide = AutoImplicit(model)
    guide()
    samples = Predictive(model, guide=guide, num_samples=5, parallel=parallel)()
    assert samples["x"].shape == (5, 4, 2)


def test_predictions_from_draws() -> None:
    """sample_posterior() gives what Predictive takes."""
    x = torch.randn(3, 2)
    guide = AutoImplicit(regression)
    draws = guide.sample_posterior(10, x, torch.randn(3))
    samples = Predictive(regression, draws)(x)
    assert samples["y"].shape == (10, 3)


def test_draws_are_chunked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by chunks of draws, which leave no mark in the result."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 6, subsample_size=4):
            pyro.sample("z", dist.Normal(mu, 1.0))

    guide = AutoImplicit(model)
    fit(model, guide, steps=5)
    draws = []
    for chunk in (2**22, 1):
        monkeypatch.setattr("pyro_ardae.autoguide.posterior._CHUNK", chunk)
        pyro.set_rng_seed(4)
        draws.append(guide.sample_posterior(20))
    for name, value in draws[0].items():
        torch.testing.assert_close(value, draws[1][name])


# ---- subsampling ---------------------------------------------------------------------------------


def test_replay_plates() -> None:
    """The model takes the guide's subsample."""
    x = torch.randn(10)

    def model(x: Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(x), subsample_size=3):
            z = pyro.sample("z", dist.Normal(0.0, drift))
            pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0))

    guide = AutoImplicit(model)
    guide(x)
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x)
    index = guide_trace.nodes["data"]["value"]
    assert torch.equal(model_trace.nodes["data"]["value"], index)
    assert torch.equal(model_trace.nodes["x"]["value"], x[index])
    assert model_trace.nodes["z"]["scale"] == guide_trace.nodes["z"]["scale"] == 10 / 3
    assert guide_trace.nodes["_AutoImplicit_data_latent"]["scale"] == 10 / 3
    assert guide_trace.nodes["_AutoImplicit_latent"]["scale"] == 1.0


def test_subsample_in_the_model() -> None:
    def model(x: Tensor, y: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        loc = pyro.param("loc", lambda: torch.tensor(0.0))
        with pyro.plate("batch", len(x), subsample_size=batch_size):
            batch_x = pyro.subsample(x, event_dim=0)
            batch_y = None if y is None else pyro.subsample(y, event_dim=0)
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            return pyro.sample("obs", dist.Normal(loc + batch_x, sigma), obs=batch_y)

    x = torch.randn(50)
    guide = AutoImplicit(model)
    fit(model, guide, x, torch.randn(50), batch_size=20)
    assert guide.median(x)["sigma"].shape == (50,)


def time_series(batch: Any, subsample: Tensor, full_size: int) -> None:
    drift = pyro.sample("drift", dist.LogNormal(-1, 0.5))
    with pyro.plate("data", full_size, subsample=subsample):
        z: Any = 0.0
        for t, observed in enumerate(batch):
            z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
            pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=observed)


def series_plates(batch: Any, subsample: Tensor, full_size: int) -> Any:
    return pyro.plate("data", full_size, subsample=subsample)


@pytest.mark.parametrize("in_list", [False, True])
def test_subsample_by_the_caller(in_list: bool) -> None:
    """Minibatches with the index from outside, the last one smaller."""
    if in_list:
        guide: Any = AutoGuideList(time_series, create_plates=series_plates)
        guide.append(AutoDelta(poutine.block(time_series, expose=["drift"])))
        guide.append(AutoImplicit(poutine.block(time_series, hide=["drift"])))
    else:
        guide = AutoImplicit(time_series, create_plates=series_plates)
    data = torch.randint(0, 2, (4, 25)).float()
    optim, elbo = pyro.optim.Adam({"lr": 0.02}), make_elbo()
    svi = SVI(time_series, guide, optim, elbo)
    for start in (0, 10, 20):
        index = torch.arange(start, min(25, start + 10))
        svi.step(data[:, index], index, full_size=25)
    part = guide if not in_list else guide[1]
    moved = part.posterior.plate_data.rows.detach()[:, : 2 * 4].abs().sum(-1)
    assert bool((moved > 0).all())  # every row was somebody's


def test_dependent_plates() -> None:
    """Two plates with one subsample, as in models of origins and destinations."""

    def model(data: Tensor) -> None:
        origin = pyro.plate("origin", 10, dim=-2)
        destin = pyro.plate("destin", 10, dim=-1)
        with origin:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with origin, destin:
            batch = pyro.subsample(data, event_dim=0)
            pyro.sample("obs", dist.Normal(a, 1), obs=batch)

    def create_plates(data: Tensor) -> Any:
        origin = pyro.plate("origin", 10, subsample_size=5, dim=-2)
        with origin as subsample:
            pass
        return origin, pyro.plate("destin", 10, subsample=subsample, dim=-1)

    guide = AutoImplicit(model, create_plates=create_plates)
    fit(model, guide, torch.randn(10, 10))
    assert guide.median(torch.randn(10, 10))["a"].shape == (10, 1)


class Encoder(nn.Module):
    """Features of rows of x."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.SiLU())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self.net(x)
        return features


def local_model(x: Tensor, batch_size: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=batch_size):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        batch = pyro.subsample(x, event_dim=1)
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=batch)


def minibatch_model(batch: Tensor, full_size: int = 100) -> None:
    with pyro.plate("data", full_size, subsample_size=len(batch)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=batch)


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_encoder_of_all_data(mapping: bool, batch_size: int | None) -> None:
    x, encoder = torch.randn(10, 2), Encoder()
    guide = AutoImplicit(local_model, encoder={"data": encoder} if mapping else encoder)
    before = encoder.net[0].weight.detach().clone()
    fit(local_model, guide, x, steps=4, batch_size=batch_size)
    assert not torch.equal(encoder.net[0].weight, before)
    assert guide.sample_posterior(3, x)["z"].shape == (3, 10, 2)
    assert guide.sample_posterior(3, x[:4])["z"].shape == (3, 4, 2)
    assert guide.median(x)["mu"].shape == (2,)


def test_encoder_of_minibatches() -> None:
    """The guide need not know the index, and batches may differ in size."""
    guide = AutoImplicit(minibatch_model, encoder=Encoder())
    x, elbo = torch.randn(100, 2), make_elbo()
    svi = SVI(minibatch_model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    for size in (20, 20, 7):
        svi.step(x[:size])
    trace = poutine.trace(guide).get_trace(x[:7])
    assert trace.nodes["z"]["value"].shape == (7, 2)
    assert trace.nodes["z"]["scale"] == 100 / 7


def test_encoder_of_a_plate_as_large_as_the_batch() -> None:
    def model(batch: Tensor) -> None:
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=batch)

    guide = AutoImplicit(model, encoder=Encoder())
    x, elbo = torch.randn(100, 2), make_elbo()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    for size in (20, 20, 7):
        svi.step(x[:size])
    assert guide.latent_dim == 0
    assert guide.sample_posterior(3, x)["z"].shape == (3, 100, 2)


# ---- other ways to train -------------------------------------------------------------------------


def test_enumerated_site_of_the_model() -> None:
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    @config_enumerate
    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0, 10).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[k], scale), obs=data)

    guide = AutoImplicit(poutine.block(model, hide=["k"]))
    fit(model, guide, data, elbo=make_elbo(TraceImplicitEnum_ELBO, max_plate_nesting=1))


def test_torch_optimizer() -> None:
    x, y = torch.randn(3, 2), torch.randn(3)
    guide = AutoImplicit(regression)
    guide(x, y)
    loss = make_elbo()(regression, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    still = [name for name, p in guide.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_double_precision(float64: None) -> None:
    x, y = torch.randn(3, 2), torch.randn(3)
    guide = AutoImplicit(regression)
    fit(regression, guide, x, y)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert guide.median(x)["weight"].dtype == torch.float64


# ---- what cannot be right ------------------------------------------------------------------------


def test_no_transform_and_no_neutra() -> None:
    guide = AutoImplicit(normal_of_five)
    guide()
    for call in (guide.get_transform, guide.get_base_dist):
        with pytest.raises(NotImplementedError, match=r"not\s+invertible.*AutoIAFNormal"):
            call()
    with pytest.raises(TypeError, match="AutoContinuous"):
        NeuTraReparam(guide)


def test_globals_on_the_reals() -> None:
    guide = AutoImplicit(three_supports)
    guide()
    latent = guide.sample_latent()
    assert latent.shape == (guide.latent_dim,) == (5,)


def test_building_a_guide_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoImplicit(three_supports)()
    assert Implicit is not None
