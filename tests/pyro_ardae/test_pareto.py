# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch

from pyro_ardae.autoguide.quantiles import fixed_noise
from pyro_ardae.pareto import pareto_k


def test_known_tails() -> None:
    # Weights u^-k of uniform u have exactly the shape k. The fit's standard deviation is about
    # (1 + k) / sqrt(tail) = 0.1 at a tail of 300, its prior draws it to 0.5 by 10 / 310: means of
    # 20 rows, 4.4 standard errors.
    for k in (0.2, 0.5, 0.9):
        u = torch.rand(10_000, 20, dtype=torch.double)
        found = pareto_k(-k * u.log())
        assert float(found.mean()) == pytest.approx(k, abs=0.11 + 0.035 * abs(k - 0.5))


def test_uniform_weights_have_a_bounded_tail() -> None:
    assert float(pareto_k(torch.rand(5000).log())) < 0.0


def test_shapes_scale_and_special_values() -> None:
    weights = torch.randn(100, 2, 3)
    torch.testing.assert_close(pareto_k(weights), pareto_k(weights + 300.0), atol=1e-4, rtol=0)
    assert pareto_k(weights).shape == (2, 3)
    assert float(pareto_k(torch.zeros(100))) == -math.inf
    assert math.isnan(float(pareto_k(torch.full((100,), math.nan))))
    some = torch.randn(1000)
    some[:500] = -math.inf
    assert math.isfinite(float(pareto_k(some)))
    with pytest.raises(ValueError, match="expected at least 25 per batch element, got 24"):
        pareto_k(torch.zeros(24))


def test_one_weight_that_outdoes_all_others_is_no_constant_tail() -> None:
    alone = torch.full((2000,), -1e6)
    alone[0] = 0.0
    assert float(pareto_k(alone)) == math.inf
    assert float(pareto_k(1000 * torch.randn(2000))) == math.inf
    assert float(pareto_k(torch.zeros(2000))) == -math.inf
    assert math.isnan(float(pareto_k(torch.full((2000,), -math.inf))))


def test_a_few_weights_above_a_constant_matter_by_their_share() -> None:
    log_weights = torch.zeros(1000)
    log_weights[:4] = torch.tensor([15.0, 16.0, 17.0, 18.0])  # all but a hundred-thousandth
    assert float(pareto_k(log_weights)) == math.inf
    log_weights[:4] = 0.1
    assert float(pareto_k(log_weights)) == -math.inf


def test_whatever_the_default_device() -> None:
    """What draws or fits on the CPU says so; "meta" stands in for a GPU."""
    log_weights = torch.randn(200, generator=torch.Generator().manual_seed(0)).square()
    expected, noise = pareto_k(log_weights), fixed_noise()((4, 3), log_weights)
    try:
        torch.set_default_device("meta")
        assert torch.equal(pareto_k(log_weights).cpu(), expected)
        assert torch.equal(fixed_noise()((4, 3), log_weights), noise)
    finally:
        torch.set_default_device(None)
