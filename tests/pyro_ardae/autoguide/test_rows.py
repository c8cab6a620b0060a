# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Rows that an encoder sees: how many there are of them, and which."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor

from pyro_ardae import AutoImplicit, TraceImplicit_ELBO

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


def test_a_copy_without_the_model_cannot_ask_it() -> None:
    x, guide = torch.randn(N), AutoImplicit(from_loader, encoder=column)
    guide(x[:4])
    other = pickle.loads(pickle.dumps(guide))
    assert other(x[:4])["z"].shape == (4,)
    with pytest.raises(RuntimeError, match=r"the number of rows has changed.*create_plates"):
        other(x)


def test_features_of_other_rows() -> None:
    def model(batch: Tensor, shown: Tensor) -> None:
        from_loader(batch)

    x = torch.randn(N)
    guide = AutoImplicit(model, encoder=lambda batch, shown: column(shown))
    guide(x[:4], x[:4])
    with pytest.raises(ValueError, match="features of the 4 rows of plate 'data', got 3"):
        guide(x[:4], x[:3])


def test_the_model_keeps_the_index_that_it_is_given() -> None:
    x, index = torch.randn(N), torch.tensor([7, 1, 5])
    guide = AutoImplicit(by_index, encoder=of_index)
    svi = SVI(by_index, guide, pyro.optim.Adam({"lr": 1e-2}), TraceImplicit_ELBO(num_particles=2))
    for _ in range(2):
        svi.step(x, index)
        trace = poutine.trace(guide).get_trace(x, index)
        assert "data" not in trace.nodes
        assert trace.nodes["z"]["scale"] == N / 3
        seen = poutine.trace(poutine.replay(by_index, trace)).get_trace(x, index)
        assert seen.nodes["rows"]["value"].tolist() == index.tolist()


def test_a_list_makes_plates_for_its_parts() -> None:
    guide = AutoGuideList(by_index)
    guide.append(AutoImplicit(by_index, encoder=of_index))
    with pytest.raises(ValueError, match=r"given its subsample by the caller.*create_plates"):
        guide(torch.randn(N), torch.tensor([7, 1, 5]))


def test_a_deep_copy_is_a_snapshot() -> None:
    """Of rows as of networks."""

    def model() -> None:
        with pyro.plate("data", N, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoImplicit(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceImplicit_ELBO(num_particles=2))
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
