# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ardae.score.moments import Moments

B, C, D = 200, 3, 2


def halves(mean: Tensor, log_scale: Tensor, count: int) -> Tensor:
    """Gaussian draws ``[2, count, B, D]``."""
    return mean + log_scale.exp() * torch.randn(2, count, *mean.shape)


def exact_halves(mean: Tensor, log_scale: Tensor) -> Tensor:
    """Two draws a half whose mean and standard deviation are those given."""
    signs = torch.tensor([1.0, -1.0]).reshape(2, 1, 1) * 0.5**0.5
    return (mean + log_scale.exp() * signs).expand(2, -1, -1, -1)


def predict(moments: Moments, context: Tensor) -> Tensor:
    """Predicted means and log scales, ``[B, 2 D]``."""
    return moments._features(context) @ moments.solution


def gains(moments: Moments, draws: int, context: Tensor) -> Tensor:
    """By how much the combined moments follow those of the draws, ``[2 D]``."""
    zero = torch.zeros(len(context), moments.dim)
    low, high = (moments.combine(x, x.exp(), draws, context)[:2] for x in (zero, zero + 1))
    followed = torch.cat([high[0] - low[0], high[1].log() - low[1].log()], -1)
    assert float((followed - followed[0]).abs().max()) < 1e-5  # one for all contexts
    return followed[0]


# ---- the regression ------------------------------------------------------------------------------


def test_recovers_a_linear_map(float64: None) -> None:
    """Exactly, but for the ridge of 1e-5 of the mean diagonal."""
    moments = Moments(D, C, num_features=0)
    A, b = 0.3 * torch.randn(C, 2 * D), torch.randn(2 * D)
    for _ in range(3):
        context = 5 + 2 * torch.randn(B, C)
        moments.fit(exact_halves(*(context @ A + b).chunk(2, -1)), context)
    ridge = 1e-5 * moments.gram.diagonal().mean()
    bound = ridge / torch.linalg.eigvalsh(moments.gram)[0] * moments.solution.norm()
    context = 5 + 2 * torch.randn(B, C)
    error = predict(moments, context) - (context @ A + b)
    sizes = moments._features(context).norm(dim=-1, keepdim=True)
    assert bool((error.norm(dim=-1, keepdim=True) <= bound * sizes).all())
    assert float(bound) < 1e-3


