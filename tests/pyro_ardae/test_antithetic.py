# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Particles in pairs of opposite noise: their law, the gradient's, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ardae import (
    AutoImplicit,
    Implicit,
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from tests.pyro_ardae.oracle import Oracle

ELBOS = (TraceImplicit_ELBO, TraceImplicitMeanField_ELBO, TraceImplicitEnum_ELBO)
X = torch.tensor([0.3, -1.0, 0.8])
PARTICLES = 6
STANDARD = partial(Oracle, score=lambda value, context: -value)


def noise_of(kind: str) -> Any:
    loc = torch.tensor([0.5, -0.5])
    return {
        "standard": 2,
        "normal": dist.Normal(loc, torch.tensor([2.0, 3.0])).to_event(1),
    }[kind]


def model() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=X)


def guide(seen: dict[str, Tensor], kind: str = "standard") -> None:
    loc = pyro.param("loc", torch.tensor([0.2, -0.4]))

    def keep(name: str, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen[name] = noise
        return loc + noise

    mu = pyro.sample("mu", Implicit(partial(keep, "mu"), noise_of(kind), None, (2,)))
    context = mu.reshape(*mu.shape[:-1], 2)
    with pyro.plate("data", 3):
        context = context.expand(*mu.shape[:-2], 3, 2) if mu.dim() > 1 else context.expand(3, 2)
        pyro.sample("z", Implicit(lambda e, c: keep("z", e) + c, noise_of(kind), context, (2,)))


@pytest.mark.parametrize("kind", ["standard", "normal"])
@pytest.mark.parametrize("elbo_class", ELBOS)
@pytest.mark.parametrize("nesting", [1, float("inf")])
def test_noise_comes_in_pairs(elbo_class: Any, nesting: float, kind: str) -> None:
    """Along the particles, for every site; not along the rows of the data."""
    elbo = elbo_class(
        partial(Oracle, score=lambda value, context: torch.zeros_like(value)),
        num_score_samples=4,
        num_particles=PARTICLES,
        vectorize_particles=True,
        max_plate_nesting=nesting,
        strict_enumeration_warning=False,
        antithetic=True,
    )
    seen: dict[str, Tensor] = {}
    for _ in range(2):  # the first step also draws for the check of the context
        elbo.loss_and_grads(model, partial(guide, seen, kind))
    mean = 0.0 if kind == "standard" else torch.tensor([0.5, -0.5])
    assert seen["mu"].shape == (PARTICLES, 1, 2)
    assert seen["z"].shape == (PARTICLES, 3, 2)
    for noise in seen.values():
        first, second = noise.chunk(2)
        torch.testing.assert_close(first - mean, mean - second)
        assert len(first.flatten(0, -2).unique(dim=0)) == first[..., 0].numel()
    # One draw after the step, and draws of the same distributions in it, are not paired.
    assert not torch.equal(seen["z"][:, 0], -seen["z"][:, 1])


def gradients(**options: Any) -> Tensor:
    """Of the location of a guide Normal(0, 1) for the target Normal(1, 1), in 200 steps.

    With half of the score, -z / 2, that of a particle is (z - 1) - z / 2 = z / 2 - 1.
    """

    def target() -> None:
        pyro.sample("z", dist.Normal(1.0, 1.0))

    def shifted() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", Implicit(lambda e: (loc + e).squeeze(-1), 1, None, ()))

    elbo = TraceImplicit_ELBO(
        partial(Oracle, score=lambda value, context: -value / 2),
        num_score_samples=2,
        num_particles=8,
        vectorize_particles=True,
        **options,
    )
    result = []
    for _ in range(200):
        elbo.loss_and_grads(target, shifted)
        loc = pyro.param("loc").unconstrained()
        result.append(float(loc.grad))
        loc.grad = None
    return torch.tensor(result)


def test_noise_of_a_gradient_that_is_odd_cancels() -> None:
    torch.testing.assert_close(gradients(antithetic=True), torch.full((200,), -1.0))
    plain = gradients()
    error = 0.5 / 8**0.5 / 200**0.5  # z / 2, 8 particles, 200 steps
    assert float(plain.mean()) == pytest.approx(-1.0, abs=4.4 * error)
    assert float(plain.std()) > 0.1


def test_an_automatic_guide_trains_with_it() -> None:
    automatic = AutoImplicit(model)
    elbo = TraceImplicit_ELBO(
        num_score_samples=32, num_particles=4, vectorize_particles=True, antithetic=True
    )
    svi = pyro.infer.SVI(model, automatic, pyro.optim.Adam({"lr": 1e-3}), elbo)
    assert all(torch.isfinite(torch.tensor(svi.step())) for _ in range(3))
    # Outside of the loss draws are independent.
    draws = automatic.sample_posterior(4)["mu"]
    assert len(draws.unique(dim=0)) == 4


def laplace() -> None:
    z = Implicit(lambda e: e, dist.Laplace(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("mu", z)


def step(**options: Any) -> Callable[[], Any]:
    return lambda: TraceImplicit_ELBO(STANDARD, antithetic=True, **options).loss_and_grads(
        lambda: pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1)), laplace
    )


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "one particle": (step(vectorize_particles=True), "an even num_particles.*got 1 and True"),
    "odd": (step(num_particles=3, vectorize_particles=True), "an even num_particles.*got 3 and"),
    "one by one": (step(num_particles=4), "vectorize_particles=True, got 4 and False"),
    "other noise": (
        step(num_particles=4, vectorize_particles=True),
        "expected normal noise.*got Laplace. Leave antithetic out",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_error(row: str) -> None:
    call, words = ERRORS[row]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        call()
