# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The bound on the gradient, in units of the running mean of its norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inference.shared.optim import TorchOptim


def optimizer(clip: float | None) -> tuple[nn.Linear, TorchOptim]:
    """Gradient descent of step size 1: a step is minus the gradient."""
    module = nn.Linear(3, 4, bias=False)
    descent = torch.optim.SGD(module.parameters(), 1.0, fused=True)
    return module, TorchOptim(module, descent, clip=clip)


def step_of(module: nn.Linear, optim: TorchOptim, norm: float) -> float:
    """How far a gradient of a norm moves the weights."""
    before = module.weight.detach().clone()
    module.weight.grad = torch.full_like(module.weight, norm / math.sqrt(12))
    optim(module.parameters())
    return float((module.weight.detach() - before).norm())


def test_a_spike_is_bounded_by_the_mean_and_hardly_moves_it() -> None:
    module, optim = optimizer(2.0)
    for norm in (1.0, 1.5, 0.5, 1.0):
        assert step_of(module, optim, norm) == pytest.approx(norm, rel=1e-5)
    mean = 1.0
    for norm in (1.0, 1.5, 0.5, 1.0):
        mean += 0.02 * (norm - mean)
    assert step_of(module, optim, 1e6) == pytest.approx(2 * mean, rel=1e-5)
    mean += 0.02 * mean
    assert step_of(module, optim, 1e6) == pytest.approx(2 * mean, rel=1e-5)
    module, optim = optimizer(None)
    assert step_of(module, optim, 1.0) == pytest.approx(1.0, rel=1e-5)
    assert step_of(module, optim, 1e3) == pytest.approx(1e3, rel=1e-5)


def test_the_mean_follows_gradients_that_stay_large() -> None:
    module, optim = optimizer(2.0)
    for _ in range(300):
        step_of(module, optim, 1.0)
    for _ in range(500):
        moved = step_of(module, optim, 10.0)
    assert moved == pytest.approx(10.0, rel=1e-3)


def test_a_norm_that_is_not_finite_has_no_part_in_the_mean() -> None:
    module, optim = optimizer(2.0)
    step_of(module, optim, 1.0)
    assert step_of(module, optim, 1e25) == 0  # finite, its norm in single precision is not
    step_of(module, optim, math.inf)
    assert step_of(module, optim, math.inf) == step_of(module, optim, math.nan) == 0
    assert step_of(module, optim, 1e6) == pytest.approx(2.0, rel=1e-5)


def test_a_step_without_a_finite_gradient_leaves_adam_as_it_was() -> None:
    module = nn.Linear(3, 4, bias=False)
    adam = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
    optim = TorchOptim(module, adam, clip=2.0)
    step_of(module, optim, 1.0)
    before = {name: value.clone() for name, value in adam.state[module.weight].items()}
    module.weight.grad = torch.ones_like(module.weight)
    module.weight.grad[0, 0] = math.inf
    optim(module.parameters())
    for name, value in adam.state[module.weight].items():
        assert torch.equal(value, before[name])
    assert step_of(module, optim, 1.0) > 0


def test_a_bound_needs_a_fused_optimizer() -> None:
    module = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="expected a fused optimizer, got Adam"):
        TorchOptim(module, torch.optim.Adam(module.parameters()), clip=2.0)


def test_a_resumed_optimizer_knows_the_mean() -> None:
    module, optim = optimizer(2.0)
    step_of(module, optim, 1.0)
    other, resumed = optimizer(2.0)
    resumed.set_state(optim.get_state())
    assert step_of(other, resumed, 1e6) == step_of(module, optim, 1e6) == pytest.approx(2.0)
