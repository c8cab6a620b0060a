# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The export to ArviZ, on whichever of its two major versions is installed."""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_ardae import Implicit, to_arviz

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ's own, at its first import
    az = pytest.importorskip("arviz")

NEW = int(az.__version__.split(".")[0]) >= 1
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, ERROR), obs=y)
    pyro.deterministic("constant", torch.tensor(3.0))
    pyro.factor("factor", 0.0 * mu)


def implicit(y: Tensor) -> None:
    """All ten latents in one site; the model's sites are functions of it."""
    z = pyro.sample("z", Implicit(lambda e: e, 10), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(4 + 3 * z[..., 0]))
    pyro.sample("tau", dist.Delta(z[..., 1].exp()))
    with pyro.plate("school", 8):
        # [*, 8], with the dimension of the plate for those of particles that come before.
        pyro.sample("eta", dist.Delta(z[..., 2:].reshape(*z.shape[:-2], 8)))


@pytest.fixture(autouse=True)
def pyplot() -> Iterator[Any]:
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")
    matplotlib.use(before)


@pytest.fixture
def data() -> Any:
    return to_arviz(schools, AutoNormal(schools, init_scale=0.5), Y, num_samples=300)


def groups(data: Any) -> set[str]:
    return set(data.children) if NEW else set(data.groups())


def test_groups_dims_and_values(data: Any) -> None:
    assert groups(data) == {
        *("posterior", "posterior_predictive", "log_likelihood", "observed_data", "prior")
    }
    posterior = data["posterior"]
    assert set(posterior.data_vars) == {"mu", "tau", "eta", "theta", "constant"}
    assert posterior["mu"].dims == ("chain", "draw")
    assert posterior["eta"].dims == ("chain", "draw", "school")
    assert posterior["eta"].shape == (1, 300, 8)
    assert float(posterior["tau"].min()) > 0
    assert posterior["constant"].values.ravel().tolist() == [3.0] * 300
    theta = posterior["mu"] + posterior["tau"] * posterior["eta"]
    np.testing.assert_allclose(posterior["theta"], theta.transpose("chain", "draw", "school"), 1e-5)
    assert set(data["posterior_predictive"].data_vars) == {"y"}
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "school")
    assert data["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    # Drawn anew, not the data: the variance of y given theta is ERROR squared.
    residual = (data["posterior_predictive"]["y"] - posterior["theta"]) / ERROR.numpy()
    assert float(residual.var()) == pytest.approx(1.0, abs=4.4 * (2 / 2400) ** 0.5)
    density = dist.Normal(torch.tensor(posterior["theta"].values), ERROR).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["y"], density, rtol=1e-4, atol=1e-5)
    assert float(data["prior"]["mu"].std()) == pytest.approx(5.0, abs=4.4 * 5 / 600**0.5)
    assert posterior.attrs["inference_library"] == "pyro_ardae"


def test_an_implicit_guide() -> None:
    data = to_arviz(schools, implicit, Y, num_samples=500, prior=False)
    assert "prior" not in groups(data)
    assert float(data["posterior"]["mu"].mean()) == pytest.approx(4.0, abs=4.4 * 3 / 500**0.5)


@pytest.mark.filterwarnings("ignore")  # of ArviZ and what it calls
def test_what_arviz_does_with_it(data: Any, pyplot: Any) -> None:
    summary = az.summary(data)
    assert "theta[0]" in summary.index
    assert float(summary.loc["mu", "mean"]) == pytest.approx(
        float(data["posterior"]["mu"].mean()), abs=0.01
    )
    loo = az.loo(data)
    elpd = float(loo.elpd if NEW else loo.elpd_loo)
    assert -40 < elpd < -25  # 8 schools: about -31
    az.plot_pair(data, var_names=["mu", "tau"])
    (az.plot_ppc_dist if NEW else az.plot_ppc)(data)
    assert pyplot.get_fignums()


def test_names_of_dims_and_labels() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("place", 2, dim=-2), pyro.plate("day", 3, dim=-1):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(4)))
            pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)

    y = torch.zeros(2, 3)
    data = to_arviz(
        model,
        AutoNormal(model),
        y,
        num_samples=5,
        dims={"z": ["site", "day", "part"]},
        coords={"day": ["mon", "tue", "wed"]},
    )
    assert data["posterior"]["z"].dims == ("chain", "draw", "site", "day", "part")
    assert data["posterior"]["z"].coords["day"].values.tolist() == ["mon", "tue", "wed"]
    assert data["observed_data"]["y"].dims == ("place", "day")


def test_masked_and_local_data() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", 4), poutine.mask(mask=torch.tensor([True, True, False, True])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0).mask(True), obs=y)

    data = to_arviz(model, AutoNormal(model), torch.zeros(4), num_samples=3, prior=False)
    zero = data["log_likelihood"]["y"].values[0] == 0
    assert zero.tolist() == [[False, False, True, False]] * 3


def test_a_conditioned_model_and_no_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.5, 1.0))

    conditioned = poutine.condition(model, data={"x": torch.tensor(1.0)})
    data = to_arviz(conditioned, guide, num_samples=4)
    assert set(data["posterior"].data_vars) == {"z"}
    assert set(data["observed_data"].data_vars) == {"x"}

    def unobserved() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert groups(to_arviz(unobserved, guide, num_samples=4)) == {"posterior", "prior"}


