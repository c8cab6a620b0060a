# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ardae.score import SlicedScore
from pyro_ardae.score.student import Student

BASE = Student(9.0, 1.3)


# ---- the loss ------------------------------------------------------------------------------------


def small(dim: int, context_dim: int) -> tuple[SlicedScore, Tensor, Tensor]:
    """An estimator whose network is not zero, whitened draws and features."""
    estimator = SlicedScore(dim, context_dim, hidden_dim=6, depth=2).double()
    estimator.weights += 0.3 * torch.randn_like(estimator.weights)
    return estimator, torch.randn(7, 5, dim), torch.randn(5, estimator.network.feature_dim)


def jacobians(estimator: SlicedScore, w: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Score ``[n, B, D]`` and its Jacobian ``[n, B, D, D]``, each entry of w by itself."""
    score = torch.empty_like(w)
    jacobian = w.new_empty(*w.shape, w.shape[-1])
    for i, j in itertools.product(range(w.shape[0]), range(w.shape[1])):

        def field(at: Tensor, row: Tensor = features[j : j + 1]) -> Tensor:
            base = -at * (1 + 1 / 9) / (1.3 + at**2 / 9)
            sigma = torch.zeros(1, 1, 1)
            r = estimator.network.field(estimator.weights, at.reshape(1, 1, -1), sigma, row)
            return base + r.flatten()

        score[i, j] = field(w[i, j])
        jacobian[i, j] = torch.autograd.functional.jacobian(field, w[i, j])
    return score, jacobian


@pytest.mark.parametrize("context_dim", [0, 4])
def test_loss_is_the_plain_definition(float64: None, context_dim: int) -> None:
    """v' J v + |s|^2 / 2 with the whole Jacobian J, per dimension."""
    estimator, w, features = small(3, context_dim)
    v = torch.randn_like(w)
    score, jacobian = jacobians(estimator, w, features)
    slope = torch.einsum("nbi,nbij,nbj->nb", v, jacobian, v)
    expected = (slope + 0.5 * score.square().sum(-1)).mean() / 3
    loss = estimator._objective(estimator.weights, w, features, BASE, v)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_projections_give_the_divergence(float64: None) -> None:
    """The mean over all signs is Hyvärinen's loss, tr J + |s|^2 / 2, exactly."""
    estimator, w, features = small(3, 4)
    score, jacobian = jacobians(estimator, w, features)
    trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = (trace + 0.5 * score.square().sum(-1)).mean() / 3
    signs = [torch.tensor(s).expand_as(w) for s in itertools.product([-1.0, 1.0], repeat=3)]
    losses = [estimator._objective(estimator.weights, w, features, BASE, v) for v in signs]
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
def test_projections(projection: Any, standard_errors: Callable[[int], float]) -> None:
    """One for each draw, with E[v v'] = I."""
    estimator = SlicedScore(2, projection=projection, hidden_dim=4)
    v = estimator._direction(torch.randn(1000, 5, 2))
    assert v.shape == (1000, 5, 2)
    flat = v.reshape(-1, 2)
    assert bool((flat.abs() == 1).all()) == (projection == "rademacher")
    products = torch.stack([flat.square() - 1, flat * flat.roll(1, -1)])
    error = products.std(1) / len(flat) ** 0.5
    assert bool((products.mean(1).abs() <= standard_errors(4) * error).all())


@pytest.mark.parametrize("context_dim", [0, 4])
def test_gradient_is_the_derivative(float64: None, context_dim: int) -> None:
    """Against central differences along random directions: error O(h^2), rounding O(1e-16 / h)."""
    estimator, w, features = small(3, context_dim)
    state, h = torch.get_rng_state(), 1e-5

    def loss() -> tuple[Tensor, Tensor]:
        torch.set_rng_state(state)  # the same projections
        return estimator._loss(w, features, BASE)

    _, gradient = loss()
    weights = estimator.weights.clone()
    for direction in torch.randn(10, len(weights)):
        losses = []
        for sign in (1, -1):
            estimator.weights.copy_(weights + sign * h * direction)
            losses.append(loss()[0])
        difference = (losses[0] - losses[1]) / (2 * h)
        torch.testing.assert_close(difference, gradient @ direction, rtol=1e-5, atol=1e-7)


def test_loss_is_half_the_squared_error_up_to_a_constant(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    """For w ~ N(0, I): the loss minus |s + w|^2 / 2 has mean -1/2 per dimension, whatever s."""
    estimator, _, _ = small(2, 0)
    estimator.weights *= 2
    w, features = torch.randn(100_000, 1, 2), torch.zeros(1, 0)
    loss, _ = estimator._loss(w, features, BASE)
    field = estimator.network.field(estimator.weights, w, torch.zeros_like(w[..., :1]), features)
    squared_error = 0.5 * (field + BASE.score(w) + w).square().mean()
    # Of 100,000 terms as large as the entries of s^2, w^2 and J, a few each.
    bound = standard_errors(1) * 5 / math.sqrt(len(w))
    assert float(squared_error) > 2 * bound
    assert float(loss - squared_error) == pytest.approx(-0.5, abs=bound)


def test_unknown_projection() -> None:
    with pytest.raises(ValueError, match="'rademacher' or 'gaussian', got 'sphere'"):
        SlicedScore(2, projection="sphere")  # type: ignore[arg-type]
