# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""AVB's discriminator on Gaussians, where its optimum is a quadratic function and known."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.autoencoders.avb import AdversarialScore

LOC, SCALE = torch.tensor([0.7, -0.4]), torch.tensor([0.6, 1.5])


def optimal() -> AdversarialScore:
    """The discriminator of q = N(LOC, SCALE^2) from the contrast N(0, I), its weights by hand."""
    estimator = AdversarialScore(2, hidden_dim=4, depth=1, whitening="none", num_folds=1).double()
    loc, scale = LOC.double(), SCALE.double()
    parts = estimator.network.split(estimator.weights.detach())
    for part in parts:
        part.zero_()
    *_, bias, last, quadratic = parts
    bias.view(1, 2, 4)[:, 1] = 1.0  # the hidden layer is the constant silu(1)
    # T = log q - log r = const + loc / scale^2 w + (1 - 1 / scale^2) / 2 w^2, and the energy is -T.
    constant = -(0.5 * (loc / scale).square() + scale.log()).sum()
    last.fill_(float(-constant / (4 * torch.nn.functional.silu(torch.ones((), dtype=last.dtype)))))
    quadratic[0, :2] = -loc / scale.square()
    quadratic[0, 2:] = -0.5 * (1 - 1 / scale.square())
    estimator.averages.copy_(estimator.weights)
    return estimator


def q() -> dist.TorchDistribution:
    return dist.Normal(LOC.double(), SCALE.double()).to_event(1)


def test_the_optimal_discriminator_gives_the_exact_density_score_and_divergence() -> None:
    estimator, samples = optimal(), q().sample((8, 1))
    value = q().sample((1000, 1))
    log_prob = estimator.log_prob(value, samples)
    torch.testing.assert_close(log_prob, q().log_prob(value))
    score = estimator(value, samples)
    torch.testing.assert_close(score, -(value - LOC) / SCALE.double().square())
    # The divergence from any prior is then the average of exact terms.
    prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    exact = q().log_prob(value) - prior.log_prob(value)
    torch.testing.assert_close(log_prob - prior.log_prob(value), exact)


def test_it_is_the_minimum_of_the_training_loss(
    standard_errors: Callable[[int], float],
) -> None:
    """There the gradient has mean zero; away from it, it has not."""
    estimator = optimal()
    features = torch.zeros(1, 0, dtype=torch.double)
    base = estimator.whitening.frame(q().sample((8, 1)), features).base

    def gradients(count: int) -> Tensor:
        draws = q().sample((count, 64, 1))
        return torch.stack([estimator._loss(w, features, base)[1] for w in draws])

    found = gradients(400)
    moving = found.std(0) > 0
    bound = standard_errors(int(moving.sum())) / len(found) ** 0.5
    ratio = (found.mean(0) / found.std(0))[moving].abs()
    assert bool((ratio < bound).all())
    estimator.weights.mul_(1.5)
    found = gradients(400)
    assert bool((found.mean(0) / found.std(0))[moving].abs().max() > bound)


def test_training_finds_the_divergence_of_conditional_gaussians() -> None:
    torch.manual_seed(0)
    context = torch.randn(64, 2)
    loc, scale = 0.5 * context, (0.5 * context).exp() * 0.7
    posterior = dist.Normal(loc, scale).to_event(1)
    estimator = AdversarialScore(2, 2, whitening="none", num_folds=1)
    for _ in range(300):
        estimator.update(posterior.sample((8,)), context)
    samples, value = posterior.sample((8,)), posterior.sample((500,))
    log_ratio = estimator.log_prob(value, samples, context)
    log_ratio = log_ratio - dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(value)
    exact = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1)
    # A finite network after 300 steps, by context: 15 % of what the divergences differ by.
    assert (log_ratio.mean(0) - exact).square().mean().sqrt() < 0.15 * exact.std()


@pytest.mark.parametrize("option", ["hidden_dim", "depth"])
def test_size_of_the_discriminator(option: str) -> None:
    with pytest.raises(ValueError, match=f"AdversarialScore: expected {option} >= 1, got 0"):
        AdversarialScore(2, **{option: 0})  # type: ignore[arg-type]