def test_errors() -> None:
    guide = AutoNormal(schools)
    for options, message in (
        ({"num_samples": 1}, "num_samples: expected at least 2, got 1"),
        ({"dims": {"nu": ["a"]}}, "dims: expected names of sites, mu, tau, .* got nu"),
        ({"dims": {"eta": ["a", "b"]}}, r"dims: expected 1 names for site 'eta' of shape \(8,\)"),
        ({"coords": {"school": [1, 2]}}, "coords: expected labels .* got 2 for 'school'"),
        ({"coords": {"pupil": [1, 2]}}, "coords: expected labels .* got 2 for 'pupil'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_arviz(schools, guide, Y, **{"num_samples": 3, **options})  # type: ignore[arg-type]

    def subsampled(y: Tensor) -> None:
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:4])

    with pytest.raises(ValueError, match="plate 'data': expected all data, got a subsample"):
        to_arviz(subsampled, AutoNormal(subsampled), Y)


def from_dict_of_1(
    data: Any,
    *,
    name: Any = None,
    sample_dims: Any = None,
    save_warmup: Any = None,
    index_origin: Any = None,
    coords: Any = None,
    dims: Any = None,
    pred_dims: Any = None,
    pred_coords: Any = None,
    check_conventions: bool = True,
    attrs: Any = None,
) -> Any:
    """ArviZ 1.x's own in short: a tree of data sets, from {group: {variable: array}}.

    The signature is that of arviz-base 1; by its rules, groups with "data" in their names have no
    draws, and the log-likelihood none of an event's dimensions.
    """
    xarray = pytest.importorskip("xarray")
    sets = {}
    for group, variables in data.items():
        first = [] if "data" in group else ["chain", "draw"]
        arrays = {}
        for site, array in variables.items():
            own = list((dims or {}).get(site, []))[: array.ndim - len(first)]
            arrays[site] = xarray.DataArray(
                array,
                dims=[*first, *own],
                coords={dim: coords[dim] for dim in own},
            )
        sets[f"/{group}"] = xarray.Dataset(arrays)
    return xarray.DataTree.from_dict(sets)


def test_the_next_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """ArviZ 1.x takes the groups as one mapping, and returns a tree."""
    fake = types.ModuleType("arviz")
    fake.__version__ = "1.3.0"  # type: ignore[attr-defined]
    fake.from_dict = from_dict_of_1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arviz", fake)
    guide = AutoNormal(schools, init_scale=0.5)
    tree = to_arviz(schools, guide, Y, num_samples=20, coords={"school": list("ABCDEFGH")})
    assert set(tree.children) == {
        *("posterior", "posterior_predictive", "log_likelihood", "observed_data", "prior")
    }
    posterior = tree["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert posterior["theta"].sel(school="H").shape == (1, 20)
    assert tree["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert posterior.attrs["inference_library"] == "pyro_ardae"


def test_draws_one_by_one() -> None:
    """Of a model that would broadcast as well: the same data but for chance."""
    guide = AutoNormal(schools, init_scale=0.1)
    guide(Y)
    many, each = (
        to_arviz(schools, guide, Y, num_samples=300, parallel=parallel)
        for parallel in (True, False)
    )
    for group in ("posterior", "posterior_predictive", "log_likelihood", "observed_data", "prior"):
        assert {name: value.dims for name, value in many[group].items()} == {
            name: value.dims for name, value in each[group].items()
        }
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for name, one in many[group].items():
            means = [x.mean("draw").values for x in (one, each[group][name])]
            error = 5 * one.std("draw").values * (2 / 300) ** 0.5
            assert bool((abs(means[0] - means[1]) <= error + 1e-5).all()), name


def test_arviz_is_imported_when_it_is_needed() -> None:
    module = sys.modules[to_arviz.__module__]
    assert not hasattr(module, "arviz")
    assert az.__name__ not in {
        value.__name__ for value in vars(module).values() if inspect.ismodule(value)
    }


def test_a_reparameterized_site_is_derived_not_data() -> None:
    """Pyro makes of it an observed delta."""

    def plain(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(mu, 3.0))
            pyro.sample("y", dist.Normal(theta, ERROR), obs=y)

    model = poutine.reparam(plain, {"theta": LocScaleReparam(0.0)})
    guide = AutoNormal(model)
    guide(Y)
    data = to_arviz(model, guide, Y, num_samples=50)
    groups = {name: set(data[name].data_vars) for name in ("posterior", "observed_data")}
    assert groups == {"posterior": {"mu", "theta_decentered", "theta"}, "observed_data": {"y"}}
    assert set(data["log_likelihood"].data_vars) == {"y"}
    draws = {name: data["posterior"][name].values for name in ("mu", "theta", "theta_decentered")}
    expected = draws["mu"][..., None] + 3 * draws["theta_decentered"]
    np.testing.assert_allclose(draws["theta"], expected, rtol=1e-5)


def test_deterministic_sites_with_events_in_a_plate() -> None:
    """The plate is where the event is not, whatever their sizes."""

    def model() -> None:
        with pyro.plate("school", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            for name, count in (("two", 2), ("three", 3)):
                event = torch.arange(1.0, 1.0 + count) * theta.unsqueeze(-1)
                pyro.deterministic(name, event, event_dim=1)

    posterior = to_arviz(model, AutoNormal(model), num_samples=5).posterior
    for name in ("two", "three"):
        assert posterior[name].dims == ("chain", "draw", "school", f"{name}_dim_1")
    ratio = posterior["three"] / posterior["theta"]
    assert np.allclose(ratio.transpose("chain", "draw", "school", ...), [1.0, 2.0, 3.0], rtol=1e-5)
