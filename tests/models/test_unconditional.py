# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Size, Tensor

from models.unconditional import ImplicitPosterior


def normal(z: Tensor) -> Tensor:
    """The slope of an energy: that of a Gaussian, standard deviations 0.5 and 2."""
    return z / torch.tensor([0.25, 4.0])


def posterior(**options: object) -> ImplicitPosterior:
    settings = {"noise_dim": 3, "hidden_dims": (8,), "slope": normal, "langevin_steps": 3}
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


def test_gradient_is_that_of_the_network(float64: None) -> None:
    """Against finite differences of the draws without steps."""
    q = posterior().double()
    noise = torch.randn(5, 3 + 2 * 4)
    with_steps = torch.autograd.grad(q._transform(noise).sum(), [*q.parameters()])
    first = noise[:, 3:5]

    def start(*parameters: Tensor) -> Tensor:
        named = dict(zip(dict(q.named_parameters()), parameters, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(q, named):
            return q._start(noise[:, :3], first)

    parameters = [p.detach().requires_grad_() for p in q.parameters()]
    assert torch.autograd.gradcheck(start, parameters)
    for found, expected in zip(
        with_steps, torch.autograd.grad(start(*parameters).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_steps_lead_to_a_hotter_density() -> None:
    torch.manual_seed(0)
    z = posterior(langevin_steps=400, step_size=0.02)(0.25).sample(Size((4000,)))
    assert float(z[:, 0].var()) == pytest.approx(1.0, rel=5 * (2 / 4000) ** 0.5 + 0.02)


def test_steps_lead_to_the_density() -> None:
    """Many small steps forget where they began: variances 0.25 and 4, within 5 standard errors and
    the bias of the steps, of the order of step size over variance."""
    q = posterior(langevin_steps=600, step_size=0.02)
    z = q().sample(Size((4000,)))
    variance = torch.tensor([0.25, 4.0])
    tolerance = 5 * (2 / 4000) ** 0.5 + 0.02 / variance
    assert bool((z.var(0) / variance - 1).abs().le(tolerance).all())


def test_steps_need_a_slope() -> None:
    with pytest.raises(ValueError, match="langevin_steps: expected 0 without a slope, got 3"):
        posterior(slope=None)
