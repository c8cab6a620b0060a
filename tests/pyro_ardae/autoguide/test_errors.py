# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What AutoImplicit refuses, one row each: the type of the error, and the words that help."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, init_to_feasible, init_to_value
from torch import Tensor

from pyro_ardae import ARDAE, AutoImplicit, TraceImplicit_ELBO

SMALL = partial(ARDAE, hidden_dim=8, depth=1)
NAN = float("nan")


def normal() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def of_data(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete() -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("z", dist.Normal(k.float(), 1.0))


def a_latent_of_one_branch() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if torch.rand(()) < 0.5:
        pyro.sample("w", dist.Normal(z, 1.0))


def a_size_that_varies() -> None:
    size = int(torch.randint(2, 1000, ()))
    pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def sequential_plate() -> None:
    for i in pyro.plate("plate", 3):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def sphere() -> None:
    pyro.sample("z", dist.VonMises3D(torch.tensor([1.0, 0.0, 0.0])))


def bounds_of_a_latent() -> None:
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Uniform(0.0, width))


def bounds_of_a_subsample() -> None:
    with pyro.plate("data", 100, subsample_size=3) as index:
        pyro.sample("z", dist.Uniform(0.0, 1.0 + index))


def index_from_outside(index: Tensor) -> None:
    with pyro.plate("data", 10, subsample=index):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def two_plates() -> None:
    with pyro.plate("a", 10, subsample_size=3):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("b", 10, subsample_size=3):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def empty() -> None:
    pass


