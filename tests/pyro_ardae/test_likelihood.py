# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""log_likelihood against models whose evidence is known."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_ardae import Implicit, elbo_estimate, log_likelihood, to_arviz

X = torch.tensor([-1.0, 0.3, 2.0])


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


EXACT = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X)


def test_every_point_of_a_local_model(standard_errors: Callable[[int], float]) -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = 0.5 / math.sqrt(1.25)
            mean = x.unsqueeze(-1) / 1.25
            noise = dist.Normal(mean, scale).to_event(1)
            pyro.sample("z", Implicit(lambda e, c: e[..., 0], noise, mean, ()))

    found = log_likelihood(local, guide, X, num_samples=1000)
    assert found.plates == ("data",)
    assert found.value.shape == found.error.shape == found.pareto_k.shape == (3,)
    # The fit to 1000 draws is off by 3 %, so weights vary by few percent.
    assert bool(((found.value - EXACT).abs() < standard_errors(3) * found.error + 1e-5).all())
    assert float(found.error.max()) < 0.01
    assert float(found.ess.min()) > 900
    assert "mean of 3 points and its standard error, 1000 samples" in str(found)


@pytest.mark.parametrize("by", ["obs_mask", "poutine", "distribution"])
def test_latents_that_are_masked_out(by: str, standard_errors: Callable[[int], float]) -> None:
    """They have no part in p(x)."""
    seen = torch.tensor([True, True, False])

    def model(x: Tensor) -> None:
        if by == "obs_mask":
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)
            return
        with pyro.plate("data", 3), poutine.mask(mask=seen) if by == "poutine" else nullcontext():
            rate = dist.LogNormal(0.0, 0.3)
            z = pyro.sample("z", rate if by == "poutine" else rate.mask(seen))
            pyro.sample("x", dist.Normal(z.log(), 1.0).mask(seen), obs=x)

    def guide(x: Tensor) -> None:
        if by == "obs_mask":
            mu = pyro.sample("mu", dist.Normal(x[:2].sum() / 3, 3**-0.5))
            with pyro.plate("data", 3):
                pyro.sample("x_unobserved", dist.Normal(mu, 1.0))
            return
        with pyro.plate("data", 3):
            pyro.sample("z", dist.LogNormal(x * 0.09 / 1.09, (0.09 / 1.09) ** 0.5))

    found = log_likelihood(model, guide, X, num_samples=4000)
    if by == "obs_mask":
        exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(X[:2])
    else:
        exact = torch.where(seen, dist.Normal(0.0, 1.09**0.5).log_prob(X), 0.0)
    assert bool(((found.value - exact).abs() < standard_errors(3) * found.error + 1e-4).all())
    assert float(found.error.max()) < 0.1


def test_an_improper_prior() -> None:
    """It has no draws: the model's structure is seen on those of the guide."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(x.mean(), 3**-0.5))

    centered = X - X.mean()
    exact = -math.log(2 * math.pi) - 0.5 * math.log(3.0) - 0.5 * float(centered.square().sum())
    assert float(log_likelihood(model, guide, X).value) == pytest.approx(exact, abs=0.02)
    assert elbo_estimate(model, guide, X).value == pytest.approx(exact, abs=1e-4)
    assert "prior" not in dir(to_arviz(model, guide, X, num_samples=10, prior=False))


def test_all_data_of_a_global_model(standard_errors: Callable[[int], float]) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 4.0).log_prob(X)
    guide = AutoNormal(model, init_scale=0.6)
    guide(X)
    with torch.no_grad():
        guide.locs.mu.copy_(X.sum() / (3 + 0.25))
    found = log_likelihood(model, guide, X, num_samples=2000)
    assert found.plates == ()
    assert found.value.shape == ()
    assert abs(float(found.value - exact)) < standard_errors(1) * float(found.error) + 1e-5
    assert float(found.error) < 0.02
    assert "all data" in str(found)


def test_a_positive_latent_has_its_jacobian(standard_errors: Callable[[int], float]) -> None:
    y = torch.tensor([0.2, 1.0, 5.0])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.LogNormal(z.log(), 0.5), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.LogNormal(y.log() / 1.25, 0.5 / math.sqrt(1.25)))

    exact = dist.LogNormal(0.0, math.sqrt(1.25)).log_prob(y)
    found = log_likelihood(model, guide, y)
    assert bool(((found.value - exact).abs() < standard_errors(3) * found.error + 1e-5).all())
    assert float(found.error.max()) < 0.01


def test_a_bad_guide_is_warned_about() -> None:
    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.25, 0.05))

    with pytest.warns(UserWarning, match=r"Pareto k above 0.7 for \d of 3 .* heavy for the est"):
        found = log_likelihood(local, narrow, X, num_samples=1000)
    assert float(found.pareto_k.max()) > 0.7
    assert float(found.value.mean()) < float(EXACT.mean())


def test_one_draw_at_a_time() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x / 1.25, torch.full((3,), 0.45)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = log_likelihood(
            local, guide, X, num_samples=200, num_guide_samples=100, parallel=False
        )
    assert float((found.value - EXACT).abs().max()) < 0.05


def line(x: Tensor, y: Tensor) -> None:
    """Does not broadcast: a matrix is transposed."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ weight.t()).squeeze(-1), 0.5), obs=y)


def wide(x: Tensor, y: Tensor) -> None:
    """Broadcasts to what it should not."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * weight.unsqueeze(-2)).sum(-1), 0.5), obs=y)


LINE = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([0.3, -0.2, 1.0])


def test_a_model_that_does_not_broadcast() -> None:
    x, y = LINE
    guide = AutoMultivariateNormal(line)
    with pytest.raises(RuntimeError, match=r"plate of 100 draws\. .*pass parallel=False\. t"):
        log_likelihood(line, guide, x, y, num_samples=100)
    with pytest.raises(RuntimeError, match="pass parallel=False"):
        to_arviz(line, guide, x, y)
    with pytest.raises(ValueError, match=r"'y': expected 2 dimensions .* shape \(100, 100, 3\)"):
        log_likelihood(wide, AutoNormal(wide), x, y, num_samples=100)
    covariance = x @ x.mT + 0.25 * torch.eye(3)
    exact = float(dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(y))
    precision = torch.eye(2) + 4 * x.mT @ x
    mean = (precision.inverse() @ (4 * x.mT @ y)).view(1, 2)
    posterior = dist.MultivariateNormal(mean, precision_matrix=precision).to_event(1)

    def fitted(x: Tensor, y: Tensor) -> None:
        pyro.sample("weight", posterior)

    found = log_likelihood(
        line, fitted, x, y, num_samples=200, num_guide_samples=400, parallel=False
    )
    assert abs(float(found.value) - exact) < 0.05


@pytest.mark.filterwarnings("ignore:log_likelihood. Pareto")  # it is not trained
def test_global_state_is_left_alone() -> None:
    guide = AutoMultivariateNormal(local, init_scale=0.45)
    guide(X)
    before = set(pyro.get_param_store().keys())
    with pyro.poutine.trace() as seen:
        log_likelihood(local, guide, X, num_samples=200)
    assert not [n for n in seen.trace.nodes if n in ("z", "x")]
    assert set(pyro.get_param_store().keys()) == before


def test_errors() -> None:
    guide = AutoNormal(local)
    with pytest.raises(ValueError, match="num_samples: expected at least 25, got 24"):
        log_likelihood(local, guide, X, num_samples=24)
    with pytest.raises(ValueError, match=r"at least 2 \* dim = 2 draws"):
        log_likelihood(local, guide, X, num_guide_samples=1)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        log_likelihood(local, guide, X, chunk_size=0)
