# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""In half precision, by ``torch.autocast`` or throughout: the score and the checks as ever."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_ardae import (
    AutoImplicit,
    Implicit,
    TraceImplicit_ELBO,
    elbo_estimate,
    log_likelihood,
    stein_check,
)


def model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 0] + z[..., 1] ** 2, 0.3), obs=x)


def by_hand() -> Any:
    sampler = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 2))

    def guide(x: Tensor) -> None:
        pyro.module("sampler", sampler)
        pyro.sample("z", Implicit(sampler, noise=8, event_shape=(2,)))

    return guide


@pytest.mark.parametrize("make", [by_hand, lambda: AutoImplicit(model)], ids=["hand", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step(make: Any, dtype: torch.dtype) -> None:
    guide, x = make(), torch.tensor(1.0)
    elbo = TraceImplicit_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    with torch.autocast("cpu", dtype):
        for _ in range(3):
            svi.step(x)
    (estimator,) = elbo.estimators.values()
    assert all(p.dtype == torch.float32 for p in estimator.parameters())
    for value in pyro.get_param_store().values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    (figures,) = elbo.diagnostics().values()
    assert 0.5 < figures["stein"] < 2


def trained(dtype: torch.dtype) -> tuple[Any, TraceImplicit_ELBO]:
    """A sampler whose draws are normal, to rounding: 0.5 a noise of 2, in ``dtype``."""
    sampler = nn.Linear(2, 2)
    nn.init.zeros_(sampler.bias)
    with torch.no_grad():
        sampler.weight.copy_(0.5 * torch.eye(2))
    sampler.to(dtype)

    def guide(x: Tensor) -> None:
        pyro.module("sampler", sampler)
        pyro.sample("z", Implicit(lambda noise: sampler(noise.to(dtype)), 2, event_shape=(2,)))

    elbo = TraceImplicit_ELBO(num_particles=64, vectorize_particles=True)
    svi = SVI(gaussian, guide, pyro.optim.Adam({"lr": 0.0}), elbo)
    for _ in range(30):
        svi.step(torch.zeros(2))
    return guide, elbo


def gaussian(x: Tensor) -> None:
    """The posterior of z is of standard deviation 0.5, and p(x) is N(0, 4 / 3)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 3**-0.5).to_event(1), obs=x)


@pytest.mark.parametrize("throughout", [False, True], ids=["autocast", "modules"])
def test_the_checks(throughout: bool) -> None:
    pyro.set_rng_seed(0)
    guide, elbo = trained(torch.bfloat16 if throughout else torch.float32)
    x, exact = torch.zeros(2), -math.log(2 * math.pi * 4 / 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=not throughout):
        (check,) = stein_check(elbo, guide, x).values()
        estimate = log_likelihood(gaussian, guide, x, num_samples=500)
        bound = elbo_estimate(gaussian, guide, x, num_samples=400, num_updates=100, loss=elbo)
    assert check.passed
    # The draws are rounded to 8 bits, of which a squared distance of 3 makes 0.01 nats.
    assert estimate.value.dtype == torch.float32
    assert float(estimate.value) == pytest.approx(exact, abs=0.03)
    assert bound.value == pytest.approx(exact, abs=0.2)


def test_many_wide_draws_in_half_precision_are_finite() -> None:
    """The sum of their squares is not, in half precision."""
    sampler = nn.Linear(40, 40)
    nn.init.eye_(sampler.weight)
    sampler.half()

    def guide() -> None:
        pyro.module("sampler", sampler)
        pyro.sample("z", Implicit(lambda noise: sampler(noise.half()), 40, event_shape=(40,)))

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(40), 1.0).to_event(1))

    elbo = TraceImplicit_ELBO(num_score_samples=2048)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), elbo).step()
