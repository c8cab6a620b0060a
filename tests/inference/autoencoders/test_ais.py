# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Annealed importance sampling against exact evidence, from proposals that are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from inference.autoencoders.ais import annealed_importance_sampling, refine_gaussian

DIM, DATA_DIM, POINTS, NOISE = 32, 64, 20, 0.7


class LinearGaussian:
    """z ~ N(0, I), x ~ N(W z, NOISE^2 I), with 32 latents: evidence and posterior are Gaussian."""

    def __init__(self) -> None:
        self.weight = torch.randn(DATA_DIM, DIM).double() / math.sqrt(DIM)
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(DATA_DIM).double()
        self.evidence = MultivariateNormal(torch.zeros(DATA_DIM).double(), covariance)
        self.x = self.evidence.sample(torch.Size((POINTS,)))
        self.exact = self.evidence.log_prob(self.x)
        precision = torch.eye(DIM).double() + self.weight.T @ self.weight / NOISE**2
        self.loc = torch.linalg.solve(precision, self.weight.T @ self.x.T / NOISE**2).T
        self.covariance = precision.inverse().expand(POINTS, DIM, DIM)

    def log_joint(self, z: Tensor) -> Tensor:
        prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + Normal(z @ self.weight.T, NOISE).log_prob(self.x).sum(-1)

    def wrong(self) -> MultivariateNormal:
        """Diagonal, half a standard deviation off in each direction: KL of 10 nats and more."""
        scale = self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return MultivariateNormal(self.loc + 0.5 * scale, scale_tril=torch.diag_embed(scale))


@pytest.fixture
def problem() -> LinearGaussian:
    return LinearGaussian()


def test_wrong_start_gives_the_exact_evidence(
    problem: LinearGaussian, standard_errors: Callable[[int], float]
) -> None:
    estimate = annealed_importance_sampling(
        problem.log_joint, problem.wrong(), num_chains=16, num_temperatures=300
    )
    # Weights are unbiased for p(x): the mean of w / p(x) over all chains and points is 1, which
    # holds the error of log p(x) below 0.1 nats.
    ratios = (estimate.log_weights - problem.exact).exp()
    error = ratios.std().item() / math.sqrt(ratios.numel())
    tolerance = standard_errors(1) * error
    assert tolerance < 0.1
    assert abs(ratios.mean().item() - 1) < tolerance
    assert (estimate.log_px - problem.exact).mean().abs() < 0.1
    assert 0.6 < estimate.acceptance.mean() < 0.98
    # Importance sampling by as many draws of the same Gaussian is nowhere near.
    plain = annealed_importance_sampling(
        problem.log_joint, problem.wrong(), num_chains=16, num_temperatures=1
    )
    assert (plain.log_px - problem.exact).mean() < -1


def test_refined_gaussian_is_the_posterior(problem: LinearGaussian) -> None:
    refined = refine_gaussian(problem.log_joint, problem.wrong(), num_steps=60)
    exact = MultivariateNormal(problem.loc, problem.covariance)
    divergence = torch.distributions.kl_divergence(refined, exact)
    before = torch.distributions.kl_divergence(problem.wrong(), exact)
    assert before.min() > 5
    # The noise of a step is proportional to what is left to correct, so nothing remains.
    assert divergence.max() < 1e-3
    # From there on every weight is p(x), at any temperatures.
    estimate = annealed_importance_sampling(problem.log_joint, refined, num_temperatures=3)
    assert (estimate.log_px - problem.exact).abs().max() < 0.1


def test_points_beyond_all_numbers() -> None:
    """Where a gradient is not finite the proposal is kept; a draw that is not has weight 0."""
    proposal = MultivariateNormal(torch.zeros(2, 4), torch.eye(4).expand(2, 4, 4))
    broken = torch.tensor([torch.nan, 0.0])
    refined = refine_gaussian(
        lambda z: Normal(1.0, 0.5).log_prob(z).sum(-1) + broken * z.sum(-1), proposal, num_steps=40
    )
    assert torch.allclose(refined.loc[0], proposal.loc[0], atol=1e-5)
    assert torch.allclose(refined.scale_tril[0], proposal.scale_tril[0], atol=1e-4)
    assert torch.allclose(refined.loc[1], torch.ones(4), atol=0.01)

    def log_joint(z: Tensor) -> Tensor:
        """Not a number above 1: Phi(1) is what is left."""
        return Normal(0.0, 1.0).log_prob(z).sum(-1) + torch.where(z > 1, torch.nan, 0.0).sum(-1)

    wide = MultivariateNormal(torch.zeros(1000, 1), torch.eye(1).expand(1000, 1, 1))
    estimate = annealed_importance_sampling(log_joint, wide, num_chains=100, num_temperatures=1)
    weights = estimate.log_weights.exp()
    assert float(weights.mean()) == pytest.approx(0.8413, abs=0.006)  # 5 standard errors


def test_weights_are_unbiased(standard_errors: Callable[[int], float]) -> None:
    # One latent, two unequal modes, long steps that are often rejected: what a missing acceptance,
    # momentum or weight would show in. The integral is known.
    means, log_masses = torch.tensor([-1.0, 1.5]), torch.tensor([0.3, 0.9]).log()

    def log_joint(z: Tensor) -> Tensor:
        return (Normal(means, 0.4).log_prob(z) + log_masses).logsumexp(-1)

    proposal = MultivariateNormal(
        torch.zeros(20_000, 1), scale_tril=torch.full((20_000, 1, 1), 1.5)
    )
    estimate = annealed_importance_sampling(
        log_joint, proposal, num_chains=10, num_temperatures=4, step_size=1.0, adaptation_rate=0.3
    )
    weights = estimate.log_weights.exp()
    # The chains of a data point share a step size, given which they are independent: errors are
    # taken over data points.
    per_point = weights.mean(0)
    error = per_point.std().item() / math.sqrt(len(per_point))
    assert error < 0.005
    assert abs(per_point.mean().item() - 1.2) < standard_errors(1) * error


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_chains": 0}, "num_chains"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"num_leapfrog": 0}, "num_leapfrog"),
        ({"step_size": 0.0}, "step_size"),
        ({"target_acceptance": 1.0}, "target_acceptance"),
        ({"adaptation_rate": -1.0}, "adaptation_rate"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, float], name: str) -> None:
    proposal = MultivariateNormal(torch.zeros(1, 2), torch.eye(2))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        annealed_importance_sampling(lambda z: -z.square().sum(-1), proposal, **arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"num_steps": -1}, "num_steps"), ({"num_draws": 3}, "num_draws"), ({"rate": 0.0}, "rate")],
)
def test_errors_of_the_refinement(arguments: dict[str, float], name: str) -> None:
    proposal = MultivariateNormal(torch.zeros(1, 2), torch.eye(2))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        refine_gaussian(lambda z: -z.square().sum(-1), proposal, **arguments)
