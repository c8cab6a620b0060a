# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from models.guides import DeviatingGuide, FullCovarianceGuide, GaussianGuide, ImplicitGuide
from models.networks import MLP
from models.toy import NormalDecoder
from models.vae import VAE
from pyro_ardae import Implicit, TraceImplicit_ELBO
from pyro_ardae.implicit import find_implicit

LATENT, FEATURES = 2, 16


def make(head: torch.nn.Module) -> VAE:
    trunk = MLP((2, 16, FEATURES), activate_output=True)
    decoder = NormalDecoder(LATENT, hidden_dims=(16,))
    return VAE(trunk, head, decoder, latent_dim=LATENT)


BASES = {"none": None, "diagonal": GaussianGuide, "full": FullCovarianceGuide}


def implicit(base: str) -> ImplicitGuide | DeviatingGuide:
    kind = BASES[base]
    if kind is None:
        return ImplicitGuide(FEATURES, LATENT, noise_dim=5, hidden_dims=(16,))
    normal = kind(FEATURES, LATENT)
    return DeviatingGuide(normal, FEATURES, LATENT, noise_dim=5, hidden_dims=(16,))


@pytest.mark.parametrize("base", BASES)
def test_implicit_head_draws_for_each_data_point(base: str) -> None:
    vae = make(implicit(base))
    posterior = vae.posterior(torch.randn(7, 2))
    assert isinstance(find_implicit(posterior), Implicit)
    assert posterior.sample((3,)).shape == (3, 7, LATENT)
    assert posterior.expand((4, 7)).sample((3,)).shape == (3, 4, 7, LATENT)
    assert vae.log_joint(torch.randn(7, 2), posterior.sample((3,))).shape == (3, 7)


@pytest.mark.parametrize("base", ["diagonal", "full"])
def test_with_a_base_the_implicit_head_starts_as_that_gaussian(base: str) -> None:
    torch.manual_seed(0)
    head = implicit(base)
    assert isinstance(head, DeviatingGuide)
    features = torch.randn(3, FEATURES)
    draws = head(features).sample((20_000,))
    loc, scale = head.base.moments(features)
    # 5 standard errors of a mean and of a standard deviation.
    error = 5 * scale.max() / 20_000**0.5
    assert (draws.mean(0) - loc).abs().max() < error
    assert (draws.std(0) - scale).abs().max() < error


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        (GaussianGuide(FEATURES, LATENT), Trace_ELBO()),
        *((implicit(base), TraceImplicit_ELBO()) for base in BASES),
    ],
)
def test_every_parameter_gets_a_gradient(head: torch.nn.Module, loss: Trace_ELBO) -> None:
    vae = make(head)
    assert isinstance(loss.loss_and_grads(vae.model, vae.guide, torch.randn(32, 2)), float)
    missing = [name for name, p in vae.named_parameters() if p.grad is None]
    assert not missing


def test_beta_scales_the_latents_terms_only() -> None:
    vae = make(GaussianGuide(FEATURES, LATENT))
    x = torch.randn(5, 2)
    for program in (vae.model, vae.guide):
        sites = poutine.trace(program).get_trace(x, 0.25).nodes
        assert sites["z"]["scale"] == 0.25
        assert sites.get("x", {"scale": 1.0})["scale"] == 1.0


def test_the_loss_is_the_elbo_of_the_tensor_methods() -> None:
    vae = make(GaussianGuide(FEATURES, LATENT))
    x = torch.randn(5, 2)
    torch.manual_seed(3)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(3)
    posterior = vae.posterior(x)
    z = posterior.rsample()
    elbo = vae.log_joint(x, z) - posterior.log_prob(z)
    assert loss == pytest.approx(-elbo.sum().item(), rel=1e-5)


def test_two_models_keep_apart_by_name() -> None:
    pyro.clear_param_store()
    vae, other = make(GaussianGuide(FEATURES, LATENT)), make(GaussianGuide(FEATURES, LATENT))
    other.name = "other"
    for one in (vae, other):
        one.model(torch.randn(3, 2))
        one.guide(torch.randn(3, 2))
    assert len(list(pyro.get_param_store().keys())) == 2 * len(list(vae.parameters()))


def test_errors_of_the_implicit_head() -> None:
    base = GaussianGuide(4, 3)
    with pytest.raises(ValueError, match="noise_dim: expected at least latent_dim = 3, got 2"):
        DeviatingGuide(base, 4, 3, noise_dim=2, hidden_dims=(8,))
    with pytest.raises(ValueError, match=r"gain: expected a number in \(0, 1\), got 1.5"):
        DeviatingGuide(base, 4, 3, noise_dim=3, hidden_dims=(8,), gain=1.5)
    with pytest.raises(ValueError, match="hidden_dims: expected at least one"):
        ImplicitGuide(4, 3, noise_dim=3, hidden_dims=())
