# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""VAEs with more than one latent: two levels, and an auxiliary one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from models.auxiliary_vae import AuxiliaryVAE
from models.guides import DeviatingGuide, GaussianGuide
from models.hierarchical_guide import HierarchicalGuide, ReverseGuide
from models.networks import MLP, ConditionalMLP
from models.toy import NormalDecoder
from models.two_level_vae import TwoLevelDecoder, TwoLevelVAE
from models.vae import VAE
from pyro_ardae import TraceImplicit_ELBO
from tests.models import test_vae
from tests.models.test_guides import disturb
from tests.pyro_ardae.oracle import Oracle

DATA, LATENT, FEATURES, BATCH = 2, 3, 8, 5


def head(kind: str) -> nn.Module:
    if kind == "gaussian":
        return GaussianGuide(FEATURES, LATENT)
    base = GaussianGuide(FEATURES, LATENT)
    return DeviatingGuide(base, FEATURES, LATENT, noise_dim=4, hidden_dims=(8,))


def two_levels(kind: str) -> TwoLevelVAE:
    prior_net = MLP((LATENT, FEATURES), activate_output=True)
    return TwoLevelVAE(
        MLP((DATA, FEATURES), activate_output=True),
        head(kind),
        TwoLevelDecoder(
            NormalDecoder(LATENT, DATA, hidden_dims=(8,)),
            prior_net,
            feature_dim=FEATURES,
            latent_dim=LATENT,
        ),
        second_trunk=ConditionalMLP(LATENT, FEATURES, sizes=(8, FEATURES), activate_output=True),
        second_head=head(kind),
        latent_dim=LATENT,
    )


def auxiliary() -> AuxiliaryVAE:
    guide = HierarchicalGuide(FEATURES, LATENT, auxiliary_dim=4, hidden_dims=(8,))
    disturb(guide)
    return AuxiliaryVAE(
        MLP((DATA, FEATURES), activate_output=True),
        guide,
        NormalDecoder(LATENT, DATA, hidden_dims=(8,)),
        reverse=ReverseGuide(DATA, LATENT, auxiliary_dim=4, hidden_dims=(8, 8)),
        latent_dim=LATENT,
    )


def test_two_levels_by_hand(float64: None) -> None:
    vae = two_levels("gaussian")
    x = torch.randn(BATCH, DATA)
    posterior = vae.posterior(x)
    z = posterior.sample((7,))
    assert z.shape == (7, BATCH, 2 * LATENT)
    first, second = z.chunk(2, -1)
    expected = (
        dist.Normal(0.0, 1.0).log_prob(second).sum(-1)
        + vae.decoder.prior(second).log_prob(first)
        + vae.decoder.decoder(first).log_prob(x)
    )
    torch.testing.assert_close(vae.log_joint(x, z), expected)
    of_first = vae.head(vae.trunk(x)).log_prob(first)
    trunk = vae.second_trunk
    of_second = vae.second_head(trunk(first, trunk.project(vae.trunk(x)))).log_prob(second)
    torch.testing.assert_close(posterior.log_prob(z), of_first + of_second)
    assert vae.prior(x).sample((9,)).shape == (9, 2 * LATENT)


@pytest.mark.parametrize("kind", ["two levels", "auxiliary"])
def test_the_loss_is_the_elbo_of_the_tensor_methods(float64: None, kind: str) -> None:
    vae: VAE = auxiliary() if kind == "auxiliary" else two_levels("gaussian")
    x = torch.randn(BATCH, DATA)
    torch.manual_seed(3)
    loss = Trace_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x)
    torch.manual_seed(3)
    log_joint, guide = vae.explicit(x)
    z = guide.sample()
    with torch.no_grad():
        elbo = (log_joint(z) - guide.log_prob(z)).sum()
    assert loss == pytest.approx(-float(elbo), rel=1e-10)


def test_an_auxiliary_latent_leaves_the_marginal_as_it_is(float64: None) -> None:
    """The extended joint integrates to the model's own, over a grid of the auxiliary latent."""
    vae = auxiliary()
    vae.head.auxiliary_dim = 1
    vae.reverse = ReverseGuide(DATA, LATENT, auxiliary_dim=1, hidden_dims=(8, 8)).double()
    x, z = torch.randn(BATCH, DATA), torch.randn(BATCH, LATENT)
    grid = torch.linspace(-30, 30, 6001).reshape(-1, 1, 1).expand(-1, BATCH, 1)
    log_joint, _ = vae.explicit(x)
    extended = log_joint(torch.cat([grid, z.expand(6001, -1, -1)], -1))
    integral = extended.logsumexp(0) + torch.log(torch.tensor(0.01))
    torch.testing.assert_close(integral, vae.log_joint(x, z))


