# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Size, Tensor

from models.unconditional import ImplicitPosterior

SCALES = torch.tensor([0.5, 2.0])


def normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """An energy and its gradient: that of a Gaussian, standard deviations 0.5 and 2."""
    scaled = z / SCALES
    return 0.5 * scaled.square().sum(-1), scaled / SCALES


def posterior(**options: object) -> ImplicitPosterior:
    settings = {"noise_dim": 3, "hidden_dims": (8,), "energy": normal, "num_moves": 3}
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
    noise = torch.randn(5, 3 + 2 + 3 * (2 + 2))
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


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_moves_leave_the_density_as_it_is(
    beta: float, standard_errors: Callable[[int], float]
) -> None:
    """From draws of the density itself, by steps so wide that unadjusted ones would fail."""
    count = 20_000
    q = posterior(num_moves=12, step_size=0.1)
    start = SCALES / beta**0.5 * torch.randn(count, 2)
    z = q._move(start, torch.randn(count, 24), torch.randn(count, 24), beta)
    assert float((z != start).any(-1).float().mean()) > 0.2
    scaled = z * beta**0.5 / SCALES
    # Second and fourth moments, and the correlation.
    for found, expected, variance in (
        (scaled.square().mean(0), 1.0, 2.0),
        (scaled.pow(4).mean(0), 3.0, 96.0),
        (scaled.prod(-1).mean(), 0.0, 1.0),
    ):
        error = (variance / count) ** 0.5
        assert bool(((found - expected).abs() < standard_errors(6) * error).all())


def test_moves_lead_to_the_density(standard_errors: Callable[[int], float]) -> None:
    """Many moves forget where they began."""
    count = 4000
    z = posterior(num_moves=150, step_size=0.05)().sample(Size((count,)))
    error = (2 / count) ** 0.5
    assert bool(((z / SCALES).var(0) - 1).abs().le(standard_errors(2) * error).all())


def test_a_jump_is_accepted_by_the_ratio_of_the_densities(
    standard_errors: Callable[[int], float],
) -> None:
    """From a minimum of energy 0 to where it is 1: with probability 1 / e."""
    count = 20_000
    q = posterior(num_moves=1, jump_scale=1.0)
    jump = torch.tensor([2**0.5 * 0.5, 0.0]).expand(count, -1)
    z = q._move(torch.zeros(count, 2), jump, torch.randn(count, 2), 1.0)
    share, expected = float((z != 0).any(-1).float().mean()), math.exp(-1)
    error = (expected * (1 - expected) / count) ** 0.5
    assert abs(share - expected) < standard_errors(1) * error


def test_moves_need_an_energy() -> None:
    with pytest.raises(ValueError, match="num_moves: expected 0 without an energy, got 3"):
        posterior(energy=None)
