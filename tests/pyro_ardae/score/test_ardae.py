# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from pyro_ardae.score import ARDAE
from pyro_ardae.score.energy import EnergyNetwork
from pyro_ardae.score.residual import ResidualNetwork
from pyro_ardae.score.student import Student
from tests.pyro_ardae.oracle import relative_error

KINDS = ["residual", "energy"]
MODES = ["pooled", "full", "diagonal", "none"]


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [ResidualNetwork, EnergyNetwork])
@pytest.mark.parametrize("features", [0, 4])
def test_field_is_zero_at_first(network: Any, features: int) -> None:
    net = network(3, features, 6, 2)
    field = net.field(
        net.initial(), torch.randn(7, 5, 3), torch.ones(7, 5, 1), torch.ones(5, features)
    )
    assert float(field.abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_antithetic_loss_is_the_plain_definition_on_given_noise(float64: None, kind: Any) -> None:
    """Mean over +u and -u of |u / sigma + f(w + sigma u; sigma)|^2 - |u / sigma|^2, with the
    Gaussian part in f."""
    estimator = ARDAE(3, 4, parametrization=kind, hidden_dim=6, depth=2).double()
    estimator.weights += 0.3 * torch.randn_like(estimator.weights)
    features = torch.randn(5, estimator.network.feature_dim)
    w, base = torch.randn(7, 5, 3), Student(9.0, 1.3)
    state = torch.get_rng_state()
    loss, _ = estimator._loss(w, features, base)
    torch.set_rng_state(state)
    sigma = estimator.delta * (0.02 + 0.98 * torch.rand(7, 5, 1))
    u = torch.randn(7, 5, 3)
    terms = []
    for sign in (1, -1):
        x = w + sigma * sign * u
        r = estimator.network.field(estimator.weights, x, sigma, features)
        f = -x * (1 + 1 / 9) / (1.3 + sigma**2 + x**2 / 9) + r
        terms.append((sign * u / sigma + f).square().mean() - (u / sigma).square().mean())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


# ---- known scores --------------------------------------------------------------------------------


def test_learns_without_whitening() -> None:
    estimator = ARDAE(2, whitening="none", hidden_dim=32, depth=2)
    scale = torch.tensor([1.0, 0.7])
    for _ in range(250):
        estimator.update(scale * torch.randn(512, 2))
    value = scale * torch.randn(2000, 2)
    score = -value / scale**2
    assert relative_error(estimator(value, value[:512]), score) < 0.5 * relative_error(
        -value, score
    )


def test_reference_is_the_score_until_the_network_has_learned_more() -> None:
    """Of a density that is not quite q the difference is learned; of q itself, none is there."""
    q, near = Normal(0.5, 0.8), Normal(0.0, 1.0)
    value = q.sample((500, 1))
    errors = {}
    for name, density in (("near", near), ("q", q)):
        estimator = ARDAE(
            1,
            whitening="none",
            hidden_dim=16,
            depth=2,
            reference=lambda z, density=density: -(z - density.mean) / density.variance,
        )
        truth = -(value - q.mean) / q.variance
        before = relative_error(estimator(value, value), truth)
        for _ in range(100):
            estimator.update(q.sample((256, 1)))
        errors[name] = (before, relative_error(estimator(value, value), truth))
    assert errors["q"][0] == 0.0
    assert errors["q"][1] < 0.02
    assert errors["near"][0] > 0.2
    assert errors["near"][1] < 0.03


def test_reference_wants_the_coordinates_that_it_is_a_function_of() -> None:
    for options in ({}, {"whitening": "none", "parametrization": "energy"}):
        with pytest.raises(ValueError, match="whitening='none' and parametrization='residual'"):
            ARDAE(2, reference=torch.neg, **options)  # type: ignore[arg-type]


# ---- the energy's density ------------------------------------------------------------------------


def trained(dim: int, context_dim: int, mode: Any, updates: int = 60) -> ARDAE:
    estimator = ARDAE(
        dim, context_dim, parametrization="energy", whitening=mode, hidden_dim=8, depth=2
    ).double()
    for _ in range(updates):
        c = torch.randn(6, context_dim) if context_dim else None
        z = 3.5 * (torch.rand(64, 6, dim) - 0.5)
        estimator.update(z if c is None else z + c[:, :1], c)
    return estimator


@pytest.mark.parametrize("batch", [(), (3, 1, 2)])
@pytest.mark.parametrize("context_dim", [0, 4])
def test_shape_of_log_prob(batch: tuple[int, ...], context_dim: int) -> None:
    estimator = ARDAE(3, context_dim, parametrization="energy", hidden_dim=8, depth=2)
    samples, value = torch.randn(12, *batch, 3), torch.randn(7, *batch, 3)
    context = torch.randn(*batch, context_dim) if context_dim else None
    estimator.update(samples, context)
    log_prob = estimator.log_prob(value, samples, context)
    assert log_prob.shape == (7, *batch)
    assert bool(torch.isfinite(log_prob).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_gradient_of_log_prob_is_the_score(float64: None, mode: Any, context_dim: int) -> None:
    """By central differences in one call, that is with one and the same normalizer."""
    dim, h = 3, 1e-5
    estimator = trained(dim, context_dim, mode)
    z = torch.randn(64, 6, dim)
    c = torch.randn(6, context_dim) if context_dim else None
    value = torch.randn(5, 6, dim)
    steps = h * torch.eye(dim).reshape(dim, 1, 1, dim)
    stacked = torch.cat([(value + steps).flatten(0, 1), (value - steps).flatten(0, 1)])
    plus, minus = estimator.log_prob(stacked, z, c).reshape(2, dim, 5, 6)
    gradient = ((plus - minus) / (2 * h)).movedim(0, -1)
    torch.testing.assert_close(gradient, estimator(value, z, c), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_density_integrates_to_one(
    float64: None, context_dim: int, standard_errors: Callable[[int], float]
) -> None:
    """On a grid, within the error of the normalizer's Monte Carlo estimate.

    The integral is Z / Z' with Z' unbiased for Z, so the mean of its inverse over independent
    estimates is 1. The same draws and context in all rows; the normalizer's draws differ.
    """
    rows, points = 300, 600
    estimator = trained(1, context_dim, "diagonal" if context_dim else "pooled")
    # Tails lighter than the base's, and a context in the middle of those trained on: elsewhere the
    # normalizer's estimate can be too heavy-tailed to have a standard error.
    c = torch.full((rows, context_dim), 0.3) if context_dim else None
    z = 3.5 * (torch.rand(64, 1, 1) - 0.5)
    z = (z + (0.0 if c is None else c[:1, :1])).expand(-1, rows, -1)
    # w in [-8, 8]: beyond it the Gaussian base leaves nothing that the energy could bring back
    frame = estimator.whitening.frame(z[:, :1], torch.zeros(1, 0) if c is None else c[:1])
    half = 8.0 * float(frame.scale.flatten()[0])
    center = float(frame.mean.flatten()[0])
    grid = torch.linspace(center - half, center + half, points)
    log_prob = estimator.log_prob(grid.reshape(-1, 1, 1).expand(-1, rows, 1), z, c)
    integral = log_prob.exp().sum(0) * (2 * half / (points - 1))
    inverse = 1 / integral
    error = float(inverse.std()) / rows**0.5
    assert error < 0.02
    assert abs(float(inverse.mean()) - 1) < standard_errors(1) * error


def test_density_of_a_gaussian(float64: None, standard_errors: Callable[[int], float]) -> None:
    """Untrained, the energy is 0: the density is the moment-matched Gaussian, in closed form."""
    estimator = ARDAE(2, parametrization="energy").double()
    z = torch.randn(4, 64, 1, 2) * torch.tensor([3.0, 0.1]) + 1.0
    estimator.whitening.pool(z, torch.zeros(1, 0))
    flat = z.reshape(-1, 2)
    cov = torch.cov(flat.mT, correction=0)
    shrink = (2 / (2 + len(flat))) ** 2  # of the correlation, as in Whitening
    cov[0, 1] *= 1 - shrink
    cov[1, 0] *= 1 - shrink
    q = torch.distributions.MultivariateNormal(flat.mean(0), cov)
    value = q.sample((10,))
    torch.testing.assert_close(
        estimator.log_prob(value, flat), q.log_prob(value), rtol=1e-9, atol=1e-9
    )


def test_residual_has_no_density() -> None:
    estimator = ARDAE(2)
    z = torch.randn(16, 2)
    estimator.update(z)
    with pytest.raises(NotImplementedError, match="parametrization='energy'"):
        estimator.log_prob(z[:1], z)


# ---- device ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_moves_to_the_gpu_and_back(kind: Any) -> None:
    estimator = ARDAE(2, 3, parametrization=kind, hidden_dim=16, depth=2)
    z, c = torch.randn(16, 5, 2), torch.randn(5, 3)
    estimator.update(z, c)
    estimator.cuda()
    estimator.update(z.cuda(), c.cuda())
    assert estimator(z.cuda(), z.cuda(), c.cuda()).is_cuda
    estimator.cpu()
    estimator.update(z, c)


def test_ratio_weight_learns_weights_and_normalization() -> None:
    """Two modes with nothing in between, of weights 0.8 and 0.2: slopes do not tell them."""
    errors = {}
    for weight in (0.0, 30.0):
        torch.manual_seed(0)
        estimator = ARDAE(
            1,
            parametrization="energy",
            whitening="none",
            num_folds=1,
            hidden_dim=32,
            depth=2,
            ratio_weight=weight,
            num_normalizer_samples=0 if weight else 256,
        )

        def draw(count: int) -> torch.Tensor:
            center = torch.where(torch.rand(count, 1, 1) < 0.8, -0.7, 1.5)
            return center + 0.15 * torch.randn(count, 1, 1)

        for _ in range(250):
            estimator.update(draw(256))
        z = draw(2000)
        normal = torch.distributions.Normal(torch.tensor([-0.7, 1.5]), 0.15)
        exact = (normal.log_prob(z) + torch.tensor([0.8, 0.2]).log()).logsumexp(-1)
        found = estimator.log_prob(z, z).squeeze(-1)
        errors[weight] = float((found - exact.squeeze(-1)).abs().mean())
        score, log_prob = estimator.score_and_log_prob(z, z)
        assert torch.allclose(score, estimator(z, z), atol=1e-5)
        if weight:
            assert torch.allclose(log_prob.squeeze(-1), found, atol=1e-5)
            assert abs(float(estimator.log_normalizer(z))) < 0.2
    assert errors[30.0] < 0.2 < errors[0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_weight": -1.0}, "expected ratio_weight >= 0, got -1.0"),
        ({"ratio_weight": 1.0}, "expected parametrization='energy' with a ratio_weight"),
        ({"num_normalizer_samples": 0}, "expected num_normalizer_samples >= 1, got 0"),
    ],
)
def test_bad_options_of_the_density(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARDAE(2, **options)  # type: ignore[arg-type]