def test_gradient_of_two_implicit_levels_with_exact_scores(float64: None) -> None:
    """At the start both implicit parts are the noise itself, of score -y; what is left of the
    entropies are the scales, the second's a function of the first latent."""
    vae = two_levels("implicit")
    x = torch.randn(BATCH, DATA)

    def minus(y: Tensor, _context: Tensor | None) -> Tensor:
        return -y

    elbo = TraceImplicit_ELBO(
        lambda dim, width: Oracle(dim, width, minus), num_score_samples=2, max_plate_nesting=1
    )
    torch.manual_seed(3)
    state = torch.get_rng_state()
    noise = {}

    def remember(module: DeviatingGuide, name: str) -> None:
        original = module._sample

        def sample(eps: Tensor, features: Tensor, **given: Any) -> Tensor:
            noise.setdefault(name, eps)
            return original(eps, features, **given)

        module._sample = sample  # type: ignore[method-assign]

    remember(vae.head, "z1")
    remember(vae.second_head, "z2")
    torch.set_rng_state(state)
    elbo.loss_and_grads(vae.model, vae.guide, x)
    assert list(elbo.estimators) == ["z1", "z2"]
    found = {name: p.grad for name, p in vae.named_parameters()}
    vae.zero_grad(set_to_none=True)

    features = vae.trunk(x)
    loss = torch.zeros(())
    parts = []
    for module, name in ((vae.head, "z1"), (vae.second_head, "z2")):
        base = module.base(features).base_dist
        net = module.net
        deviation = net(noise[name], net.project(features), net.matrices())
        y = noise[name][..., :LATENT] + module.gain * deviation
        parts.append(base.loc + base.scale * y)
        # log q(y) of the exact score, as a surrogate; the transform's Jacobian.
        loss = loss - (y.detach() * y).sum() - base.scale.log().sum()
        features = vae.second_trunk(parts[0], vae.second_trunk.project(features))
    loss = loss - vae.log_joint(x, torch.cat(parts, -1)).sum()
    loss.backward()
    for name, parameter in vae.named_parameters():
        expected = parameter.grad
        assert (expected is None) == (found[name] is None), name
        if expected is not None:
            torch.testing.assert_close(found[name], expected, atol=1e-10, rtol=1e-10)


def test_conditional_draws_of_two_levels_start_as_the_normals(float64: None) -> None:
    vae = two_levels("implicit")
    x = torch.randn(BATCH, DATA)
    z, log_q = vae.conditional_draws(x, torch.Size((7,)))
    assert z.shape == (7, BATCH, 2 * LATENT)
    first, second = z.split(LATENT, -1)
    features = vae.trunk(x)
    joint = vae.second_trunk(first, vae.second_trunk.project(features))
    expected = vae.head.base(features).log_prob(first) + vae.second_head.base(joint).log_prob(
        second
    )
    torch.testing.assert_close(log_q, expected)


BUILD: dict[str, Callable[[], VAE]] = {
    "one level": lambda: test_vae.make(GaussianGuide(test_vae.FEATURES, test_vae.LATENT)),
    "two levels": partial(two_levels, "gaussian"),
    "auxiliary": auxiliary,
}


@pytest.mark.parametrize("kind", BUILD)
def test_fantasies_teach_the_guide_alone(float64: None, kind: str) -> None:
    vae = BUILD[kind]()
    x = torch.randn(BATCH, DATA)
    fantasies = vae.draw(3, x)
    assert fantasies.shape == (3, DATA)
    both = torch.cat([x, fantasies])
    elbo = Trace_ELBO(max_plate_nesting=1)

    def gradients(*args: Any) -> tuple[float, dict[str, Tensor]]:
        vae.zero_grad()
        torch.manual_seed(3)
        loss = elbo.loss_and_grads(vae.model, vae.guide, *args)
        return loss, {name: p.grad.clone() for name, p in vae.named_parameters()}

    loss, found = gradients(x, 0.7, fantasies)
    as_data, expected = gradients(both, 0.7)
    assert loss == pytest.approx(as_data, rel=1e-12)
    # The model's are what data and their latents give.
    torch.manual_seed(3)
    trace = poutine.trace(vae.guide).get_trace(both, 0.7)
    latents = {name: trace.nodes[name]["value"][:BATCH].detach() for name in trace.stochastic_nodes}
    vae.zero_grad()
    of_data = poutine.trace(poutine.condition(vae.model, latents)).get_trace(x, 0.7)
    (-of_data.log_prob_sum()).backward()
    expected |= {f"decoder.{name}": p.grad for name, p in vae.decoder.named_parameters()}
    torch.testing.assert_close(found, expected)


def test_reverse_guide_has_two_hidden_layers() -> None:
    with pytest.raises(ValueError, match="at least two hidden layers, got"):
        ReverseGuide(DATA, LATENT, auxiliary_dim=4, hidden_dims=(8,))
