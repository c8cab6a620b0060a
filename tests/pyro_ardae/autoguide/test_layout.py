# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Where each latent lies in a group's vectors: packing, unpacking, and the masses at its values."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from pyro_ardae import AutoImplicit
from pyro_ardae.autoguide.layout import Group, find_groups, point_mass
from pyro_ardae.autoguide.prototype import unconstrain

N, B, M, T = 7, 4, 5, 3


def model() -> None:
    """Globals, a full plate "t", subsampled "d" and "e", and their intersections."""
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Dirichlet(torch.ones(3)))
    d = pyro.plate("d", N, subsample_size=B, dim=-1)
    t = pyro.plate("t", T, dim=-2)
    e = pyro.plate("e", M, subsample_size=2, dim=-3)
    with t:
        pyro.sample("c", dist.LogNormal(0.0, 1.0))
    with d:
        pyro.sample("f", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with t:
            pyro.sample("g", dist.Dirichlet(torch.ones(3)))
    with e:
        pyro.sample("h", dist.Normal(0.0, 1.0))
        with d, t:
            pyro.sample("i", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def prototype() -> Any:
    return prune_subsample_sites(poutine.trace(model).get_trace())


def groups(**kwargs: Any) -> dict[tuple[str, ...], Group]:
    arguments: dict[str, Any] = {"local": set(), "encoded": set(), "created": {}, **kwargs}
    return {group.plates: group for group in find_groups(prototype(), **arguments)}


def test_globals_and_one_group_for_each_set_of_subsampled_plates() -> None:
    found = groups()
    names = {key: [slot.name for slot in group.slots] for key, group in found.items()}
    assert names == {
        (): ["a", "b", "c"],
        ("d",): ["f", "g"],
        ("e",): ["h"],
        ("e", "d"): ["i"],
    }
    assert next(iter(found)) == ()
    assert {key: group.dim for key, group in found.items()} == {
        (): 1 + 2 + T,
        ("d",): 2 + 2 * T,
        ("e",): 1,
        ("e", "d"): 2 * T,
    }
    assert found[("d",)].rows == (B,)
    assert found[("d",)].full_rows == (N,)
    assert found[("e",)].full_rows == (M, 1, 1)
    assert found[("e", "d")].full_rows == (M, 1, N)
    assert [group.name for group in found.values()] == [
        *("globals", "plate_d", "plate_e", "plate_e__d")
    ]


@pytest.mark.parametrize("name", ["train", "rows", "globals", "forward", "a plate!"])
def test_a_plate_may_have_any_name(name: str) -> None:
    """Also that of an attribute of a module, like ``train``."""

    def model() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate(name, 10, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoImplicit(model)
    assert guide()["z"].shape == (4,)
    assert guide.sample_posterior(3)["z"].shape == (3, 10)
    assert guide.train().posterior.training
    again = AutoImplicit(model)
    again()
    again.load_state_dict(guide.state_dict())


def test_plates_whose_names_cannot_be_told_apart() -> None:
    def model() -> None:
        for name in ("a b", "a_b"):
            with pyro.plate(name, 10, subsample_size=4):
                pyro.sample(f"z {name}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"got \['a_b'\] and \['a b'\].*both 'a_b'. Rename"):
        AutoImplicit(model)()


def test_a_full_plate_is_local_where_asked_for() -> None:
    found = groups(local={"t"})
    assert [slot.name for slot in found[("t",)].slots] == ["c"]
    assert found[("t",)].full_rows == (T, 1)
    assert found[("e", "t", "d")].dim == 2


def test_packing_undoes_unpacking() -> None:
    trace = prototype()
    for key, group in groups().items():
        latent = torch.randn(*group.full_rows, group.dim)
        values = group.unpack(latent)
        for slot in group.slots:
            site = trace.nodes[slot.name]
            shape = list(unconstrain(site).shape)
            for dim, (_, full) in zip(group.local_dims, group.sizes, strict=True):
                shape[dim - len(slot.event_shape)] = full
            assert values[slot.name].shape == tuple(shape)
        assert torch.equal(group.pack(values), latent), key


def test_latents_keep_their_dtypes() -> None:
    def mixed() -> None:
        pyro.sample("wide", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        pyro.sample("narrow", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    (group,) = find_groups(poutine.trace(mixed).get_trace(), set(), set(), {})
    values = group.unpack(torch.randn(4, 3, dtype=torch.double))
    assert values["wide"].dtype == torch.double
    assert values["narrow"].dtype == torch.float


def test_rows_stay_rows() -> None:
    """Row n of the latent holds what belongs to index n of the plate, and nothing else."""
    group = groups()[("e", "d")]
    latent = torch.zeros(M, 1, N, group.dim)
    latent[3, 0, 5] = torch.arange(group.dim) + 1.0
    value = group.unpack(latent)["i"]
    assert value.shape == (M, T, N, 2)
    assert torch.equal(value[3, :, 5].flatten(), torch.arange(group.dim) + 1.0)
    value[3, :, 5] = 0.0
    assert not bool(value.any())


def test_prototype_values_are_repeated_to_full_size() -> None:
    group = groups()[("d",)]
    values = {"f": torch.arange(B * 2.0).reshape(B, 2), "g": torch.zeros(T, B, 2)}
    packed = group.pack(values)
    assert packed.shape == (N, group.dim)
    assert torch.equal(packed[:, :2], values["f"][torch.arange(N) % B])


@pytest.mark.parametrize("lead", [(), (6,), (6, 1, 1, 1)])
def test_particles_stay_left_of_the_plates(lead: tuple[int, ...]) -> None:
    group = groups()[()]
    values = group.unpack(torch.randn(*lead, group.dim))
    if not lead:
        assert values["a"].shape == ()
        assert values["c"].shape == (T, 1)
    elif len(lead) == 1:  # rank 0: no room for particles but in front
        assert values["a"].shape == (6,)
    else:
        assert values["a"].shape == (6, 1, 1, 1)
        assert values["c"].shape == (6, 1, T, 1)


PRIORS: dict[str, dist.TorchDistribution] = {
    "real": dist.Normal(torch.zeros(3), 1.0),
    "positive": dist.LogNormal(torch.zeros(3, 2), 1.0).to_event(1),
    "interval": dist.Uniform(torch.zeros(3), 2.0),
    "simplex": dist.Dirichlet(torch.ones(3, 4)),
    "correlation": dist.LKJCholesky(3, 1.0).expand([3]),
    "masked": dist.LogNormal(torch.zeros(3, 2), 1.0).mask(False).to_event(1),
}


@pytest.mark.parametrize("row", PRIORS)
def test_point_mass_carries_both_jacobians(float64: None, row: str) -> None:
    prior = PRIORS[row]
    transform = biject_to(prior.support)
    z = transform.inv(prior.sample()).clone()
    log_det = torch.randn(z.shape)
    mass = point_mass(prior, z, log_det)
    assert mass.batch_shape == prior.batch_shape
    assert mass.event_shape == prior.event_shape
    jacobian = transform.log_abs_det_jacobian(z, transform(z)).reshape(3, -1).sum(-1)
    expected = -jacobian - log_det.reshape(3, -1).sum(-1)
    torch.testing.assert_close(mass.log_prob(transform(z)), expected)


def test_divergence_keeps_the_density() -> None:
    """Pyro's own formula for Delta drops it, and TraceMeanField_ELBO with it the Jacobian."""
    prior = dist.LogNormal(torch.zeros(3), 1.0)
    mass = point_mass(prior, torch.randn(3), torch.randn(3))
    expected = mass.log_density - prior.log_prob(mass.v)
    assert torch.equal(kl_divergence(mass, prior), expected)
    assert torch.equal(kl_divergence(mass.to_event(1), prior.to_event(1)), expected.sum(-1))


def test_values_must_be_inside_of_the_support() -> None:
    site: dict[str, Any] = {
        "name": "s",
        "fn": dist.LogNormal(0.0, 1.0),
        "value": torch.tensor(0.0),
    }
    with pytest.raises(ValueError, match=r"init_loc_fn.*inside the support of site 's'.*NaN"):
        unconstrain(site)


def test_type_of_values() -> None:
    group = groups()[()]
    value: Tensor = group.unpack(torch.zeros(group.dim, dtype=torch.float64))["b"]
    assert value.dtype == torch.float64
