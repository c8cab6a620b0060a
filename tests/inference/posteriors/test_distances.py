# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Distances against closed forms for Gaussians."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from inference.posteriors import distances


def normal(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.double)


def test_sliced_wasserstein_of_a_shift_and_a_scale() -> None:
    x = normal(4000, 5)
    shift = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5], dtype=torch.double)
    # Of the same draws, moved: |m|^2 / D up to 256 directions, whose squares' mean has the relative
    # standard error sqrt(2 (D - 1) / (D + 2) / 256) = 0.067.
    expected = float(shift.square().sum() / 5)
    found = distances.sliced_wasserstein(x, x + shift) ** 2
    assert found == pytest.approx(expected, rel=4.4 * 0.067)
    # A scale: W2 of every projection is |s - 1| times its standard deviation.
    assert distances.sliced_wasserstein(x, 1.5 * x) == pytest.approx(0.5, rel=0.03)
    assert distances.sliced_wasserstein(x, x) == 0.0


def test_sliced_wasserstein_of_unequal_numbers_of_draws() -> None:
    x, y = normal(4000, 2), normal(1000, 2, seed=1)
    assert distances.sliced_wasserstein(x, y) < 0.15
    assert distances.sliced_wasserstein(x, y + 3.0) == pytest.approx(3.0, rel=0.1)
    found = distances.sliced_wasserstein(y, x), distances.sliced_wasserstein(x, y)
    assert found[0] == pytest.approx(found[1])


def test_kolmogorov_smirnov_of_shifted_gaussians() -> None:
    x, y = normal(20_000, 2), normal(20_000, 2, seed=1)
    y[:, 1] += 1.0
    found = distances.kolmogorov_smirnov(x, y)
    # The largest difference is at the middle: 2 Phi(1/2) - 1.
    exact = 2 * NormalDist().cdf(0.5) - 1
    # Kolmogorov's law: above sqrt(-log(rate / 2) / n) at most at that rate, 1e-5 here.
    bound = math.sqrt(-math.log(1e-5 / 2) / 20_000)
    assert float(found[0]) < bound
    assert float(found[1]) == pytest.approx(exact, abs=bound)
    assert distances.kolmogorov_smirnov(x, x).tolist() == [0.0, 0.0]
    assert distances.kolmogorov_smirnov(x, x + 100).tolist() == [1.0, 1.0]


def test_c2st_of_shifted_gaussians() -> None:
    x, y = normal(2000, 2), normal(2000, 2, seed=1)
    state = torch.get_rng_state()
    # 4000 answers at one half each: standard error 0.008; 4.4 of them.
    assert distances.c2st(x, y) == pytest.approx(0.5, abs=0.035)
    assert torch.equal(torch.get_rng_state(), state)
    y[:, 0] += 2.0
    assert distances.c2st(x, y) == pytest.approx(NormalDist().cdf(1.0), abs=0.035)
    assert distances.c2st(x, y + 50) == 1.0


def test_moment_errors_and_standardize() -> None:
    reference = normal(1000, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5.0
    draws = 2 * (reference - reference.mean(0)) + reference.mean(0) + reference.std(0) * 0.3
    mean, std = distances.moment_errors(draws, reference)
    torch.testing.assert_close(mean, torch.full((3,), 0.3, dtype=torch.double))
    torch.testing.assert_close(std, torch.full((3,), 1.0, dtype=torch.double))
    unit = distances.standardize(reference, reference)
    torch.testing.assert_close(unit.std(0), torch.ones(3, dtype=torch.double))


@pytest.mark.parametrize(("share", "found"), [(0.5, 2), (0.26, 2), (0.24, 1), (0.0, 1), (1.0, 1)])
def test_modes(share: float, found: int) -> None:
    labels = (torch.arange(100) < 100 * share).long()
    reference = (torch.arange(100) < 50).long()
    assert distances.modes_found(labels, reference) == found
