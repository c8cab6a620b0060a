# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Implicit guides against posteriors in closed form: Normal prior, Normal likelihood."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ardae import Implicit, TraceImplicit_ELBO

TOLERANCE = 0.05
"""Of the exact mean and of the exact standard deviation."""
STEPS = 1500
DRAWS = 100_000  # sampling error 0.3 % of a standard deviation
Fit = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class Sampler(PyroModule):
    """A linear map of noise and context plus a small network of both."""

    def __init__(self, dim: int, context_dim: int, hidden_dim: int = 32) -> None:
        super().__init__()
        self.linear = nn.Linear(dim + context_dim, dim)
        self.network = nn.Sequential(
            nn.Linear(dim + context_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim)
        )

    def forward(self, eps: Tensor, context: Tensor | None = None) -> Tensor:
        x = eps if context is None else torch.cat([eps, context], -1)
        return self.linear(x) + self.network(x)


def train(model: object, guide: object, steps: int, *args: Tensor) -> None:
    """Adam whose rate falls to a hundredth; the default loss."""
    decay = 0.01 ** (1 / steps)
    optim = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": decay, "betas": (0.9, 0.99)})
    svi = SVI(model, guide, optim, loss=TraceImplicit_ELBO())
    for _ in range(steps):
        svi.step(*args)


# ---- global: mean of a Normal with known variance ------------------------------------------------

SIGMA = torch.tensor([0.5, 1.0, 2.0])
OBSERVED = 10
PRIOR = 2.0


def fit_global(seed: int, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Learned mean and standard deviation, and the exact ones."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    x = torch.tensor([1.0, -2.0, 3.0]) + SIGMA * torch.randn(OBSERVED, 3)

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), PRIOR).to_event(1))
        with pyro.plate("data", OBSERVED):
            pyro.sample("x", dist.Normal(mu, SIGMA).to_event(1), obs=x)

    sampler = Sampler(3, 0)

    def guide(x: Tensor) -> None:
        pyro.module("sampler", sampler)
        pyro.sample("mu", Implicit(sampler, 3))

    train(model, guide, steps, x)
    with torch.no_grad():
        z = Implicit(sampler, 3).sample((DRAWS,))
    precision = PRIOR**-2 + OBSERVED / SIGMA**2
    return z.mean(0), z.std(0), x.sum(0) / SIGMA**2 / precision, precision.rsqrt()


# ---- local: one latent per row, amortized, in a subsampled plate ---------------------------------

ROWS, BATCH, DIM = 200, 32, 2
NOISE = torch.tensor([0.5, 1.0])


def fit_local(seed: int, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Learned mean and standard deviation of every row, and the exact ones."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    x = torch.randn(ROWS, DIM) + NOISE * torch.randn(ROWS, DIM)

    def model(x: Tensor) -> None:
        with pyro.plate("data", ROWS, subsample_size=BATCH) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x[index])

    sampler = Sampler(DIM, DIM)

    def guide(x: Tensor) -> None:
        pyro.module("sampler", sampler)
        with pyro.plate("data", ROWS, subsample_size=BATCH) as index:
            pyro.sample("z", Implicit(sampler, DIM, x[index]))

    train(model, guide, steps, x)
    with torch.no_grad():
        z = Implicit(sampler, DIM, x).sample((DRAWS // 10,))
    precision = 1 + NOISE**-2
    return z.mean(0), z.std(0), x / NOISE**2 / precision, precision.rsqrt().expand(ROWS, DIM)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fit", [fit_global, fit_local])
def test_posterior_in_full(fit: Fit, seed: int) -> None:
    check(*fit(seed))


@pytest.mark.parametrize(("fit", "steps"), [(fit_global, 800), (fit_local, 500)])
def test_posterior(fit: Fit, steps: int) -> None:
    """The same bounds with fewer steps and one seed, 10 seconds each."""
    check(*fit(0, steps))


def check(mean: Tensor, std: Tensor, exact_mean: Tensor, exact_std: Tensor) -> None:
    """Every coordinate; a mean of many rows by root mean squares, since single ones are near 0."""
    if mean.dim() > 1:
        error = (mean - exact_mean).square().mean(0).sqrt() / exact_mean.square().mean(0).sqrt()
        spread = (std / exact_std - 1).square().mean(0).sqrt()
    else:
        error, spread = (mean / exact_mean - 1).abs(), (std / exact_std - 1).abs()
    assert float(error.max()) < TOLERANCE, error
    assert float(spread.max()) < TOLERANCE, spread
