# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Targets of score estimation: their scores, densities, moments and draws agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.densities import Funnel, StudentT, Target
from models.mixtures import ConditionalMixture, GaussianMixture
from models.targets import TARGETS

EVERY = pytest.mark.parametrize("name", TARGETS)


def draw(target: Target, num_samples: int, num_contexts: int) -> tuple[Tensor, Tensor]:
    context = target.contexts(num_contexts)
    return target.sample(num_samples, context), context


@EVERY
def test_score_is_the_gradient_of_log_prob(name: str, float64: None) -> None:
    target = TARGETS[name]().at(100)
    value, context = draw(target, 5, 4)
    value = 1.5 * value  # off the draws too
    value.requires_grad_()
    log_prob = target.log_prob(value, context)
    assert log_prob.shape == (5, 4)
    (gradient,) = torch.autograd.grad(log_prob.sum(), value)
    torch.testing.assert_close(target.score(value.detach(), context), gradient, rtol=1e-10, atol=0)


@EVERY
def test_shapes_and_dtypes(name: str) -> None:
    target = TARGETS[name]()
    value, context = draw(target, 3, 5)
    mean, cov = target.moments(context)
    assert context.shape == (5, target.context_dim)
    assert value.shape == target.score(value, context).shape == (3, 5, target.dim)
    assert (mean.shape, cov.shape) == ((5, target.dim), (5, target.dim, target.dim))
    assert {x.dtype for x in (value, context, mean, cov)} == {torch.float32}


@EVERY
def test_draws_have_the_moments_and_the_score(
    name: str, float64: None, standard_errors: Callable[[int], float]
) -> None:
    """In units in which the covariance is I: E w = 0, E w w^T = I, and Stein's identities
    E s = 0, E s w^T = -I. The draws know the density through nothing but ``sample``."""
    target = TARGETS[name]().at(300)
    rows = 2 if target.context_dim else 1
    if isinstance(target, Funnel):
        target = replace(target, scale=0.7)  # fourth moments of the draws and of the score
    if isinstance(target, StudentT):
        target = replace(target, degrees=9)
    value, context = draw(target, 4000, rows)
    mean, cov = target.moments(context)
    factor = torch.linalg.cholesky(cov)
    w = torch.linalg.solve_triangular(factor, (value - mean).unsqueeze(-1), upper=False).squeeze(-1)
    s = torch.einsum("bji,nbj->nbi", factor, target.score(value, context))
    eye = torch.eye(target.dim)
    outer = w.unsqueeze(-1) * w.unsqueeze(-2)
    stein = s.unsqueeze(-1) * w.unsqueeze(-2)
    for draws, expected in ((w, 0 * eye[0]), (outer, eye), (s, 0 * eye[0]), (stein, -eye)):
        error = (draws.mean(0) - expected).abs()
        bound = standard_errors(error.numel()) * draws.std(0) / len(draws) ** 0.5
        # A Gaussian has s = -w: products without noise, up to rounding.
        assert (error <= bound + 1e-9).all()


@pytest.mark.parametrize(
    ("target", "interval"),
    [
        (TARGETS["mixture1"](), 8.0),
        (StudentT(1, 0, 3), 5e4),
    ],
)
def test_densities_on_the_line_integrate_to_one(
    target: Target, interval: float, float64: None
) -> None:
    # x = sinh t resolves the middle and the tails.
    t = torch.linspace(-math.asinh(interval), math.asinh(interval), 20_001)
    density = target.log_prob(t.sinh()[:, None, None], torch.empty(1, 0))[:, 0].exp()
    assert torch.trapezoid(density * t.cosh(), t) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("ring", (5.0, 5.0)),
        ("moons", (4.0, 4.0)),
        ("mixture2", (15.0, 15.0)),
        ("funnel", (5.0, 30)),
    ],
)
def test_densities_in_the_plane_integrate_to_one(
    name: str, limits: tuple[float, float], float64: None
) -> None:
    target = TARGETS[name]()
    if isinstance(target, Funnel):
        target = replace(target, scale=0.7)  # 30 is 5 standard deviations of x at y = 5 of 7
    axes = [torch.linspace(-limit, limit, 151) for limit in limits]
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    grid = torch.cartesian_prod(*axes).unsqueeze(1)
    density = target.log_prob(grid, target.contexts(1)).exp()
    assert float(density.sum()) * cell == pytest.approx(1.0, abs=1e-3)