def smooth(context: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.stack([torch.sin(2 * context[:, 0]), context[:, 1].square()], -1)
    return 3 + mean, torch.stack([context[:, 0].cos(), 0.5 * context[:, 1]], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_a_smooth_map(dtype: torch.dtype) -> None:
    """From 8 draws a half, better than from 100 draws of the very context."""
    moments = Moments(D, 2).to("cpu", dtype)
    for _ in range(60):
        context = 4 * torch.rand(B, 2, dtype=dtype) - 2
        moments.fit(halves(*smooth(context), 8).to(dtype), context)
    context = 4 * torch.rand(2000, 2, dtype=dtype) - 2
    mean, log_scale = smooth(context)
    predicted, predicted_log = predict(moments, context).chunk(2, -1)
    assert predicted.dtype == dtype
    in_scales = ((predicted - mean) / log_scale.exp()).square().mean(0)
    assert float(in_scales.max()) < 1 / 100
    # E log s of 8 draws, where s^2 is chi-square with 7 degrees of freedom over 7
    bias = 0.5 * (torch.digamma(torch.tensor(3.5)) - math.log(3.5))
    assert float((predicted_log - log_scale - bias).square().mean(0).max()) < 1 / 200


def test_follows_contexts_of_another_unit(float64: None) -> None:
    """Random features are of standardized contexts."""
    moments = Moments(1, 2)
    shift, unit = torch.tensor([1e3, -5.0]), torch.tensor([1e-3, 40.0])
    for _ in range(40):
        context = 4 * torch.rand(B, 2) - 2
        mean = torch.sin(2 * context[:, :1])
        moments.fit(halves(mean, torch.zeros(B, 1) - 3, 8), shift + unit * context)
    context = 4 * torch.rand(1000, 2) - 2
    error = predict(moments, shift + unit * context)[:, :1] - torch.sin(2 * context[:, :1])
    assert float(error.square().mean()) < 0.05**2


@pytest.mark.parametrize("first", ["constant", "narrow", "elsewhere"])
def test_a_context_that_moves_begins_the_regression_anew(first: str, float64: None) -> None:
    """As with an encoder that starts at zero: what the first update saw is no unit for ever."""
    moments = Moments(1, 2)
    for update in range(600 if first == "elsewhere" else 60):
        context = 4 * torch.rand(B, 2) - 2
        if update < 3:
            context = {"constant": 0 * context, "narrow": 0.01 * context}.get(first, 50 + context)
        mean = torch.sin(2 * context[:, :1])
        moments.fit(halves(mean, torch.zeros(B, 1) - 3, 8), context)
    context = 4 * torch.rand(1000, 2) - 2
    error = predict(moments, context)[:, :1] - torch.sin(2 * context[:, :1])
    assert float(error.square().mean()) < 0.05**2
    assert int(moments.seen) > int(moments.fits) > 5


def test_contexts_that_rest_are_standardized_once(float64: None) -> None:
    moments = Moments(1, 2)
    for _ in range(200):
        context = torch.randn(64, 2)
        moments.fit(halves(context[:, :1], torch.zeros(64, 1), 8), context)
    assert int(moments.fits) == 200


def test_units_of_contexts_that_are_constant_in_each_update(float64: None) -> None:
    """Such as globals that all rows share: they vary from update to update."""
    moments = Moments(1, 1)
    shared = 3 + 2 * torch.randn(400)
    for value in shared:
        moments.fit(torch.randn(2, 4, B, 1), value.expand(B, 1))
    # an average of some 100 normal squares: 4.4 deviations of 10 %, halved by the root
    assert abs(float(moments.context_variance) / 4 - 1) < 0.44
    assert 1 < float(moments.unit) < 4


def test_forgets_at_the_stated_rate(float64: None) -> None:
    """A map A for a updates, then a map B for b, on the same contexts: a mean with known weights.

    The weights fall by 1 - rows / (memory * features) with each update.
    """
    moments, context = Moments(D, C, num_features=0, memory=500.0), torch.randn(B, C)
    f, a, b = 1 - B / (500 * (1 + C)), 5, 7
    maps = torch.randn(2, C, 2 * D)
    for update in range(a + b):
        moments.fit(exact_halves(*(context @ maps[int(update >= a)]).chunk(2, -1)), context)
    weight = f**b * (1 - f**a) / (1 - f ** (a + b))
    expected = context @ (weight * maps[0] + (1 - weight) * maps[1])
    # The ridge, relative to the smallest eigenvalue of the Gram matrix.
    torch.testing.assert_close(predict(moments, context), expected, rtol=0, atol=1e-3)
    assert float((maps[0] - maps[1]).abs().max()) > 0.5


def test_forgets_all_if_an_update_has_more_contexts_than_it_remembers(float64: None) -> None:
    moments = Moments(D, C, num_features=0, memory=1.0)
    context = torch.randn(B, C)
    maps = torch.randn(2, C, 2 * D)
    for one in maps:
        moments.fit(exact_halves(*(context @ one).chunk(2, -1)), context)
    torch.testing.assert_close(predict(moments, context), context @ maps[1], rtol=0, atol=1e-3)


# ---- the combination -----------------------------------------------------------------------------


def test_first_updates_use_the_moments_of_the_draws() -> None:
    """Whose prediction has not been compared to any draws that it was not learned from."""
    moments, context = Moments(D, C), torch.randn(B, C)
    mean, scale = torch.randn(B, D), torch.rand(B, D)
    for fits in range(3):
        combined = moments.combine(mean, scale, 16, context)
        unchanged = torch.equal(combined[0], mean) and torch.equal(combined[1], scale)
        assert unchanged == (fits < 2)
        assert (combined[2] == 16) == (fits < 2)
        moments.fit(halves(context[:, :D], torch.zeros(B, D), 8), context)


def test_gain_vanishes_where_the_prediction_is_exact() -> None:
    moments, A = Moments(D, C, num_features=0, memory=1e4), 0.2 * torch.randn(C, 2 * D)
    for _ in range(150):
        context = torch.randn(B, C)
        moments.fit(halves(*(context @ A).chunk(2, -1), 8), context)
    assert float(gains(moments, 16, context).max()) < 0.15
    mean, _, draws = moments.combine(torch.randn(B, D), torch.ones(B, D), 16, context)
    assert mean.shape == (B, D)
    assert 16 / 0.15 < draws <= 16 / 0.05


def test_gain_is_one_where_the_target_jumps() -> None:
    """By several of its scales, and by factors of its scale: at every update another map."""
    moments = Moments(D, C, num_features=0)
    for _ in range(60):
        context = torch.randn(B, C)
        mean, log_scale = (context @ torch.randn(C, 2 * D)).chunk(2, -1)
        moments.fit(halves(3 * mean, log_scale, 8), context)
    followed = gains(moments, 16, context)
    assert float(followed.min()) > 0.97
    assert 16 <= moments.combine(mean, log_scale.exp(), 16, context)[2] < 16 / 0.97


def test_combination_has_the_least_error(standard_errors: Callable[[int], float]) -> None:
    """Means off the map by N(0, t^2), unlike for every context, and draws that give them up to
    1 / n: with t^2 = 1 / n the gain is 1/2, and the error 1 / (2 n), half of either.
    """
    n, rows = 16, 1000
    moments, A = Moments(D, C, num_features=0, memory=1e4), torch.randn(C, D)
    zero = torch.zeros(rows, D)
    combined, predicted, sampled = [], [], []
    for update in range(160):
        context = torch.randn(rows, C)
        mean = context @ A + torch.randn(rows, D) / n**0.5
        z = halves(mean, zero, n // 2)
        estimate = torch.randn(rows, D) / n**0.5 + mean
        if update >= 60:
            assert gains(moments, n, context)[:D].tolist() == pytest.approx([0.5] * D, abs=0.1)
            answer, _, draws = moments.combine(estimate, zero + 1, n, context)
            assert draws == pytest.approx(2 * n, rel=0.2)
            combined.append((answer - mean).square())
            predicted.append((predict(moments, context)[:, :D] - mean).square())
            sampled.append((estimate - mean).square())
        moments.fit(z, context)
    expected = {0.5: combined, 1.0: predicted, 1.00001: sampled}
    for value, errors in expected.items():
        square = n * torch.stack(errors).flatten()
        error = float(square.std()) / len(square) ** 0.5
        # Those of one context share a prediction: 3/30000 of its square error, and a gain that is
        # off by 0.1 raises the least error by 2 %.
        assert float(square.mean()) == pytest.approx(value, abs=standard_errors(3) * error + 0.02)


def test_variance_is_that_of_gaussian_moments(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    r"""Of means 1 / n in units of the scale, of log scales :math:`\psi'((n - 1) / 2) / 4`.

    The scale is that of n draws: by :math:`E[1 / s]^2` for two independent halves it is larger.
    """
    rows, n = 100_000, 8
    moments = Moments(1, 1, num_features=0, memory=1e6)
    zero = torch.zeros(rows, 1)
    moments.fit(halves(zero, zero, n), torch.randn(rows, 1))
    state = torch.get_rng_state()
    moments.fit(halves(zero, zero + 2.0, n), zero)
    torch.set_rng_state(state)
    z = halves(zero, zero, n)
    mean, log_scale = z.mean(1), z.std(1).log()
    terms = torch.stack(
        [(mean[0] - mean[1]) / log_scale.mean(0).exp(), log_scale[0] - log_scale[1]]
    )
    error = (0.5 * terms.square()).std((1, 2)) / rows**0.5
    inverse = 3.5**0.5 * math.exp(math.lgamma(3) - math.lgamma(3.5))  # E[1 / s]
    log_variance = float(torch.polygamma(1, torch.tensor(3.5))) / 4
    expected = torch.tensor([inverse**2 / n, log_variance])
    assert bool(((moments.variance / n - expected).abs() < standard_errors(2) * error).all())


def test_square_error_is_without_the_variance(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    """A prediction that is off by 0.3 scales, and draws whose own error is larger."""
    rows, n = 100_000, 8
    moments = Moments(1, 1, num_features=0, memory=1e6)
    zero = torch.zeros(rows, 1)
    context = torch.randn(rows, 1)
    moments.fit(exact_halves(zero, zero), context)
    z = halves(zero + 0.3, zero, n)
    moments.fit(z, context)
    scale = z.std(1).log().mean(0).exp()
    terms = (z.mean(1) / scale).prod(0)
    error = float(terms.std()) / rows**0.5
    inverse = 3.5**0.5 * math.exp(math.lgamma(3) - math.lgamma(3.5))
    expected = 0.3**2 * inverse**2
    assert abs(float(moments.square_error[0]) - expected) < standard_errors(1) * error


# ---- state, dtype, corner cases ------------------------------------------------------------------


def trained(dtype: torch.dtype = torch.float32, width: int = C) -> tuple[Moments, Tensor]:
    moments = Moments(D, width).to("cpu", dtype)
    for _ in range(4):
        context = torch.randn(20, width, dtype=dtype)
        moments.fit(torch.randn(2, 4, 20, D, dtype=dtype) + context[:, :1], context)
    return moments, context


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trip(dtype: torch.dtype) -> None:
    """Bit for bit, with random features of its own before it takes the others."""
    first, context = trained(dtype)
    second = Moments(D, C).to(dtype)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    z = torch.randn(2, 4, 20, D, dtype=dtype)
    answers = []
    for moments in (first, second):
        moments.fit(z, context)
        answers.append(moments.combine(z[0, 0], z[0, 1].abs(), 8, context))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert answers[0][2] == answers[1][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_equations_stay_double(dtype: torch.dtype) -> None:
    """All else takes the dtype; smooth features of one number are all but collinear."""
    moments, _ = trained()
    gram, cross = moments.gram.clone(), moments.cross.clone()
    moments.to(dtype)
    assert torch.equal(moments.gram, gram)  # not rounded on the way
    assert torch.equal(moments.cross, cross)
    assert {moments.solution.dtype, moments.variance.dtype, moments.weight.dtype} == {dtype}
    narrow, context = trained(dtype, width=1)
    for _ in range(40):
        narrow.fit(torch.randn(2, 4, 20, D, dtype=dtype), context)
    assert bool(torch.isfinite(narrow.solution).all())


def test_single_draws_teach_nothing() -> None:
    """A half of one draw has no scale."""
    moments = Moments(D, C)
    moments.fit(torch.randn(2, 1, 5, D), torch.randn(5, C))
    assert int(moments.fits) == 0


@pytest.mark.parametrize("rows", [1, 20])
def test_constant_contexts_and_draws_stay_finite(rows: int) -> None:
    """And so does an answer for another context."""
    moments, context = Moments(D, C), torch.ones(rows, C)
    for update in range(4):
        moments.fit(torch.full((2, 4, rows, D), 1e3 if update < 2 else -1.0), context)
    mean, scale, draws = moments.combine(
        torch.zeros(rows, D), torch.full((rows, D), 1e-10), 8, context + torch.randn(rows, C)
    )
    assert all(bool(torch.isfinite(x).all()) for x in (mean, scale, torch.tensor(draws)))
    assert bool((scale > 0).all())


def test_collapsed_context_does_not_spoil_the_others_for_good() -> None:
    """The square of its residual, in units of its scale, is beyond single precision."""
    moments = Moments(1, 1, num_features=0)
    for update in range(400):
        context = torch.randn(B, 1)
        z = halves(context, torch.zeros(B, 1), 8)
        if update == 2:
            z[:, :, 0] = 1e15
        moments.fit(z, context)
        assert bool(torch.isfinite(moments.square_error).all())
    assert float(gains(moments, 16, context)[0]) < 0.5
