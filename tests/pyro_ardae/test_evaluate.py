# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluation against the exact log p(x) of a linear-Gaussian model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_ardae.evaluate import elbo, fitted_gaussian_log_marginal, log_marginal_from_guide

DIM, DATA_DIM, NOISE = 3, 5, 0.5


class LinearGaussian:
    """z ~ N(0, I), x ~ N(W z, NOISE^2 I): evidence and posterior are Gaussian."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(DATA_DIM, DIM, generator=generator, dtype=torch.double)
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(DATA_DIM).double()
        self.evidence = MultivariateNormal(torch.zeros(DATA_DIM).double(), covariance)
        self.x = self.evidence.sample((6,))
        precision = torch.eye(DIM).double() + self.weight.T @ self.weight / NOISE**2
        loc = torch.linalg.solve(precision, self.weight.T @ self.x.T / NOISE**2).T
        self.posterior = MultivariateNormal(loc, precision_matrix=precision.expand(6, DIM, DIM))

    def log_joint(self, z: Tensor) -> Tensor:
        prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + Normal(z @ self.weight.T, NOISE).log_prob(self.x).sum(-1)


@pytest.fixture
def problem() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian()


def test_exact_posterior_gives_exact_evidence(problem: LinearGaussian) -> None:
    # Every weight is p(x): no sampling error at all.
    exact = problem.evidence.log_prob(problem.x)
    for estimate in (log_marginal_from_guide, elbo):
        torch.testing.assert_close(estimate(problem.log_joint, problem.posterior, 3), exact)


@pytest.mark.parametrize("prior_weight", [0.0, 0.3])
def test_fitted_gaussian(problem: LinearGaussian, prior_weight: float) -> None:
    samples = problem.posterior.sample((2000,))
    estimate = fitted_gaussian_log_marginal(
        problem.log_joint, samples, 4000, prior_weight=prior_weight
    )
    # The weights' variance is about D / S0 without the prior: an error of 0.001; with it, 30 % of
    # the draws have weights near 0: sqrt(0.3 / 4000) = 0.009. 5 standard errors.
    tolerance = 0.045 if prior_weight else 0.01
    assert (estimate - problem.evidence.log_prob(problem.x)).abs().max() < tolerance


def test_defensive_mixture_finds_the_mode_that_the_guide_missed() -> None:
    # p(x | z) has a mode at either side; the guide sits at one of them.
    torch.manual_seed(0)

    def log_joint(z: Tensor) -> Tensor:
        modes = torch.stack([Normal(c, 0.1).log_prob(z[..., 0]) for c in (-1.5, 1.5)])
        return Normal(0.0, 1.0).log_prob(z[..., 0]) + modes.logsumexp(0)

    exact = math.log(2) + Normal(0.0, math.sqrt(1.01)).log_prob(torch.tensor(1.5)).item()
    samples = 1.485 + 0.0995 * torch.randn(1000, 1, 1)
    one_mode = fitted_gaussian_log_marginal(log_joint, samples, 4000)
    both = fitted_gaussian_log_marginal(log_joint, samples, 4000, prior_weight=0.5)
    assert one_mode.item() == pytest.approx(exact - math.log(2), abs=0.05)
    # Relative standard error of the prior's 2000 draws: 0.03.
    assert both.item() == pytest.approx(exact, abs=0.15)


def test_chunks_change_memory_only(problem: LinearGaussian) -> None:
    sizes: list[int] = []

    def log_joint(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return problem.log_joint(z)

    samples = problem.posterior.sample((100,))
    fitted_gaussian_log_marginal(log_joint, samples, 25, prior_weight=0.2, chunk_size=8)
    log_marginal_from_guide(log_joint, problem.posterior, 9, chunk_size=4)
    assert sizes == [8, 8, 4, 5, 4, 4, 1]


def test_own_posterior_is_a_lower_bound_above_the_elbo(problem: LinearGaussian) -> None:
    wide = Independent(Normal(problem.posterior.mean, 0.6), 1)
    exact = problem.evidence.log_prob(problem.x).mean()
    bound = elbo(problem.log_joint, wide, 4000).mean()
    tight = log_marginal_from_guide(problem.log_joint, wide, 4000).mean()
    assert bound < tight - 0.1
    assert tight == pytest.approx(exact.item(), abs=0.2)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(5, 2), {}, r"expected shape \[samples, batch, dim\], got \(5, 2\)"),
        (torch.zeros(5, 2, 3), {}, r"at least 2 \* dim = 6 draws .* got 5"),
        (torch.full((8, 2, 3), math.nan), {}, "expected finite draws"),
        (torch.randn(8, 2, 3), {"prior_weight": 1.0}, r"prior_weight: expected .* got 1.0"),
        (torch.randn(8, 2, 3), {"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        (torch.randn(8, 2, 3), {"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        (torch.randn(8, 2, 3), {"num_samples": 1, "prior_weight": 0.3}, "both components"),
    ],
)
def test_errors(samples: Tensor, options: dict[str, float], message: str) -> None:
    arguments = {"num_samples": 4, **options}
    with pytest.raises(ValueError, match=message):
        fitted_gaussian_log_marginal(lambda z: z.sum(-1), samples, **arguments)  # type: ignore[arg-type]


def test_a_collapsed_guide_gives_a_finite_estimate() -> None:
    samples = torch.zeros(16, 2, 3)
    estimate = fitted_gaussian_log_marginal(lambda z: -z.pow(2).sum(-1), samples, 8)
    assert estimate.isfinite().all()