def test_hierarchy_by_a_rule_of_its_own(float64: None) -> None:
    """Other nodes, the joint density written out, and differences instead of the gradient."""
    target = TARGETS["hierarchy"]()
    value, context = draw(target, 50, 1)

    def log_prob(z: Tensor) -> Tensor:
        e = torch.linspace(-7.3, 7.1, 4001)
        mean = torch.stack([2 * e, e**2 - 1], -1)
        scale = 0.3 * (0.4 * (2 * e).sin()).exp()
        square = ((z - mean) / scale[:, None]).square().sum(-1) + e.square()
        log_joint = -0.5 * square - 2 * scale.log() - 1.5 * math.log(2 * math.pi)
        return torch.logsumexp(log_joint + (e[1] - e[0]).log(), -1, keepdim=True)

    torch.testing.assert_close(target.log_prob(value, context), log_prob(value))
    steps = 1e-5 * torch.eye(2)
    rise = [log_prob(value + step) - log_prob(value - step) for step in steps]
    difference = torch.stack(rise, -1) / 2e-5
    torch.testing.assert_close(target.score(value, context), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dim", "expected"), [(2, 0.672), (8, 0.467), (32, 0.288)])
def test_conditional_mixtures_are_as_far_from_gaussian_as_meant(dim: int, expected: float) -> None:
    target = TARGETS[f"mixture{dim}"]()
    value, context = draw(target, 16, 2048)
    error = target.relative_error(target.gaussian_score(value, context), value, context)
    assert error == pytest.approx(expected, abs=0.03)


def test_the_moving_mixture_moves_by_its_drift_and_keeps_its_shape(float64: None) -> None:
    target = TARGETS["moving8"]()
    assert isinstance(target, ConditionalMixture)
    context = target.contexts(500)
    scale = target.components(context).scales[:, :1]  # .8 times that of the context
    means = [0.8 * target.at(step).components(context).means / scale for step in (0, 1, 700)]
    speed = (means[1] - means[0]).square().sum(-1).mean().sqrt()
    assert speed == pytest.approx(target.drift, rel=0.05)
    assert torch.cdist(means[2], means[2]).allclose(torch.cdist(means[0], means[0]))
    assert (means[2] - means[0]).norm(dim=-1).min() > 1.0


def test_the_rotated_mixture_is_the_other_one_rotated(float64: None) -> None:
    straight, rotated = TARGETS["mixture8"](), TARGETS["mixture8-rotated"]()
    assert isinstance(rotated, ConditionalMixture)
    value, context = draw(straight, 6, 3)
    frame = rotated.components(context).frame
    torch.testing.assert_close(frame @ frame.mT, torch.eye(8))
    torch.testing.assert_close(
        rotated.score(value @ frame.mT, context), straight.score(value, context) @ frame.mT
    )


def test_contexts_change_location_scale_and_shape() -> None:
    """Scales by a factor of about e between the 5th and the 95th percentile."""
    for dim in (2, 8, 32):
        target = TARGETS[f"mixture{dim}"]()
        components = target.components(target.contexts(4000))  # type: ignore[attr-defined]
        low, high = components.scales[:, 0].quantile(torch.tensor([0.05, 0.95]), dim=0).log()
        assert 0.7 < (high - low).mean() < 1.3
        assert components.means.std(0).min() > 0.1


def test_relative_error_is_that_of_whitened_scores(float64: None) -> None:
    target = TARGETS["mixture8-rotated"]()
    value, context = draw(target, 7, 3)
    exact = target.score(value, context)
    estimate = exact + torch.randn_like(exact)
    factor = torch.linalg.cholesky(target.moments(context)[1])
    whitened = torch.einsum("bji,nbj->nbi", factor, exact)
    error = torch.einsum("bji,nbj->nbi", factor, estimate) - whitened
    expected = error.square().sum() / whitened.square().sum()
    torch.testing.assert_close(target.relative_error(estimate, value, context), expected)
    assert target.relative_error(exact, value, context) == 0
    assert target.relative_error(0 * exact, value, context) == pytest.approx(1.0)


def test_smoothing_adds_a_multiple_of_the_covariance(float64: None) -> None:
    target = TARGETS["ring"]()
    assert isinstance(target, GaussianMixture)
    none = target.contexts(1)
    smooth = target.smoothed(0.5)
    torch.testing.assert_close(smooth.moments(none)[1], 1.25 * target.moments(none)[1])
    torch.testing.assert_close(smooth.moments(none)[0], target.moments(none)[0])
    # The density of the sum, as a mean over the noise of that of the target.
    value, noise = target.sample(3, none), torch.randn(20_000, 1, 2)
    factor = torch.linalg.cholesky(target.moments(none)[1][0])
    for one in value:
        moved = target.log_prob(one - 0.5 * noise @ factor.mT, none).exp()
        error = moved.std() / len(moved) ** 0.5
        assert abs(moved.mean() - smooth.log_prob(one.unsqueeze(0), none).exp()) < 5 * error


def test_generators_make_draws_reproducible() -> None:
    for name, make in TARGETS.items():
        first, second = (
            make().sample(3, torch.zeros(2, make().context_dim), generator=generator)
            for generator in (torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
        )
        assert torch.equal(first, second), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionalMixture(3, 4, 2.0, 1.0, drift=0.1), "even dim .* got dim=3"),
        (lambda: GaussianMixture(2, 0, *torch.rand(3, 2, 2)).smoothed(1.0), "isotropic"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
