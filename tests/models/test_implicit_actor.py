# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from models.implicit_actor import ImplicitActor, PartPosterior


@pytest.mark.usefixtures("float64")
def test_implicit_actor_by_hand() -> None:
    actor = ImplicitActor(
        3,
        2,
        hidden_dims=(8,),
        noise_dim=4,
        noise_hidden_dims=(8,),
        noise_scale=2,
        part_scale=0.5,
        part_bits=2,
    )
    with torch.no_grad():
        actor.trunk.layers[-2].normal_(std=0.3)
        actor.side.weight.normal_(std=0.1)
    obs, noise = torch.randn(5, 3), torch.randn(6, 5, 6)
    head = actor.trunk(obs)[0]
    encoded = actor.encode(obs)
    part = actor.choose(encoded, 6)
    assert part.shape == (6, 5)
    code = 1.0 - 2 * torch.stack([part % 2, part // 2], -1)
    hidden = torch.relu(head[:, 8:] + code @ actor.of_part.weight.mT)
    loc, log_scale = actor.side(hidden).chunk(2, -1)
    inputs = torch.cat([noise[..., :4], code], -1)
    hidden = torch.relu(head[:, 8:] + 2 * inputs @ actor.of_noise.weight.mT)
    center, raw = actor.net.last(hidden).chunk(2, -1)
    y = 0.75**0.5 * noise[..., :2] + center
    y = y + (torch.log1p(raw.exp()) + actor.min_scale) * noise[..., 4:]
    assert torch.allclose(actor.deviate(encoded, part, noise), y, atol=1e-12)
    z = head[:, :2] + head[:, 2:4].exp() * (0.5 * code + loc + log_scale.exp() * y)
    assert torch.allclose(actor(obs, part, noise), z, atol=1e-12)
    logits = head[:, 4:8].clamp(-4, 4)
    assert torch.allclose(encoded.log_weights, logits.log_softmax(-1), atol=1e-12)
    # One part for all draws.
    one = actor.deviate(encoded, part[:1], noise)
    assert torch.equal(one, actor.deviate(encoded, part[:1].expand(6, -1), noise))


@pytest.mark.parametrize("action_dim", [1, 2, 5, 6, 17])
def test_parts_start_apart(action_dim: int) -> None:
    actor = ImplicitActor(3, action_dim, noise_dim=20)
    assert torch.allclose(actor.spots.norm(dim=0), torch.full((action_dim,), 0.85))
    assert actor.num_parts == 2 ** min(action_dim + 2, 6)
    places = (actor.codes @ actor.spots).unique(dim=0)
    assert len(places) == (3 * 2 if action_dim == 1 else actor.num_parts)


def test_logits_return_from_beyond_their_bound() -> None:
    actor = ImplicitActor(3, 1, part_bits=1)
    for logit, direction, moves in ((9.0, 1, False), (9.0, -1, True), (1.0, 1, True)):
        with torch.no_grad():
            actor.trunk.layers[-1][..., 2] = logit
        actor.zero_grad()
        (-direction * actor.encode(torch.randn(4, 3)).log_weights[:, 0].sum()).backward()
        assert actor.trunk.flat.grad is not None
        of_logit = actor.trunk.flat.grad[-actor.trunk.layers[-1].shape[-1] :][2]
        assert bool(of_logit * direction < 0) == moves


def test_parts_have_their_probability(standard_errors: Callable[[int], float]) -> None:
    actor = ImplicitActor(3, 3, part_bits=3)
    with torch.no_grad():
        logits = torch.tensor([1.0, -2.0, 0.3, 0.8, -1.0, 2.0, 0.0, 0.5])
        actor.trunk.layers[-1][..., 6:14] = logits
    obs, count = torch.randn(1, 3), 20_000
    encoded = actor.encode(obs)
    exact = logits.softmax(-1)
    assert torch.allclose(encoded.log_weights.exp(), exact, atol=1e-6)
    share = torch.bincount(actor.choose(encoded, count).flatten(), minlength=8) / count
    error = (exact * (1 - exact) / count).sqrt()
    assert ((share - exact).abs() < standard_errors(8) * error).all()


@pytest.mark.usefixtures("float64")
def test_center_climbs_from_the_highest_of_the_parts_locations() -> None:
    actor = ImplicitActor(3, 2)
    for parameter in (actor.side.weight, actor.of_part.weight, actor.trunk.flat):
        torch.nn.init.normal_(parameter, std=0.1)
    obs = torch.randn(2, 50, 3)
    encoded = actor.encode(obs)
    parts = torch.arange(16).view(16, 1, 1).expand(16, 2, 50)
    loc, log_scale = (of.movedim(0, -2) for of in actor.place(encoded, parts))
    components = Independent(Normal(loc, log_scale.exp()), 1)
    mixture = MixtureSameFamily(Categorical(logits=encoded.log_weights), components)
    found = (actor.center(obs) - encoded.loc) / encoded.log_scale.exp()
    highest = torch.stack([mixture.log_prob(place) for place in loc.unbind(-2)]).amax(0)
    gain = mixture.log_prob(found) - highest
    assert gain.min() > -1e-9
    assert (gain > 1e-3).any()
    assert actor.center(obs[0]).allclose(actor.center(obs)[0])
    # Not between two parts that are far apart, but at the one with the larger share of the draws.
    far = ImplicitActor(3, 1, part_bits=1)
    with torch.no_grad():
        far.spots.fill_(20.0)
        far.trunk.layers[-1][..., 2:4] = torch.tensor([0.0, 1.0])
        encoded = far.encode(obs)
        expected = encoded.loc + encoded.log_scale.exp() * far.place(encoded, parts[1])[0]
    assert far.center(obs).allclose(expected)


@pytest.mark.usefixtures("float64")
def test_posterior_of_the_parts_starts_exact_and_normalizes() -> None:
    actor = ImplicitActor(3, 2)
    posterior = PartPosterior(actor)
    encoded = actor.encode(torch.randn(5, 3))
    encoded = encoded._replace(log_weights=torch.randn(5, 16).log_softmax(-1))
    u = torch.randn(7, 5, 2)
    # Before training: Bayes' rule for normals with variance 1 - kappa^2.
    places = (actor.codes @ actor.spots).view(16, 1, 1, 2)
    evidence = Normal(places, (1 - actor.part_scale**2) ** 0.5).log_prob(u).sum(-1).movedim(0, -1)
    for even in (0, 2, 5):
        prior = encoded.log_weights.clone()
        prior[:even] = -math.log(16)
        expected = (prior + evidence).log_softmax(-1)
        assert torch.allclose(posterior(encoded, u, even=even), expected, atol=1e-12)
    with torch.no_grad():
        posterior.net.last.weight.normal_()
    assert torch.allclose(posterior(encoded, u).exp().sum(-1), torch.ones(7, 5), atol=1e-12)
    # Of one part each, with the gradient by autograd.
    part = torch.randint(16, (5,))
    u = u[0].requires_grad_()
    told = posterior(encoded, u.unsqueeze(0))[0, torch.arange(5), part]
    (by_u,) = torch.autograd.grad(told.sum(), u)
    value, gradient = posterior.value_and_gradient(encoded, u, part)
    assert torch.allclose(value, told, rtol=0, atol=1e-12)
    assert torch.allclose(gradient, by_u, rtol=0, atol=1e-12)


def test_spread_before_training() -> None:
    z = ImplicitActor(3, 2, spread=0.6, min_scale=0.02).draw(torch.randn(1, 3), 10_000)
    # The networks add some to the scale of 0.6.
    assert 0.5 < float(z.detach().std()) < 1.2
    assert math.isfinite(float(z.detach().abs().max()))


def test_bad_parts() -> None:
    with pytest.raises(ValueError, match=r"expected part_scale in \[0, 0.9\], got 1"):
        ImplicitActor(3, 2, part_scale=1)
    with pytest.raises(ValueError, match="expected part_bits >= 1, got 0"):
        ImplicitActor(3, 2, part_bits=0)


@pytest.mark.parametrize("options", [{"noise_dim": 1}, {"noise_hidden_dims": ()}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected noise_dim >= action_dim = 2 and one layer"):
        ImplicitActor(3, 2, **options)  # type: ignore[arg-type]
