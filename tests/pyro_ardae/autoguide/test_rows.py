# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Rows that an encoder sees: how many there are of them, and which."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, init_to_sample, init_to_value
from torch import Tensor

from pyro_ardae import AutoImplicit, TraceImplicit_ELBO
from tests.conftest import assert_equal

N = 10


def from_loader(batch: Tensor) -> None:
    """A minibatch whose index nobody knows."""
    with pyro.plate("data", N, subsample_size=len(batch)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch)


def of_all(batch: Tensor) -> None:
    """Data that are all there are."""
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch)


def by_index(x: Tensor, index: Tensor) -> None:
    """The caller's subsample."""
    with pyro.plate("data", N, subsample=index) as rows:
        pyro.deterministic("rows", rows.double(), event_dim=0)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def column(batch: Tensor) -> Tensor:
    return batch.unsqueeze(-1)


def of_index(x: Tensor, index: Tensor) -> Tensor:
    return x[index].unsqueeze(-1)


@pytest.mark.parametrize("sizes", [(4, 9, N, 4), (N, 4, 1, N)], ids=["part", "all"])
@pytest.mark.parametrize(("model", "total"), [(from_loader, N), (of_all, None)])
def test_rows_weigh_as_in_the_model(model: Any, total: int | None, sizes: tuple[int, ...]) -> None:
    """Whatever the first call has seen."""
    x, guide = torch.randn(N), AutoImplicit(model, encoder=column)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), TraceImplicit_ELBO(num_particles=2))
    for size in sizes:
        svi.step(x[:size])
        nodes = poutine.trace(guide).get_trace(x[:size]).nodes
        for name in ("z", "_AutoImplicit_data_latent"):
            assert nodes[name]["fn"].batch_shape == (size,)
            assert nodes[name]["scale"] == (1.0 if total is None else total / size)


def test_asking_the_model_leaves_the_noise_as_it_is() -> None:
    x, draws = torch.randn(N), []
    for first in (N, 4):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AutoImplicit(from_loader, encoder=column)
        guide(x[:first])
        torch.manual_seed(1)
        guide(x[:4])
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])


@pytest.mark.parametrize(("model", "total"), [(from_loader, N), (of_all, None)])
def test_without_the_model_plates_are_as_they_were(model: Any, total: int | None) -> None:
    """Of an unpickled guide. All of the data were other data, a subsample was of the same size."""
    x, guide = torch.randn(N), AutoImplicit(model, encoder=column)
    guide(x[:4])
    pyro.clear_param_store()
    other = pickle.loads(pickle.dumps(guide))
    for size in (4, N, 7, 1):
        nodes = poutine.trace(other).get_trace(x[:size]).nodes
        assert nodes["z"]["fn"].batch_shape == (size,)
        assert nodes["z"]["scale"] == (1.0 if total is None else total / size)


def test_starting_values_of_all_rows_and_a_minibatch() -> None:
    start = init_to_value(values={"z": torch.linspace(-9, 9, N)})
    x, guide = torch.randn(N), AutoImplicit(of_all, encoder=column, init_loc_fn=start)
    assert guide(x)["z"].shape == (N,)
    assert guide(x[:4])["z"].shape == (4,)


def test_an_improper_prior_and_a_minibatch() -> None:
    def model(batch: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=len(batch)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    x = torch.randn(N)
    start = lambda site: torch.zeros(site["fn"].shape())  # noqa: E731
    guide = AutoImplicit(model, encoder=column, init_loc_fn=start)
    for size in (N, 4):
        assert poutine.trace(guide).get_trace(x[:size]).nodes["z"]["scale"] == N / size


def test_features_of_other_rows() -> None:
    def model(batch: Tensor, shown: Tensor) -> None:
        from_loader(batch)

    x = torch.randn(N)
    guide = AutoImplicit(model, encoder=lambda batch, shown: column(shown))
    guide(x[:4], x[:4])
    with pytest.raises(ValueError, match="features of the 4 rows of plate 'data', got 3"):
        guide(x[:4], x[:3])


@pytest.mark.parametrize("first", [3, N])
def test_the_model_keeps_the_index_that_it_is_given(first: int) -> None:
    x = torch.randn(N)
    indices = [torch.arange(first), *(torch.randperm(N)[:size] for size in (3, 3, N, 4, N))]
    guide = AutoImplicit(by_index, encoder=of_index)
    svi = SVI(by_index, guide, pyro.optim.Adam({"lr": 1e-2}), TraceImplicit_ELBO(num_particles=2))
    for index in indices:
        svi.step(x, index)
        trace = poutine.trace(guide).get_trace(x, index)
        assert "data" not in trace.nodes
        assert trace.nodes["z"]["scale"] == N / len(index)
        seen = poutine.trace(poutine.replay(by_index, trace)).get_trace(x, index)
        assert seen.nodes["rows"]["value"].tolist() == index.tolist()


def test_a_list_makes_plates_for_its_parts() -> None:
    guide = AutoGuideList(by_index)
    guide.append(AutoImplicit(by_index, encoder=of_index))
    with pytest.raises(ValueError, match=r"given its subsample by the caller.*create_plates"):
        guide(torch.randn(N), torch.tensor([7, 1, 5]))


def by_chance() -> None:
    with pyro.plate("data", N, subsample_size=4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_a_deep_copy_is_a_snapshot() -> None:
    """Of rows as of networks."""
    guide = AutoImplicit(by_chance)
    svi = SVI(by_chance, guide, pyro.optim.Adam({"lr": 0.1}), TraceImplicit_ELBO(num_particles=2))
    svi.step()
    other = copy.deepcopy(guide)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    for _ in range(3):
        svi.step()
    other()
    after = other.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = guide.state_dict()
    assert not torch.equal(trained["posterior.plate_data.rows"], after["posterior.plate_data.rows"])


@pytest.mark.parametrize("unpickled", [False, True])
def test_a_live_guide_follows_the_store(unpickled: bool, tmp_path: Path) -> None:
    """Else the optimizer would move what the guide does not use."""
    guide = AutoImplicit(by_chance, init_loc_fn=init_to_sample)
    loss = TraceImplicit_ELBO(num_particles=2)
    svi = SVI(by_chance, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    svi.step()
    pyro.get_param_store().save(tmp_path / "store")
    saved = {name: value.clone() for name, value in guide.state_dict().items()}
    for _ in range(3):
        svi.step()
    if unpickled:
        guide = pickle.loads(pickle.dumps(guide))
        loss.reset()
        svi = SVI(by_chance, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    pyro.get_param_store().load(tmp_path / "store")
    guide()
    assert_equal(guide.state_dict(), saved)
    svi.step()
    moved = {n for n, value in guide.state_dict().items() if not torch.equal(value, saved[n])}
    assert "posterior.plate_data.rows" in moved
    assert "posterior.plate_data.init_loc" not in moved


def test_every_parameter_has_a_gradient() -> None:
    guide = AutoImplicit(by_chance)
    loss = TraceImplicit_ELBO(num_particles=2)(by_chance, guide)
    loss()
    parameters = [p for p in loss.parameters() if p.requires_grad]
    assert parameters
    torch.autograd.grad(loss(), parameters)


def test_a_new_guide_takes_the_start_from_the_store() -> None:
    first = AutoImplicit(by_chance, init_loc_fn=init_to_sample)
    first()
    second = AutoImplicit(by_chance, init_loc_fn=init_to_sample)
    second()
    assert_equal(second.state_dict(), first.state_dict())