def observed_alone() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def auto(model: Any, *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: AutoImplicit(model, **options)(*args)


def draws(**options: Any) -> AutoImplicit:
    guide = AutoImplicit(normal, **options)
    guide()
    return guide


def in_a_list_with_other_rows() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(AutoImplicit(model, encoder=lambda x: x))
    guide(torch.randn(5, 2))
    guide(torch.randn(3, 2))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # arguments
    "model": (lambda: AutoImplicit(3), TypeError, "model: expected a callable, got int"),
    "init_scale": (auto(normal, init_scale=0.0), ValueError, "init_scale.*> 0, got 0.0"),
    "extra_noise": (auto(normal, extra_noise=-1), ValueError, "extra_noise.*>= 0, got -1"),
    "embedding_dim": (auto(normal, embedding_dim=0), ValueError, "embedding_dim.*>= 1, got 0"),
    "hidden_dims": (auto(normal, hidden_dims=()), ValueError, "at least one hidden layer"),
    "gain": (auto(normal, gain=-1.0), ValueError, "gain > 0.*got -1.0"),
    "draws for quantiles": (
        auto(normal, num_quantile_draws=1),
        ValueError,
        "num_quantile_draws: expected >= 2, got 1",
    ),
    "local_plates that is a name": (
        auto(of_data, torch.zeros(3), local_plates="data"),
        TypeError,
        "sequence of names, got 'data'",
    ),
    "local_plates that is not there": (
        auto(of_data, torch.zeros(3), local_plates=["rows"]),
        ValueError,
        r"plates that hold latents, \['data'\], got \['rows'\]",
    ),
    "encoder": (auto(normal, encoder=3), TypeError, "callable of the model's arguments.*got int"),
    "encoder of a plate that is not there": (
        auto(of_data, torch.zeros(3), encoder={"rows": lambda x: x}),
        ValueError,
        r"plates that hold latents, \['data'\], got \['rows'\]",
    ),
    "encoder of no plate": (auto(normal, encoder=lambda: 0), ValueError, "one plate.*got \\[\\]"),
    "encoder of two plates": (
        auto(two_plates, encoder=lambda: 0),
        ValueError,
        r"one plate with local latents, got \['a', 'b'\].*mapping",
    ),
    "encoder returns no tensor": (
        auto(of_data, torch.zeros(3), encoder=lambda x: [0.0]),
        TypeError,
        "return a tensor, got list",
    ),
    "encoder returns no rows": (
        auto(of_data, torch.zeros(3), encoder=lambda x: x),
        ValueError,
        r"features \[data, C\].*got shape \(3,\)",
    ),
    "encoder returns other rows than the caller's": (
        auto(index_from_outside, torch.arange(4), encoder=lambda i: torch.zeros(10, 2)),
        ValueError,
        r"'data' is given its subsample by the caller; expected.*\(4,\), got \(10,\)",
    ),
    "number of draws": (
        lambda: draws().sample_posterior(0),
        ValueError,
        "num_samples: expected at least 1, got 0",
    ),
    "quantiles": (lambda: draws().quantiles([0.5, 1.5]), ValueError, r"in \[0, 1\], got.*1.5"),
    "no globals": (
        lambda: AutoImplicit(two_plates).sample_latent(),
        ValueError,
        "no latents outside of local plates",
    ),
    # models
    "discrete latent": (auto(discrete), ValueError, r"site 'k' is discrete.*hide=\['k'\]"),
    "discrete latent, feasible start": (
        auto(discrete, init_loc_fn=init_to_feasible),
        ValueError,
        r"discrete sample site 'k'.*enumerating",
    ),
    "discrete latent with an initial value": (
        auto(discrete, init_loc_fn=init_to_value(values={"k": torch.tensor(1)})),
        ValueError,
        r"site 'k' is discrete.*hide=\['k'\].*TraceImplicitEnum_ELBO",
    ),
    "latent of one branch": (auto(a_latent_of_one_branch), ValueError, r"same latents.*\['w'\]"),
    "size that varies": (auto(a_size_that_varies), ValueError, r"same latents.*\['z'\]"),
    "bounds of a latent": (
        auto(bounds_of_a_latent),
        ValueError,
        r"site 'z': expected the same support in every run.*another latent.*width \* pyro.sample",
    ),
    "bounds of a subsample": (
        auto(bounds_of_a_subsample),
        ValueError,
        "site 'z': expected the same support in every run.*subsample",
    ),
    "sequential plate": (auto(sequential_plate), NotImplementedError, "sequential pyro.plate"),
    "sphere": (auto(sphere), ValueError, "spherical sample site 'z'.*ProjectedNormal"),
    "no latents": (auto(empty), RuntimeError, "found no latent variables"),
    "data and no latents": (auto(observed_alone), RuntimeError, "found no latent variables"),
    "subsample without index or encoder": (
        auto(index_from_outside, torch.arange(4)),
        ValueError,
        "'data' is given its subsample by the caller.*create_plates=.*encoder=",
    ),
    "other rows in a list": (
        in_a_list_with_other_rows,
        ValueError,
        "expected features of the 5 rows of plate 'data', got 3.*create_plates",
    ),
    # data
    "empty batch": (
        auto(of_data, torch.zeros(0), local_plates=["data"]),
        ValueError,
        "a plate is empty; expected data",
    ),
    "empty data": (auto(of_data, torch.zeros(0)), ValueError, "a plate is empty; expected data"),
    "empty subsample": (
        auto(index_from_outside, torch.arange(0)),
        ValueError,
        "a plate is empty; expected data",
    ),
    "NaN in the data": (
        auto(of_data, torch.tensor([0.0, NAN])),
        ValueError,
        "data of site 'x' have NaN",
    ),
    "initial value outside of the support": (
        auto(
            lambda: pyro.sample("s", dist.LogNormal(0.0, 1.0)),
            init_loc_fn=init_to_value(values={"s": torch.tensor(0.0)}),
        ),
        ValueError,
        "inside the support of site 's'",
    ),
    "initial value that is NaN": (
        auto(normal, init_loc_fn=init_to_value(values={"z": torch.tensor(NAN)})),
        ValueError,
        "(?i)nan|support",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_error(row: str) -> None:
    call, error, words = ERRORS[row]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_a_guide_that_failed_can_be_called_again() -> None:
    """Half a structure is not kept."""
    guide = AutoImplicit(of_data)
    with pytest.raises(ValueError, match="empty"):
        guide(torch.zeros(0))
    assert guide(torch.zeros(3))["z"].shape == (3,)


@pytest.mark.parametrize("call", ["forward", "sample_posterior"])
def test_a_first_call_in_inference_mode_may_come_before_training(call: str) -> None:
    guide, x = AutoImplicit(of_data), torch.zeros(3)
    with torch.inference_mode():
        if call == "forward":
            guide(x)
        else:
            guide.sample_posterior(2, x)
    elbo = TraceImplicit_ELBO(SMALL, num_particles=2, vectorize_particles=True)
    svi = SVI(of_data, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    before = [p.detach().clone() for p in guide.parameters()]
    svi.step(x)
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_a_division_by_zero_of_the_model_is_its_own() -> None:
    def divides() -> None:
        pyro.sample("z", dist.Normal(0.0, 1 / 0.0))

    with pytest.raises(ZeroDivisionError):
        AutoImplicit(divides)()


def step_on(x: Tensor, validate: bool = True) -> None:
    """Train on good data, then on ``x``; no parameter may change."""
    guide = AutoImplicit(of_data)
    elbo = TraceImplicit_ELBO(SMALL, num_score_samples=16)
    svi = SVI(of_data, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    svi.step(torch.zeros(3))
    before = [p.detach().clone() for p in guide.parameters()]
    try:
        with pyro.validation_enabled(validate):
            svi.step(x)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Encountered NaN. loss")
@pytest.mark.parametrize("validate", [True, False])
def test_nan_in_later_data(validate: bool) -> None:
    words = "Expected value argument" if validate else "loss is NaN.*model and guide are as before"
    with pytest.raises(ValueError, match=words):
        step_on(torch.tensor([0.0, NAN, 1.0]), validate)


def test_other_sizes_in_later_data() -> None:
    with pytest.raises(ValueError, match=r"(?s)(data|z).*(3.*5|5.*3)"):
        step_on(torch.zeros(5))


def test_later_latents_that_the_prototype_has_not() -> None:
    def model(more: bool = False) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if more:
            pyro.sample("w", dist.Normal(z, 1.0))

    guide = AutoImplicit(model)
    elbo = TraceImplicit_ELBO(SMALL, num_score_samples=16)
    elbo.loss_and_grads(model, guide)
    with pytest.warns(UserWarning, match="in model but not guide: {'w'}"):
        elbo.loss_and_grads(model, guide, True)


def test_losses_that_need_the_density() -> None:
    guide = AutoImplicit(normal)
    with pytest.raises(NotImplementedError, match=r"no density.*TraceImplicit_ELBO"):
        pyro.infer.Trace_ELBO().loss(normal, guide)


def test_a_hidden_discrete_site_is_no_error() -> None:
    assert set(AutoImplicit(poutine.block(discrete, hide=["k"]))()) == {"z"}


def test_models_that_only_run_from_the_start_are_checked_too() -> None:
    """An improper prior cannot be drawn from."""
    improper = dist.ImproperUniform(dist.constraints.real, (), ())

    def subsampled(index: Tensor) -> None:
        mu = pyro.sample("mu", improper)
        with pyro.plate("data", 8, subsample=index):
            pyro.sample("z", dist.Normal(mu, 1.0))

    def observed(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("mu", improper), 1.0), obs=x)

    start = init_to_value(values={"mu": torch.zeros(()), "z": torch.zeros(3)})
    with pytest.raises(ValueError, match="'data' is given its subsample by the caller"):
        AutoImplicit(subsampled, init_loc_fn=start)(torch.tensor([5, 6, 7]))
    with pytest.raises(ValueError, match="the data of site 'x' have NaN"):
        AutoImplicit(observed, init_loc_fn=start)(torch.tensor(NAN))


def test_nan_that_is_no_data() -> None:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.deterministic("log_a", a.log())
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    AutoImplicit(model)(torch.tensor(1.0))


def test_masked_latents_are_warned_of() -> None:
    """Nothing but their entropy acts on them."""
    x, seen = torch.zeros(3), torch.tensor([True, False, True])

    def missing() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)

    with pytest.warns(UserWarning, match=r"'x_unobserved' are masked out.*hide=\['x_unobserved'\]"):
        AutoImplicit(missing)()
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoImplicit(poutine.block(missing, hide=["x_unobserved"]))()
