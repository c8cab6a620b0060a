# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from models.energies import BOX, ENERGIES, Energy, log_normalizer
from models.unconditional import FlowPosterior, GaussianPosterior, ImplicitPosterior
from pyro_ardae import TraceImplicit_ELBO

energies = pytest.mark.parametrize("energy", ENERGIES.values(), ids=ENERGIES)


def density(name: str, x: float, y: float) -> float:
    """exp(-U) without the box, by the definitions of the paper, one point at a time."""
    w1 = math.sin(2 * math.pi * x / 4)
    w2 = 3 * math.exp(-0.5 * ((x - 1) / 0.6) ** 2)
    w3 = 3 / (1 + math.exp(-(x - 1) / 0.3))

    def normal(value: float, scale: float) -> float:
        return math.exp(-0.5 * (value / scale) ** 2)

    if name == "u1":
        return normal(math.hypot(x, y) - 2, 0.4) * (normal(x - 2, 0.6) + normal(x + 2, 0.6))
    if name == "u2":
        return normal(y - w1, 0.4)
    if name == "u3":
        return normal(y - w1, 0.35) + normal(y - w1 + w2, 0.35)
    return normal(y - w1, 0.4) + normal(y - w1 + w3, 0.35)


@energies
def test_formulas(energy: Energy, float64: None) -> None:
    z = 4 * torch.rand(50, 2) - 2
    expected = [density(energy.name, x, y) for x, y in z.tolist()]
    torch.testing.assert_close(energy(z).neg().exp(), torch.tensor(expected))
    far = torch.tensor([[7.0, 0.0], [-8.0, 0.0], [0.0, 8.0]])
    box = torch.tensor([1.0, 4.0, 4.0])
    torch.testing.assert_close(energy(far) - energy.formula(far), box)
    assert BOX == 6


@energies
def test_energy_and_gradient_are_finite_everywhere(energy: Energy) -> None:
    axis = torch.tensor([-1e3, -20.0, -6.0, -2.0, 0.0, 1.0, 2.0, 6.0, 20.0, 1e3])
    z = torch.cartesian_prod(axis, axis).requires_grad_()
    value = energy(z)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@energies
def test_slope_by_hand(energy: Energy, float64: None) -> None:
    z = (4 * torch.randn(500, 2)).requires_grad_()
    value = energy(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    found = energy.value_and_slope(z.detach())
    torch.testing.assert_close(found, (value.detach(), slope))
    torch.testing.assert_close(energy.slope(z.detach()), slope)
    by_autograd = dataclasses.replace(energy, with_gradient=None)
    torch.testing.assert_close(by_autograd.value_and_slope(z.detach()), found)


@energies
def test_slope_by_hand_is_finite_everywhere(energy: Energy) -> None:
    axis = torch.tensor([-1e3, -20.0, -6.0, 0.0, 1.0, 20.0, 1e3])
    value, slope = energy.value_and_slope(torch.cartesian_prod(axis, axis))
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_normalizers_known_in_closed_form() -> None:
    # U2 is a Gaussian ridge over a box of width 12 with Gaussian edges of variance 1/2; the box
    # also cuts z2, where the ridge has no mass left.
    expected = math.log(0.4 * math.sqrt(2 * math.pi) * (2 * BOX + math.sqrt(math.pi)))
    assert log_normalizer(ENERGIES["u2"]) == pytest.approx(expected, abs=1e-6)
    gaussian = Energy("gaussian", lambda z: 0.5 * z.square().sum(-1))
    assert log_normalizer(gaussian) == pytest.approx(math.log(2 * math.pi), abs=1e-6)


@energies
def test_normalizers_by_another_rule(energy: Energy) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(400)
    axis, weight = torch.from_numpy(11 * nodes), torch.from_numpy(11 * weights)
    mass = energy(torch.cartesian_prod(axis, axis)).neg().exp().reshape(400, 400)
    assert log_normalizer(energy) == pytest.approx(math.log(weight @ mass @ weight), abs=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_model_scores_its_latent(beta: float) -> None:
    energy = ENERGIES["u3"]
    z = torch.randn(2)
    model = poutine.condition(energy.model, {"z": z})
    log_joint = poutine.trace(model).get_trace(beta).log_prob_sum()
    torch.testing.assert_close(log_joint, -beta * energy(z))


POSTERIORS: dict[str, Callable[[], torch.nn.Module]] = {
    "implicit": lambda: ImplicitPosterior(2, noise_dim=3, hidden_dims=(8,)),
    "flow": lambda: FlowPosterior(2, transforms=2, hidden_dims=(8,), spread=2.0),
    "gaussian": lambda: GaussianPosterior(2),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kind", POSTERIORS)
def test_guides_train_with_and_without_vectorized_particles(kind: str, vectorize: bool) -> None:
    posterior = POSTERIORS[kind]()

    def guide() -> None:
        pyro.module("posterior", posterior)
        pyro.sample("z", posterior())

    make = TraceImplicit_ELBO if kind == "implicit" else Trace_ELBO
    loss = make(num_particles=4, vectorize_particles=vectorize, max_plate_nesting=0)
    loss.loss_and_grads(ENERGIES["u1"].model, guide)
    gradients = [p.grad for p in posterior.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_densities_integrate_to_one(kind: str) -> None:
    axis = torch.linspace(-12, 12, 241)
    with torch.no_grad():
        log_prob = POSTERIORS[kind]()().log_prob(torch.cartesian_prod(axis, axis))
    assert log_prob.exp().sum().item() * 0.1**2 == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_spread_is_the_scale_before_training(kind: str) -> None:
    posteriors = {
        "implicit": ImplicitPosterior(2, noise_dim=3, hidden_dims=(8,), spread=3.0),
        "flow": FlowPosterior(2, spread=3.0),
        "gaussian": GaussianPosterior(2, spread=3.0),
    }
    with torch.no_grad():
        draws = posteriors[kind]()(torch.Size((10_000,)))
    # But for what the networks add at random; a spline with parameters of 0 is no identity.
    assert draws.std(0).mean().item() == pytest.approx(3, rel=0.3)


def test_importing_zuko_leaves_validation_alone() -> None:
    before = torch.distributions.Distribution._validate_args
    FlowPosterior(2)
    assert torch.distributions.Distribution._validate_args is before


def test_noise_too_narrow() -> None:
    with pytest.raises(ValueError, match="noise_dim: expected at least latent_dim = 2, got 1"):
        ImplicitPosterior(2, noise_dim=1, hidden_dims=(8,))
