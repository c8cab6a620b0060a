# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What ARDAE and SlicedScore share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ardae.score import ARDAE, SlicedScore, whitened
from pyro_ardae.score.student import Student
from pyro_ardae.score.whitened import WhitenedEstimator
from tests.pyro_ardae.oracle import relative_error

Factory = Callable[..., WhitenedEstimator]
FACTORIES: dict[str, Factory] = {
    "residual": ARDAE,
    "energy": partial(ARDAE, parametrization="energy"),
    "sliced": SlicedScore,
}
every_estimator = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)


# ---- centered ----------------------------------------------------------------------------------


@every_estimator
def test_centered_knows_draws_relative_to_their_center(float64: None, make: Factory) -> None:
    """Shifting draws, values and center of each context leaves the score as it is."""
    scores = []
    for shift in (torch.zeros(4, 3), 10 * torch.randn(4, 3)):
        torch.manual_seed(0)
        estimator = make(3, 2, whitening="centered", hidden_dim=8, num_folds=1).double()
        context = torch.randn(4, 2)
        for _ in range(5):
            samples = torch.randn(6, 4, 3).exp() + shift
            estimator.update(samples, context, center=shift)
        scores.append(estimator(samples, samples, context, center=shift))
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)


@every_estimator
def test_centered_wants_a_center_and_no_fold_held_out(make: Factory) -> None:
    estimator = make(3, 2, whitening="centered", num_folds=1)
    assert estimator.needs_center
    with pytest.raises(ValueError, match="expected `center`"):
        estimator.update(torch.randn(6, 4, 3), torch.randn(4, 2))
    assert estimator.updates == 0
    assert not make(3, 2).needs_center
    with pytest.raises(ValueError, match="num_folds >= 2"):
        make(3, 2, num_folds=1)
    make(3, 0, num_folds=1)


def test_too_few_draws_for_held_out_moments_are_refused() -> None:
    estimator = ARDAE(2, 3, num_folds=2)
    with pytest.raises(ValueError, match="at least 2 draws per context besides"):
        estimator.update(torch.randn(3, 5, 2), torch.randn(5, 3))
    assert estimator.updates == 0


def test_one_comparison_that_is_not_finite_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = ARDAE(2, hidden_dim=8)
    with monkeypatch.context() as patch:
        patch.setattr(estimator, "_advantage", lambda *_: torch.tensor(float("nan")))
        for _ in range(4):
            estimator.update(torch.randn(64, 2))
    assert bool(estimator.advantage.isfinite())


# ---- shapes --------------------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("mode", ["pooled", "centered", "full", "diagonal", "none"])
@pytest.mark.parametrize("batch", [(), (3, 1, 2)])
@pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (3, 0), (1, 4), (3, 1)])
@pytest.mark.filterwarnings("ignore:full whitening")
def test_shapes(
    make: Factory, mode: Any, batch: tuple[int, ...], dim: int, context_dim: int
) -> None:
    estimator = make(dim, context_dim, whitening=mode, hidden_dim=8, depth=2)
    samples = torch.randn(12, *batch, dim, requires_grad=True)
    value = torch.randn(7, *batch, dim, requires_grad=True)
    context = torch.randn(*batch, context_dim, requires_grad=True) if context_dim else None
    center = torch.randn(*batch, dim, requires_grad=True)
    for _ in range(3):  # from the third on, moments are regressed
        loss = estimator.update(samples, context, center=center)
    score = estimator(value, samples, context, center=center)
    assert (loss.shape, score.shape) == ((), value.shape)
    assert not loss.requires_grad
    assert not score.requires_grad
    assert bool(torch.isfinite(score).all())
    assert (samples.grad, estimator.weights.grad) == (None, None)


@every_estimator
def test_rows_do_not_influence_each_other(float64: None, make: Factory) -> None:
    """One call with two batch dimensions is every row by itself: the view on them is right."""
    estimator = make(2, 3, hidden_dim=8).double()
    z, c = torch.randn(16, 4, 5, 2), torch.randn(4, 5, 3)
    for _ in range(3):
        estimator.update(z + torch.randn_like(z), c)
    value = torch.randn(6, 4, 5, 2)
    together = estimator(value, z, c)
    for i, j in itertools.product(range(4), range(5)):
        alone = estimator(value[:, i, j], z[:, i, j], c[i, j])
        torch.testing.assert_close(together[:, i, j], alone, rtol=1e-10, atol=1e-10)


