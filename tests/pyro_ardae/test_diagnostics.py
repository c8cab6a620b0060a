# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ardae import Implicit, TraceImplicit_ELBO, stein_check
from pyro_ardae.diagnostics import _check
from pyro_ardae.score import ScoreEstimator

FACTOR = torch.tensor([[1.0, 0.0], [0.9, 0.1]])


class ExactScore(ScoreEstimator):
    """The score of N(context or 0, FACTOR FACTOR'), times a factor."""

    def __init__(self, dim: int, context_dim: int = 0, *, times: float = 1.0) -> None:
        super().__init__(dim, context_dim)
        self.times = times
        self.precision = torch.cholesky_inverse(FACTOR)

    def update(self, samples: Tensor, context: Tensor | None = None, *, center: object = None):  # type: ignore[no-untyped-def]
        return samples.new_zeros(())

    def forward(  # type: ignore[no-untyped-def]
        self, value: Tensor, samples: Tensor, context: Tensor | None = None, *, center=None
    ):
        mean = 0.0 if context is None else context
        return -self.times * (value - mean) @ self.precision


def one() -> None:
    pyro.sample("z", Implicit(lambda e: e @ FACTOR.mT, 2))


def local() -> None:
    with pyro.plate("data", 3):
        context = torch.arange(6.0).reshape(3, 2)
        pyro.sample("z", Implicit(lambda e, c: c + e @ FACTOR.mT, 2, context))


def trained(guide: Callable[[], None], times: float) -> TraceImplicit_ELBO:
    loss = TraceImplicit_ELBO(partial(ExactScore, times=times))
    with torch.no_grad():
        loss.loss(_plain if guide is one else _plated, guide)
    return loss


def _plain() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def _plated() -> None:
    with pyro.plate("data", 3):
        _plain()


def test_a_loss_that_was_loaded() -> None:
    loss = TraceImplicit_ELBO(partial(ExactScore, times=1.0))
    loss.load_state_dict(trained(one, 1.0).state_dict())
    assert stein_check(loss, one)["z"].passed


