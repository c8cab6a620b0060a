# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ardae import Implicit, TraceImplicit_ELBO, stein_check
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
    guide: Callable[[], None], standard_errors: Callable[[int], float]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stein_check(trained(guide, 1.0), guide, tolerance=0.0, failure_rate=1e-5)["z"]
    assert found.passed
    assert abs(found.stein - 1) < standard_errors(1) * found.error
    # Var(s'z) = 2 D: 1 / D of it has the standard error sqrt(2 / D / N). (12 rows share a mean.)
    assert found.error == pytest.approx((1 / found.num_samples) ** 0.5, rel=0.2)
    assert found.mean_score < 6
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