@every_estimator
def test_leftover_draws_do_not_disturb(make: Factory) -> None:
    estimator = make(2, hidden_dim=8, num_folds=4)
    estimator.update(torch.randn(4, 6, 2))
    estimator.update(torch.randn(7, 6, 2))
    with pytest.raises(ValueError, match=r"num_folds=4 draws per context, got 3"):
        estimator.update(torch.randn(3, 6, 2))


@every_estimator
@pytest.mark.parametrize(("num_steps", "steps"), [(None, 12), (4, 12), (1, 3)])
def test_number_of_steps(make: Factory, num_steps: int | None, steps: int) -> None:
    estimator = make(2, hidden_dim=8, num_folds=4, num_steps=num_steps)
    for _ in range(3):
        estimator.update(torch.randn(16, 6, 2))
    assert (estimator.steps, estimator.updates) == (steps, 3)
    # The moments are of all draws, whatever the number of steps.
    torch.manual_seed(0)
    z = torch.randn(16, 6, 2)
    one, other = make(2, num_steps=num_steps), make(2)
    one.update(z)
    other.update(z)
    assert torch.equal(one.whitening.pooled_cov, other.whitening.pooled_cov)


@every_estimator
def test_query_does_not_learn(make: Factory) -> None:
    estimator = make(2, 3, hidden_dim=8)
    z, c = torch.randn(16, 5, 2), torch.randn(5, 3)
    for _ in range(3):
        estimator.update(z, c)
    before = copy.deepcopy(estimator.state_dict())
    estimator(z[:2], z, c)
    estimator.eval()
    estimator(z[:2], z, c)
    after = estimator.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if torch.is_tensor(v))
    assert after["_extra_state"]["age"] == before["_extra_state"]["age"]


# ---- known scores --------------------------------------------------------------------------------

MIX = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [-0.5, 0.2, 2.0]])


@pytest.mark.parametrize("mode", ["pooled", "full"])
def test_untrained_estimator_is_the_moment_matched_gaussian(
    mode: Any, chi_square_bound: Callable[[float], float]
) -> None:
    """Before it learns, its error is that of the moments of n draws.

    In whitened units the covariance's error has D (D - 1) / 2 entries of variance 1/n that count
    twice and D of variance 2/n, the mean's D of variance 1/n: E |s' - s|^2 is at most 2/n times a
    chi-square variable with D (D + 1) / 2 + D degrees of freedom, and E |s|^2 = D.
    """
    n, dim = 4 * 4096, 3
    estimator = ARDAE(dim, whitening=mode)
    z = torch.randn(4, 4096, 1, dim) @ MIX.mT + 5.0
    estimator.whitening.pool(z, torch.zeros(1, 0))
    value = torch.randn(20_000, dim) @ MIX.mT + 5.0
    estimate = estimator(value, z[0, :, 0])
    score = -(value - 5.0) @ torch.linalg.inv(MIX @ MIX.mT)
    # |s' - s|^2 in the metric of the covariance, that is in whitened units
    difference, size = ((s @ MIX).square().sum() for s in (estimate - score, score))
    bound = 2 / n * chi_square_bound(dim * (dim + 1) / 2 + dim) / dim
    # 1.1: the mean over 20,000 values of |s|^2, and terms of order 1/n^1.5
    assert float(difference / size) < 1.1 * bound


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_smoothed_score_of_a_gaussian(float64: None, sigma: float) -> None:
    """Untrained, with noise of sigma^2 times the covariance: that of N(m, (1 + sigma^2) C)."""
    estimator = ARDAE(2, delta=0.5).double()
    z = torch.tensor([3.0, 0.1]) * torch.randn(4, 4096, 1, 2) + 1.0
    estimator.whitening.pool(z, torch.zeros(1, 0))
    flat = z.flatten(0, 2)
    value = torch.randn(100, 2)
    cov = (1 + sigma**2) * torch.cov(flat.mT, correction=0)
    expected = -(value - flat.mean(0)) @ torch.linalg.inv(cov)
    # The correlation is shrunk by (D / (D + draws))^2.
    smoothed = estimator.smoothed(value, flat, sigma=sigma)
    torch.testing.assert_close(smoothed, expected, rtol=1e-6, atol=1e-6)
    if sigma == 0:
        assert torch.equal(smoothed, estimator(value, flat))


