# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from models.actors import FlowActor, GaussianActor, log_tanh_slope
from models.implicit_actor import ImplicitActor

ACTORS = [GaussianActor, FlowActor, ImplicitActor]


@pytest.mark.parametrize("kind", ACTORS)
@pytest.mark.parametrize("action_dim", [1, 3])
def test_shapes(kind: Callable[..., nn.Module], action_dim: int) -> None:
    actor = kind(5, action_dim, hidden_dims=(16,))
    obs = torch.randn(7, 5)
    assert actor.draw(obs, 4).shape == (4, 7, action_dim)
    assert actor.center(obs).shape == (7, action_dim)
    assert torch.equal(actor.center(obs), actor.center(obs))
    assert not torch.equal(actor.draw(obs), actor.draw(obs))
    actor.draw(obs).sum().backward()
    assert all(p.grad is not None for p in actor.parameters())


def test_importing_a_flow_leaves_validation_on() -> None:
    FlowActor(2, 2)
    assert torch.distributions.Distribution._validate_args


@pytest.mark.usefixtures("float64")
def test_log_tanh_slope() -> None:
    z = torch.linspace(-3, 3, 30).view(10, 3).requires_grad_()
    slope = log_tanh_slope(z)
    assert torch.allclose(slope, (1 - z.tanh().square()).log().sum(-1), atol=1e-10)
    (gradient,) = torch.autograd.grad(slope.sum(), z)
    assert torch.allclose(gradient, -2 * z.tanh(), atol=1e-10)
    assert torch.isfinite(log_tanh_slope(torch.tensor([-500.0, 500.0])))


@pytest.mark.usefixtures("float64")
def test_density_of_the_gaussian_is_that_of_torch() -> None:
    actor = GaussianActor(4, 2, hidden_dims=(8,))
    obs = torch.randn(6, 4)
    z, log_prob = actor.rsample_and_log_prob(obs)
    loc, log_scale = actor(obs)
    expected = TransformedDistribution(Normal(loc, log_scale.exp()), TanhTransform(cache_size=1))
    assert torch.allclose(log_prob, Normal(loc, log_scale.exp()).log_prob(z).sum(-1), atol=1e-10)
    of_action = expected.log_prob(z.tanh()).sum(-1)
    assert torch.allclose(log_prob - log_tanh_slope(z), of_action, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_density_of_the_flow_integrates_to_one() -> None:
    # In one dimension the map from noise is monotone, so that draws, sorted by their noise, give
    # the density by finite differences: log q(z) = log N(noise) - log dz / dnoise.
    actor = FlowActor(2, 1, hidden_dims=(8,), transforms=2)
    obs = torch.randn(1, 2)
    loc, log_scale, seen = actor(obs)
    flow = actor.flow(seen)
    noise = torch.linspace(-4, 4, 2001).unsqueeze(-1).requires_grad_()
    x = flow.transform.inv(noise.unsqueeze(1)).squeeze(1)
    (slope,) = torch.autograd.grad(x.sum(), noise)
    by_hand = Normal(0.0, 1.0).log_prob(noise) - slope.log()
    assert torch.allclose(flow.log_prob(x.unsqueeze(1)), by_hand, atol=1e-8)
    torch.manual_seed(1)
    z, log_prob = actor.rsample_and_log_prob(obs)
    inner = (z - loc) / log_scale.exp()
    assert torch.allclose(log_prob, flow.log_prob(inner) - log_scale.sum(-1), atol=1e-6)
