# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The bound of SIVI where its value is known: a Gaussian whose mean is Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from models.semi_implicit import SemiImplicit

OUTER, INNER = 1.3, 0.6


def mixture(num_mixing: int, outer: float = OUTER, inner: float = INNER) -> SemiImplicit:
    """Marginal N(0, outer^2 + inner^2)."""
    return SemiImplicit(
        dist.Normal(torch.zeros(1), outer).to_event(1),
        lambda psi: dist.Normal(psi, inner).to_event(1),
        num_mixing=num_mixing,
        event_dim=1,
    )


def drawn(q: SemiImplicit, count: int) -> tuple[Tensor, Tensor]:
    """Values and bounds; every draw with components of its own, for independence."""
    q = q.expand((count,))
    z = q.rsample()
    return z[..., 0], q.log_prob(z)


def quadrature() -> float:
    """The expected bound with one further component, over (psi_0, psi_1, z - psi_0)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights) / math.sqrt(2 * math.pi)
    first, other, own = (
        axis * scale
        for axis, scale in zip(
            torch.meshgrid(nodes, nodes, nodes, indexing="ij"), (OUTER, OUTER, INNER), strict=True
        )
    )
    z = first + own
    both = torch.stack([dist.Normal(psi, INNER).log_prob(z) for psi in (first, other)])
    weight = weights[:, None, None] * weights[:, None] * weights
    return float((weight * (both.logsumexp(0) - math.log(2))).sum())


def test_the_bound_with_one_component_is_that_of_quadrature(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    _, bound = drawn(mixture(1), 100_000)
    error = bound.std() / len(bound) ** 0.5
    assert abs(bound.mean() - quadrature()) < standard_errors(1) * error


def test_the_bound_falls_to_the_density(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    """Its excess over log q is positive for every K, and of the order of 1 / K."""
    marginal = dist.Normal(0.0, math.hypot(OUTER, INNER))
    excess = {}
    for count in (1, 10, 1000):
        z, bound = drawn(mixture(count), 5000)
        difference = bound - marginal.log_prob(z)
        error = standard_errors(3) * float(difference.std()) / len(z) ** 0.5
        excess[count] = (float(difference.mean()), error)
    assert all(mean + error > 0 for mean, error in excess.values())
    assert excess[1][0] - excess[1][1] > excess[10][0] + excess[10][1]
    assert abs(excess[1000][0]) < excess[1000][1] + 0.002


def test_it_gives_an_unbiased_estimate_of_a_normalizer(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    # The components are wider than the density, so that weights have a variance.
    z, bound = drawn(mixture(2, outer=0.4, inner=1.0), 100_000)
    weight = (dist.Normal(0.3, 0.5).log_prob(z) - bound).exp()
    error = standard_errors(1) * float(weight.std()) / len(z) ** 0.5
    assert abs(float(weight.mean()) - 1) < error


def test_components_are_shared_by_sample_dimensions() -> None:
    q = mixture(3).expand((4,))
    z = q.rsample((5, 2))
    assert q.log_prob(z).shape == (5, 2, 4)


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_mixing: expected at least 1, got 0"):
        mixture(0)
    q = mixture(3)
    q.rsample()
    with pytest.raises(ValueError, match="expected the last draw of this distribution"):
        q.log_prob(torch.zeros(1))