def gaussian(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Context, mean and Cholesky factor of conditional Gaussians whose scales vary e-fold."""
    c = torch.randn(rows, 2)
    scale = torch.stack([c[:, 0].mul(0.5).exp(), c[:, 1].mul(0.5).exp(), torch.ones(rows)], -1)
    return c, torch.cat([c, c.sum(-1, keepdim=True)], -1), scale.unsqueeze(-1) * MIX


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("residual", "pooled"),
        ("residual", "diagonal"),
        ("energy", "pooled"),
        ("sliced", "pooled"),
    ],
)
def test_learns_the_score_of_conditional_gaussians(kind: str, mode: Any) -> None:
    """From 16 draws a context, the moments alone leave an error; learning takes most of it away."""
    estimator = FACTORIES[kind](3, 2, whitening=mode, hidden_dim=16, depth=2)

    def draw(count: int, mean: Tensor, L: Tensor) -> Tensor:
        return mean + torch.einsum("bij,sbj->sbi", L, torch.randn(count, len(mean), 3))

    def error() -> float:
        c, mean, L = gaussian(500)
        value = draw(8, mean, L)
        score = -torch.einsum("bij,sbj->sbi", torch.cholesky_inverse(L), value - mean)
        estimate = estimator(value, draw(16, mean, L), c)
        return relative_error(*(torch.einsum("sbi,bij->sbj", s, L) for s in (estimate, score)))

    errors = []
    for updates in (1, 40):
        for _ in range(updates):
            c, mean, L = gaussian(64)
            estimator.update(draw(16, mean, L), c)
        errors.append(error())
    assert errors[1] < errors[0] / 3, errors


@pytest.mark.parametrize(
    ("kind", "dim", "updates"),
    [("residual", 1, 300), ("residual", 2, 150), ("energy", 2, 150), ("sliced", 2, 80)],
)
def test_learns_the_score_of_a_mixture(kind: str, dim: int, updates: int) -> None:
    """Two components at +-2: the Gaussian score is far off, what is learned is not."""
    estimator = FACTORIES[kind](dim, hidden_dim=32, depth=2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dim) + 2 * (2 * torch.randint(2, (*shape, 1)) - 1)

    for _ in range(updates):
        estimator.update(draw(512))
    value = draw(4000)
    # log q = log cosh(2 sum z) - |z|^2 / 2 + const
    score = 2 * torch.tanh(2 * value.sum(-1, keepdim=True)) - value
    error = relative_error(estimator(value, draw(512)), score)
    gaussian_error = relative_error(-value @ torch.linalg.inv(torch.eye(dim) + 4), score)
    assert gaussian_error > 0.3
    assert error < gaussian_error / 5, (error, gaussian_error)


# ---- the age -------------------------------------------------------------------------------------


@every_estimator
def test_advantage_is_the_difference_of_the_losses(float64: None, make: Factory) -> None:
    """On the same noise."""
    estimator = make(3, 4, hidden_dim=6, depth=2).double()
    estimator.averages += 0.3 * torch.randn_like(estimator.averages)
    w, features, base = torch.randn(7, 5, 3), torch.randn(5, 10), Student(9.0, 1.3)
    state, losses = torch.get_rng_state(), []
    for average in estimator.averages:
        torch.set_rng_state(state)
        estimator.weights.copy_(average)
        losses.append(estimator._loss(w, features, base)[0])
    torch.set_rng_state(state)
    advantage = estimator._advantage(w, features, base)
    assert not advantage.requires_grad
    torch.testing.assert_close(advantage, losses[0] - losses[1], rtol=1e-8, atol=0)


def test_age_grows_with_the_steps_and_shrinks_by_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the number of steps as long as the longer average wins, within the bounds."""
    estimator = ARDAE(1, hidden_dim=4, depth=1, min_age=10, max_age=60)
    result = -1.0
    monkeypatch.setattr(estimator, "_advantage", lambda *_: torch.tensor(result))

    def update(count: int) -> list[float]:
        ages = []
        for _ in range(count):
            estimator.update(torch.randn(8, 1))
            ages.append(float(estimator.age))
        return ages

    every, shrink = whitened._CHECK_EVERY, whitened._SHRINK
    assert update(5 * every) == [min(4 * k, 60) for k in range(1, 5 * every + 1)]
    assert torch.equal(estimator.averaged, estimator.averages[0])
    result = 1e6  # outweighs the running mean at once
    for compared in (1, 2):  # in between it stands still
        *before, after = update(every)
        assert before == pytest.approx([60 * shrink ** (every * (compared - 1))] * (every - 1))
        assert after == pytest.approx(60 * shrink ** (every * compared))
        assert torch.equal(estimator.averaged, estimator.averages[1])
    assert update(200)[-1] == 10


def test_young_average_is_of_the_steps_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """At age n the longer average has a horizon of n / 4: the first weights are soon forgotten."""
    estimator = ARDAE(1, hidden_dim=4, depth=1, learning_rate=1e-30, weight_decay=0.0)
    monkeypatch.setattr(estimator, "_advantage", lambda *_: torch.tensor(-1.0))
    estimator.averages += 1.0
    start = (estimator.averages - estimator.weights).clone()
    left = torch.ones(2)
    for update in range(1, 51):
        estimator.update(torch.randn(8, 1))
        left *= (1 - 1 / (1 + torch.tensor([0.25, 0.0625]) * 4 * update)) ** 4
        torch.testing.assert_close(
            estimator.averages - estimator.weights,
            start * left.unsqueeze(1),
            rtol=1e-3,
            atol=1e-6,
        )
    # Of the first n steps, those before the update u are left a weight (u / n)^4.
    assert float(left[0]) < 1e-6


def follow(
    means: list[float], *, dim: int, draws: int, **options: Any
) -> tuple[ARDAE, list[float]]:
    """Learn N(mean, I) as it is, one update for each mean; the estimator, and its ages."""
    # Whitening would follow the mean, and leave nothing to learn.
    estimator = ARDAE(dim, whitening="none", learning_rate=0.03, **options)
    ages = []
    for mean in means:
        estimator.update(mean + torch.randn(draws, dim))
        ages.append(float(estimator.age))
    return estimator, ages


def test_age_tells_a_fixed_target_from_one_that_keeps_jumping() -> None:
    """Of a fixed one it reached 200 within 77 updates in 20 seeds, of the other 82 at most."""
    settings: dict[str, Any] = {"dim": 8, "draws": 256, "hidden_dim": 32, "depth": 1}
    bounds: dict[str, Any] = {"min_age": 50, "max_age": 200}
    _, ages = follow([0.5] * 90, **settings, **bounds)
    assert max(ages) == 200
    jumping = [0.5 * (-1) ** (update // 10) for update in range(90)]
    _, ages = follow(jumping, **settings, **bounds)
    assert max(ages) < 150


def test_shorter_average_answers_after_a_jump() -> None:
    """Ten updates after it, the longer average is still elsewhere.

    In 20 seeds, the shorter one had a quarter of its error, or less.
    """
    estimator, ages = follow([1.0] * 120 + [-1.0] * 10, dim=1, draws=1024, hidden_dim=8, depth=1)
    value = torch.randn(4000, 1) - 1

    def error() -> float:
        return relative_error(estimator(value, value), -(value + 1))

    answered, wins = error(), estimator.slow_wins
    estimator.slow_wins = True
    longer = error()
    assert not wins
    assert ages[-1] <= ages[119]
    assert answered < longer / 2, (answered, longer)


# ---- step sizes, gradients, features -----------------------------------------------------------


@every_estimator
def test_step_size_falls_with_the_root_of_the_age(
    make: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = make(1, hidden_dim=4, depth=1, learning_rate=0.01, warm_up=8, num_folds=4)
    monkeypatch.setattr(estimator, "_advantage", lambda *_: torch.tensor(-1.0))
    # Warm up half of the way, and all of it, at ages that are those after the update.
    for age, factor in ((100, 0.5 / 1.1**0.5), (1000, 1 / 2**0.5), (3000, 0.5), (8000, 1 / 3)):
        estimator.age = age - 4.0
        estimator.update(torch.randn(8, 1))
        assert estimator.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * factor)


def test_a_gradient_is_bounded_by_a_multiple_of_the_running_mean(float64: None) -> None:
    estimator = ARDAE(1, hidden_dim=4, depth=1, clip=4.0).double()
    direction = torch.zeros_like(estimator.weights)
    direction[:2] = torch.tensor([0.6, -0.8])
    mean = 5.0  # that of the first, then it follows what is left of the others
    for norm, bounded in ((5.0, 5.0), (100.0, 4 * 5.0), (2.0, 2.0), (100.0, 4 * 5.234)):
        torch.testing.assert_close(estimator._clipped(norm * direction), bounded * direction)
        mean += 0.02 * (bounded - mean)
        assert float(estimator.gradient_norm) == pytest.approx(mean)
        estimator.steps += 1
    assert not bool(estimator._clipped(float("nan") * direction).any())
    assert bool(estimator.gradient_norm.isfinite())


@every_estimator
def test_a_context_far_away_is_taken_for_one_5_deviations_away(
    float64: None, make: Factory
) -> None:
    estimator = make(2, 3, whitening="none", hidden_dim=8, depth=2).double()
    for _ in range(5):
        estimator.update(torch.randn(8, 64, 2), torch.randn(64, 3))
    std = (estimator.feature_square - estimator.feature_mean.square()).sqrt()
    std = std + 1e-3 * estimator.feature_mean.abs() + 1e-8
    z = torch.randn(6, 1, 2)
    near, border, far, farther = (
        estimator(z, z, (estimator.feature_mean + deviations * std).unsqueeze(0))
        for deviations in (4.0, 5.0, 6.0, 1e6)
    )
    assert not torch.equal(near, border)
    for score in (far, farther):
        torch.testing.assert_close(score, border, rtol=1e-10, atol=1e-10)


# ---- state and errors ----------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("context_dim", [0, 3])
def test_resumes_bit_for_bit(make: Factory, context_dim: int) -> None:
    """After an odd number of updates, and with the shorter average in use."""
    first = make(2, context_dim, hidden_dim=8)
    draws = [(torch.randn(12, 5, 2), torch.randn(5, 3) if context_dim else None) for _ in range(8)]
    for z, c in draws[:3]:
        first.update(z, c)
    first.age, first.slow_wins = 1234.5, False
    second = make(2, context_dim, hidden_dim=8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    scores = []
    for estimator in (first, second):
        torch.manual_seed(1)
        scores.append(estimator(z, z, c))
        for z_, c_ in draws[3:]:
            estimator.update(z_, c_)
        scores.append(estimator(z, z, c))
    assert (first.age, first.slow_wins) == (second.age, second.slow_wins)
    assert torch.equal(scores[0], scores[2])
    assert torch.equal(scores[1], scores[3])


Z = torch.zeros(8, 5, 2)
ERRORS: dict[str, tuple[Callable[[Factory], Any], str]] = {
    "hidden_dim": (lambda make: make(2, hidden_dim=0), "hidden_dim >= 1, got 0"),
    "depth": (lambda make: make(2, depth=0), "depth >= 1, got 0"),
    "num_folds": (lambda make: make(2, 1, num_folds=1), "num_folds >= 2, got 1"),
    "no steps": (lambda make: make(2, num_steps=0), r"num_steps in \[1, 8\], got 0"),
    "more steps than folds": (
        lambda make: make(2, num_folds=4, num_steps=5),
        r"num_steps in \[1, 4\], got 5",
    ),
    "learning_rate": (lambda make: make(2, learning_rate=0.0), "learning_rate > 0, got 0"),
    "clip": (lambda make: make(2, clip=0.5), "clip >= 1, got 0.5"),
    "weight_decay": (lambda make: make(2, weight_decay=-1.0), "weight_decay >= 0, got -1"),
    "min_age": (lambda make: make(2, min_age=0), r"min_age in \[1, max_age=8000\], got 0"),
    "max_age": (lambda make: make(2, max_age=50), r"min_age in \[1, max_age=50\], got 100"),
    "too few draws": (
        lambda make: make(2, num_folds=4).update(Z[:3]),
        "num_folds=4 draws per context, got 3. Raise num_score_samples",
    ),
    "samples of another dim": (lambda make: make(3).update(Z), r"\[S, \*batch, 3\]"),
    "value of another batch shape": (
        lambda make: make(2)(Z[:, :4], Z),
        r"\(5, 2\), got \(8, 4",
    ),
}


@pytest.mark.parametrize(
    ("draws", "contexts", "steps"), [(3, 2, 3), (16, 1, 4), (16, 128, 4), (64, 64, 8), (64, 512, 8)]
)
def test_number_of_folds_follows_the_draws(draws: int, contexts: int, steps: int) -> None:
    estimator = ARDAE(2, 1, hidden_dim=4, depth=1)
    estimator.update(torch.randn(draws, contexts, 2), torch.randn(contexts, 1))
    assert estimator.steps == steps


@pytest.mark.parametrize("make", [ARDAE, SlicedScore])
@pytest.mark.parametrize("row", ERRORS)
def test_error(make: type[WhitenedEstimator], row: str) -> None:
    call, words = ERRORS[row]
    with pytest.raises(ValueError, match=f"(?s){make.__name__}: expected .*{words}"):
        call(make)


def test_a_gradient_that_is_not_finite_has_no_part_in_the_running_mean() -> None:
    estimator = ARDAE(2, hidden_dim=8, depth=1)
    bad = torch.full((3,), torch.nan)
    assert torch.equal(estimator._clipped(bad), torch.zeros(3))
    assert float(estimator.gradient_norm) == 0
    assert torch.equal(
        estimator._clipped(torch.tensor([0.0, 3e-6, 4e-6])).norm(), torch.tensor(5e-6)
    )
    before = float(estimator.gradient_norm)
    assert before == pytest.approx(5e-6)
    assert torch.equal(estimator._clipped(bad), torch.zeros(3))
    assert float(estimator.gradient_norm) == pytest.approx(before)
