# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Size, Tensor

from models.energies import ENERGIES
from models.unconditional import ImplicitPosterior


def normal(z: Tensor) -> Tensor:
    return 0.5 * (z / torch.tensor([0.5, 2.0])).square().sum(-1)


def posterior(**options: object) -> ImplicitPosterior:
    settings = {"noise_dim": 3, "hidden_dims": (8,), "energy": normal, "langevin_steps": 3}
    return ImplicitPosterior(2, **{**settings, **options})  # type: ignore[arg-type]


def test_draws_are_the_same_with_and_without_a_graph() -> None:
    q = posterior()
    torch.manual_seed(1)
    with_graph = q().rsample(Size((7,)))
    torch.manual_seed(1)
    without = q().sample(Size((7,)))
    assert with_graph.requires_grad
    assert not without.requires_grad
    torch.testing.assert_close(with_graph, without)


@pytest.mark.parametrize("name", ENERGIES)
def test_gradient_passes_through_the_steps(float64: None, name: str) -> None:
    """Against finite differences, second derivatives of the energy included."""
    q = posterior(energy=ENERGIES[name]).double()
    noise = torch.randn(5, 3 + 2 * 4)

    def draw(*parameters: Tensor) -> Tensor:
        named = dict(zip(dict(q.named_parameters()), parameters, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(q, named):
            return q._transform(noise)

    assert torch.autograd.gradcheck(draw, [p.detach().requires_grad_() for p in q.parameters()])


@pytest.mark.parametrize("name", ENERGIES)
def test_second_derivatives_are_finite_far_away(name: str) -> None:
    z = torch.tensor([[-30.0, 40.0], [1e3, -1e3], [0.0, 0.0], [300.0, 0.1]], requires_grad=True)
    (slope,) = torch.autograd.grad(ENERGIES[name](z).sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    assert bool(torch.isfinite(slope).all())
    assert bool(torch.isfinite(curvature).all())


def test_steps_lead_to_the_density() -> None:
    """Many small steps forget where they began: variances 0.25 and 4, within 5 standard errors and
    the bias of the steps, of the order of step size over variance."""
    q = posterior(langevin_steps=600, step_size=0.02)
    z = q().sample(Size((4000,)))
    variance = torch.tensor([0.25, 4.0])
    tolerance = 5 * (2 / 4000) ** 0.5 + 0.02 / variance
    assert bool((z.var(0) / variance - 1).abs().le(tolerance).all())


def test_steps_need_an_energy() -> None:
    with pytest.raises(ValueError, match="langevin_steps: expected 0 without an energy, got 3"):
        posterior(energy=None)
