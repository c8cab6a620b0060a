# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import biject_to

from pyro_ardae.traces import guide_draws
from pyro_ardae.unconstrained import UnconstrainedModel

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def mixed(x: Tensor) -> None:
    """Scalar, simplex, vector in a plate, scalar in two plates; a mask and a factor."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(4)))
    pyro.factor("factor", -mu.square() - weight[..., 0])
    with pyro.plate("row", 3, dim=-2):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("column", 5, dim=-1), poutine.mask(mask=x > -0.5):
            shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(mu + shape + scale.sum(-1), 1.0), obs=x)


def local(x: Tensor) -> None:
    with pyro.plate("row", 3, dim=-2), pyro.plate("column", 5, dim=-1):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(scale.sum(-1), 1.0), obs=x)


@pytest.mark.usefixtures("float64")
def test_log_joint_is_minus_the_potential_of_pyro() -> None:
    joint = UnconstrainedModel(mixed, X)
    assert (joint.dim, joint.batch_shape, joint.plates) == (1 + 3 + 6 + 15, (), ())
    values = guide_draws(AutoNormal(mixed, init_scale=0.5), joint.sites, (X,), 4, 2)
    found = joint.log_joint(joint.pack(values))
    _, potential, _, _ = initialize_model(mixed, (X,))
    for i in range(4):
        real = {}
        for name, site in joint.sites.items():
            value = values[name][i].reshape(site["value"].shape)
            real[name] = biject_to(site["fn"].support).inv(value)
        # Where it is masked out, u counts as standard normal, and not by its Jacobian, exp(u).
        u = real["shape"][X <= -0.5]
        extra = (dist.Normal(0.0, 1.0).log_prob(u) - u).sum()
        torch.testing.assert_close(found[i], extra - potential(real), atol=1e-10, rtol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", [mixed, local])
def test_unpack_inverts_pack(model: Any) -> None:
    joint = UnconstrainedModel(model, X)
    values = guide_draws(AutoNormal(model), joint.sites, (X,), 6, 2)
    latent = joint.pack(values)
    assert latent.shape == (6, *joint.batch_shape, joint.dim)
    for name, value in joint.unpack(latent).items():
        torch.testing.assert_close(value, values[name])


def test_sites_that_share_all_plates_are_a_batch() -> None:
    joint = UnconstrainedModel(local, X)
    assert (joint.dim, joint.batch_shape, joint.plates) == (2, (3, 5), ("row", "column"))
    latent = torch.zeros(2, 3, 5, 2, dtype=torch.double)
    latent[1, 0, 0] = 1.0
    first, second = joint.log_joint(latent)
    changed = (first - second).abs() > 1e-6
    assert changed.nonzero().tolist() == [[0, 0]]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", [mixed, local])
@pytest.mark.parametrize("draws", [1, 4])
def test_runs_one_by_one_have_the_same_log_joint(model: Any, draws: int) -> None:
    found = []
    for parallel in (True, False):
        joint = UnconstrainedModel(model, X, parallel=parallel)
        size = (draws, *joint.batch_shape, joint.dim)
        latent = torch.linspace(-1.0, 1.0, math.prod(size)).reshape(size).requires_grad_()
        value = joint.log_joint(latent)
        found.append((value, *torch.autograd.grad(value.sum(), latent)))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("float64")
def test_draws_one_by_one_have_the_same_shapes() -> None:
    joint = UnconstrainedModel(mixed, X)
    guide = AutoDiagonalNormal(mixed)
    shapes = [
        {name: value.shape for name, value in draws.items()}
        for draws in (
            guide_draws(guide, joint.sites, (X,), 3, 2, parallel=parallel)
            for parallel in (True, False)
        )
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "prior",
    [
        dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
        dist.Dirichlet(torch.ones(3)),
        dist.LKJCholesky(3),
        dist.TransformedDistribution(
            dist.Beta(1.0, 1.0), [dist.transforms.AffineTransform(-1.0, 2.0)]
        ),
    ],
)
def test_fixed_supports_are_no_error(prior: Any) -> None:
    """The bounds may be tensors, made anew in every run."""
    joint = UnconstrainedModel(lambda: pyro.sample("z", copy.deepcopy(prior)))
    assert torch.isfinite(joint.log_joint(torch.zeros(2, joint.dim))).all()


def test_the_random_stream_goes_on_as_after_one_run() -> None:
    torch.manual_seed(0)
    poutine.trace(local).get_trace(X)
    expected = torch.rand(())
    torch.manual_seed(0)
    UnconstrainedModel(local, X)
    assert torch.equal(torch.rand(()), expected)


def test_scales_are_left_out() -> None:
    scaled = UnconstrainedModel(poutine.scale(local, 0.1), X)
    plain = UnconstrainedModel(local, X)
    latent = torch.zeros(1, 3, 5, 2, dtype=torch.double)
    torch.testing.assert_close(scaled.log_joint(latent), plain.log_joint(latent))


def test_errors() -> None:
    def nothing() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def discrete() -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    def subsampled() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(4))

    def given() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(4))

    def bounds() -> None:
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Uniform(low, low + 1.0))

    def one_of_two_rows() -> None:
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        upper = torch.stack([width, torch.ones(())])
        pyro.sample("z", dist.Uniform(torch.zeros(2), upper).to_event(1))

    for model, message in (
        (bounds, "site 'z': expected the same support in every run.*varies, of a Uniform"),
        (one_of_two_rows, "site 'z': expected the same support.*varies, of a Independent"),
        (nothing, "expected a model with latent sites, got none"),
        (discrete, "site 'k': expected continuous latents, got a discrete Categorical"),
        (subsampled, "plate 'data': expected all data, got a subsample"),
        (given, "plate 'data': expected all data, got a subsample"),
    ):
        with pytest.raises(ValueError, match=message):
            UnconstrainedModel(model)
    joint = UnconstrainedModel(local, X)
    with pytest.raises(ValueError, match="draws all latent sites of the model, got none for 'sca"):
        guide_draws(lambda x: None, joint.sites, (X,), 3, 2)

    def infinite(x: Tensor) -> None:
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 5, dim=-1):
            pyro.sample("scale", dist.Delta(torch.full((2,), torch.inf), event_dim=1))

    with pytest.raises(ValueError, match="site 'scale': expected finite draws"):
        guide_draws(infinite, joint.sites, (X,), 3, 2)