@pytest.mark.parametrize("guide", [one, local])
def test_the_exact_score_passes(
    guide: Callable[[], None],
    standard_errors: Callable[[int], float],
    chi_square_bound: Callable[[float], float],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stein_check(trained(guide, 1.0), guide, tolerance=0.0, failure_rate=1e-5)["z"]
    assert found.passed
    assert abs(found.stein - 1) < standard_errors(1) * found.error
    # Var(s'z) = 2 D: 1 / D of it has the standard error sqrt(2 / D / N). (12 rows share a mean.)
    # By the spread of eight traces it may come out larger.
    ratio = found.error * found.num_samples**0.5
    assert 0.8 < ratio < max(1.2, (chi_square_bound(7) / 7) ** 0.5)
    assert found.mean_score**2 < chi_square_bound(2)
    assert 4096 <= found.num_samples <= 4096 + 24


@pytest.mark.parametrize(
    ("times", "warns"), [(1.05, False), (0.95, False), (1.3, True), (0.7, True)]
)
def test_a_score_off_by_a_factor(times: float, warns: bool) -> None:
    loss = trained(one, times)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = stein_check(loss, one)["z"]
    assert found.stein == pytest.approx(times, abs=0.08)
    assert ["Stein's identity is off" in str(w.message) for w in seen] == [True] * warns
    assert found.passed == (not warns)


def test_a_wrong_direction_shows_in_the_eigenvalue() -> None:
    class Half(ExactScore):
        def forward(self, value, samples, context=None, *, center=None):  # type: ignore[no-untyped-def]
            # Right along one axis of the whitened space, half along the other.
            white = torch.linalg.solve_triangular(FACTOR, value.mT.reshape(2, -1), upper=False)
            white = white * torch.tensor([[1.0], [0.5]])
            score = -torch.linalg.solve_triangular(FACTOR.mT, white, upper=True)
            return score.reshape(value.mT.shape).mT

    loss = TraceImplicit_ELBO(Half)
    with torch.no_grad():
        loss.loss(_plain, one)
    with pytest.warns(UserWarning, match="Stein's identity is off"):
        found = stein_check(loss, one)["z"]
    assert found.stein == pytest.approx(0.75, abs=0.1)
    assert abs(found.worst_direction - 1) > 0.3


def test_figures_of_known_draws(float64: None) -> None:
    """Draws c = (±1, ±2) about their mean, in two traces, and the score (3, 4) - c."""
    centered = torch.tensor([[-1.0, -2.0], [1.0, 2.0], [1.0, -2.0], [-1.0, 2.0]])
    score = torch.tensor([3.0, 4.0]) - centered
    pairs = list(zip(score.split(2), centered.split(2), strict=True))
    found = _check(pairs, 1.6, 2.0)
    # The identity is (5 - 3 c1 - 4 c2) / 2, that is 8, -3, 5, 0, with 73 for the sum of squared
    # deviations, and the same mean in both traces; those of the score sum to 4 and 16.
    assert found.stein == pytest.approx(2.5)
    assert found.error == pytest.approx((73 / 3) ** 0.5 / 2)
    assert found.mean_score == pytest.approx((9 / (4 / 3 / 4) + 16 / (16 / 3 / 4)) ** 0.5)
    assert found.worst_direction == pytest.approx(4)  # of -E[s c'], diagonal with 1 and 4
    assert found.threshold == pytest.approx(1.6 + 2 * found.error)
    assert found.num_samples == 4
    assert found.passed
    assert not _check(pairs, 1.4, 0.0).passed
    # Traces of means 13 / 3 and -3: their spread is the larger error.
    order = torch.tensor([0, 2, 3, 1])
    pairs = list(zip(score[order].split([3, 1]), centered[order].split([3, 1]), strict=True))
    assert _check(pairs, 1.6, 2.0).error == pytest.approx(22 / 3 / 2)


def chain() -> None:
    """Two implicit sites, the first of which is the context of the second."""
    z = pyro.sample("z", Implicit(lambda e: e @ FACTOR.mT, 2))
    pyro.sample("y", Implicit(lambda e, c: c + e @ FACTOR.mT, 2, z))


def _chained() -> None:
    for name in "zy":
        pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_failure_rate_is_shared_by_the_sites() -> None:
    for guide, model, sites in ((one, _plain, 1), (chain, _chained, 2)):
        loss = TraceImplicit_ELBO(ExactScore)
        with torch.no_grad():
            loss.loss(model, guide)
        found = stein_check(loss, guide, tolerance=0.5, failure_rate=0.1)
        assert len(found) == sites
        k = NormalDist().inv_cdf(1 - 0.05 / sites)  # both tails
        for check in found.values():
            assert (check.threshold - 0.5) / check.error == pytest.approx(k)


def test_draws_for_the_whitening_are_as_many_as_in_training() -> None:
    """Vectorized particles are so many contexts of a second site, which get fewer draws each."""
    seen: dict[int, set[int]] = {0: set(), 2: set()}

    class Counting(ExactScore):
        def forward(self, value: Tensor, samples: Tensor, *args: Any, **options: Any) -> Tensor:
            seen[self.context_dim].add(len(samples))
            score: Tensor = super().forward(value, samples, *args, **options)
            return score

    loss = TraceImplicit_ELBO(
        Counting, num_particles=32, vectorize_particles=True, max_plate_nesting=0
    )
    for draws in ({0: {2048}, 2: {2048}}, {0: {2048}, 2: {2048 // 32}}):
        with torch.no_grad():  # at first without training: as many as one would take
            loss.loss(_chained, chain)
        seen[0].clear()
        seen[2].clear()
        stein_check(loss, chain)
        assert seen == draws
        loss.differentiable_loss(_chained, chain)


def test_errors() -> None:
    loss = trained(one, 1.0)
    for options, message in (
        ({"num_samples": 99}, "num_samples: expected at least 100, got 99"),
        ({"tolerance": -0.1}, "expected tolerance >= 0"),
        ({"failure_rate": 1.0}, r"failure_rate in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stein_check(loss, one, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without an estimator for any of its implicit sites"):
        stein_check(TraceImplicit_ELBO(), one)
