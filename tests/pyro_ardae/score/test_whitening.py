# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ardae.score.whitening import Frame, Whitening

F, N, B, D, C = 4, 8, 5, 3, 2
MODES = ["pooled", "centered", "full", "diagonal", "none"]


def draws(*shape: int) -> Tensor:
    """Correlated, off-centre, of different scales, and far from Gaussian."""
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.1, -0.3, 0.05]])
    return torch.randn(*shape, D).exp() @ mix.mT + torch.tensor([1.0, -2.0, 30.0])


def contexts(conditional: bool = True, rows: int = B) -> Tensor:
    return torch.randn(rows, C if conditional else 0)


def build(conditional: bool, mode: Any) -> Whitening:
    return Whitening(D, C if conditional else 0, mode=mode)


def frames(mode: Any, conditional: bool) -> tuple[Frame, Frame]:
    """A held-out and a query frame of one whitening, after three updates."""
    whitening = build(conditional, mode)
    for _ in range(3):
        folds, context = draws(F, N, B), contexts(conditional)
        held_out = whitening.held_out(folds, context)
        whitening.pool(folds, context)
    return held_out, whitening.frame(draws(F * N, B), context)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditional", [True, False])
def test_frame_is_what_autograd_says(float64: None, mode: Any, conditional: bool) -> None:
    """pull_back and log_abs_det against the Jacobian of whiten."""
    for frame, z in zip(frames(mode, conditional), (draws(F, N, B), draws(N, B)), strict=True):
        z = z.requires_grad_()
        w = frame.whiten(z)
        assert w.shape == z.shape
        cotangent = torch.randn_like(w)
        (expected,) = torch.autograd.grad(w, z, cotangent)
        torch.testing.assert_close(frame.pull_back(cotangent), expected, rtol=1e-12, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda z: frame.whiten(z), z.detach()[:1])
    per_row = torch.stack([jacobian[0, b, :, 0, b] for b in range(B)])
    volume = frame.log_abs_det().expand(B)
    torch.testing.assert_close(volume, torch.linalg.slogdet(per_row)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditional", [True, False])
def test_shapes(mode: Any, conditional: bool) -> None:
    held_out, query = frames(mode, conditional)
    assert held_out.whiten(draws(F, N, B)).shape == (F, N, B, D)
    assert query.whiten(draws(7, B)).shape == (7, B, D)
    assert query.log_abs_det().expand(B).shape == (B,)
    if conditional:
        assert held_out.features().shape == (F, B, 2 * D)
        assert query.features().shape == (B, 2 * D)


@pytest.mark.parametrize("mode", ["pooled", "full", "diagonal"])
@pytest.mark.parametrize("conditional", [True, False])
def test_equivariant_under_axis_scales_and_shifts(
    float64: None, mode: Any, conditional: bool
) -> None:
    """z = a y + b has the same w, and so any score field pulled back is that of y over a."""
    a, b = torch.tensor([1e-3, -2.0, 50.0]), torch.tensor([10.0, 0.0, -3.0])
    y, at = draws(F, N, B), draws(6, B)
    signs, context = a.sign(), contexts(conditional)
    results = []
    for folds, value in ((y, at), (a * y + b, a * at + b)):
        whitening = build(conditional, mode)
        whitening.pool(folds, context)
        frame = whitening.frame(folds.flatten(0, 1), context)
        results.append((frame.whiten(value), frame.pull_back(-frame.whiten(value))))
    (w_y, score_y), (w_z, score_z) = results
    # Rounding is relative to the largest entry: skewed draws are correlated up to 1 - 1e-4 or so.
    # A negative scale mirrors w (up to the rotation that goes with it), and never its length.
    lengths = w_y.norm(dim=-1), w_z.norm(dim=-1)
    assert float((lengths[0] - lengths[1]).abs().max() / lengths[0].max()) < 1e-9
    assert float((a * score_z - score_y).abs().max() / score_y.abs().max()) < 1e-9
    if mode == "diagonal":
        assert float((w_z - signs * w_y).abs().max() / w_y.abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("mode", "conditional"), [("full", True), ("full", False), ("pooled", False)]
)
def test_equivariant_under_affine_maps(float64: None, mode: Any, conditional: bool) -> None:
    """z = A y + b: the Gaussian score of z is A^-T times that of y.

    Exact but for what keeps the factors of full rank: 1e-5 on the diagonal of the correlation, or
    its shrinkage by (D / (D + draws))^2; relative to the smallest eigenvalue of the correlation.
    """
    A = torch.tensor([[1.0, 0.4, 0.0], [0.2, 0.7, -0.5], [0.0, 0.3, 2.0]])
    b = torch.tensor([1.0, -4.0, 0.0])
    y, at, context = torch.randn(F, 64, B, D), torch.randn(6, B, D), contexts(conditional)
    scores, smallest = [], []
    for folds, value in ((y, at), (y @ A.mT + b, at @ A.mT + b)):
        whitening = build(conditional, mode)
        whitening.pool(folds, context)
        frame = whitening.frame(folds.flatten(0, 1), context)
        scores.append(frame.pull_back(-frame.whiten(value)))
        columns = folds.flatten(0, 1).movedim(1, 0) if conditional else folds.reshape(1, -1, D)
        smallest += [torch.linalg.eigvalsh(torch.corrcoef(rows.mT))[0] for rows in columns]
    expected = scores[0] @ torch.linalg.inv(A)
    jitter = 1e-5 if conditional else (D / (D + y[..., 0].numel())) ** 2
    bound = 2 * jitter / float(torch.stack(smallest).min())
    assert float((scores[1] - expected).norm() / expected.norm()) < bound


def test_full_frame_whitens(float64: None) -> None:
    """The sample covariance of the whitened draws is I, up to the 1e-5 on the diagonal."""
    z = draws(400, B)
    w = build(True, "full").frame(z, contexts()).whiten(z)
    for b in range(B):
        corr = torch.corrcoef(z[:, b].mT)
        bound = 1e-5 / float(torch.linalg.eigvalsh(corr)[0])
        assert float((torch.cov(w[:, b].mT) - torch.eye(D)).abs().max()) < bound
    torch.testing.assert_close(w.mean(0), torch.zeros(B, D), atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["pooled", "full"])
def test_unconditional_frame_whitens_thin_directions(float64: None, mode: Any) -> None:
    """Condition number 1e4: pooled in full, since all rows are draws of one q."""
    z = torch.randn(F, 512, B, 1) + 1e-2 * torch.randn(F, 512, B, 2)
    whitening, none = Whitening(2, 0, mode=mode), contexts(False)
    whitening.pool(z, none)
    w = whitening.frame(z.flatten(0, 1), none).whiten(z).reshape(-1, 2)
    assert float((torch.cov(w.mT) - torch.eye(2)).abs().max()) < 0.01


def test_pooled_correlation_stays_within_its_borders(float64: None) -> None:
    """Eigenvalues inside [low, high] are left alone, the others are brought to the border."""
    z = torch.randn(F, 512, B, 1) + 0.1 * torch.randn(F, 512, B, 4)
    whitening = Whitening(4, C, mode="pooled", low=0.2, high=3.0)
    whitening.pool(z, contexts())
    corr = whitening.unmix @ whitening.pooled_corr @ whitening.unmix.mT
    values = torch.linalg.eigvalsh(corr)
    assert float(values[0]) > 0.19
    assert float(values[-1]) < 3.01
    near = Whitening(4, C, mode="pooled")
    near.pool(torch.randn(F, 512, B, 4), contexts())
    torch.testing.assert_close(near.unmix, torch.eye(4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("mode", ["pooled", "full", "diagonal"])
def test_held_out_frame_does_not_see_its_own_fold(float64: None, mode: Any, updates: int) -> None:
    """Neither by the moments, nor by what is pooled and regressed from earlier updates."""
    whitening = build(True, mode)
    for _ in range(updates):
        whitening.pool(draws(F, N, B), contexts())
    folds, context = draws(F, N, B), contexts()
    changed = folds.clone()
    changed[1] = 3 * changed[1] - 7
    before, after = (whitening.held_out(z, context) for z in (folds, changed))
    for name in ("mean", "scale", "unmix"):
        old, new = getattr(before, name), getattr(after, name)
        if old.dim() == 2:  # none, or pooled from earlier updates
            assert torch.equal(old, new)
            continue
        torch.testing.assert_close(old[1], new[1], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(old[0], new[0], rtol=1e-3, atol=1e-3)
    assert before.base == after.base


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("mode", ["pooled", "full", "diagonal"])
def test_held_out_frame_is_that_of_the_other_folds(float64: None, mode: Any, updates: int) -> None:
    whitening = build(True, mode)
    for _ in range(updates):
        whitening.pool(draws(F, N, B), contexts())
    folds, context, value = draws(F, N, B), contexts(), draws(6, B)
    held_out = whitening.held_out(folds, context)
    whitened = held_out.whiten(value.expand(F, *value.shape))
    for fold in range(F):
        rest = torch.cat([folds[:fold], folds[fold + 1 :]]).flatten(0, 1)
        alone = whitening.frame(rest, context)
        torch.testing.assert_close(whitened[fold], alone.whiten(value), rtol=1e-8, atol=1e-8)
        assert alone.base == held_out.base


def test_pooled_statistics_of_an_update_are_those_of_earlier_ones() -> None:
    """From the second update on, a fold is not whitened by moments that it shaped."""
    whitening = build(False, "pooled")
    whitening.pool(draws(F, N, B), contexts(False))
    folds = draws(F, N, B)
    before = whitening.held_out(folds, contexts(False))
    after = whitening.held_out(3 * folds - 7, contexts(False))
    assert all(torch.equal(old, new) for old, new in zip(before[:3], after[:3], strict=True))


def test_unmixing_follows_the_pooled_correlation(float64: None) -> None:
    """At every one of the first updates, then at every fourth."""
    whitening, refreshed = build(True, "pooled"), []
    for update in range(1, 29):
        before = whitening.unmix.clone()
        whitening.pool(draws(F, N, B), contexts())
        if not torch.equal(whitening.unmix, before):
            refreshed.append(update)
    assert refreshed == [*range(1, 17), 20, 24, 28]


@pytest.mark.parametrize(
    ("mode", "width", "regressed"),
    [
        *(("pooled", 64, True), ("diagonal", 1, True)),
        *(("pooled", 65, False), ("diagonal", 65, False), ("pooled", 0, False)),
        *(("none", 4, False), ("full", 65, False)),
    ],
)
def test_moments_are_regressed_on_narrow_contexts(mode: Any, width: int, regressed: bool) -> None:
    """Elsewhere they are those of the draws, after any number of updates."""
    whitening = Whitening(D, width, mode=mode)
    assert (whitening.moments is not None) == regressed
    if regressed or width == 0:
        return
    context, z = torch.randn(B, width), draws(F * N, B)
    before = whitening.frame(z, context)
    for _ in range(3):
        whitening.pool(draws(F, N, B), context)
    after = whitening.frame(z, context)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.scale, after.scale)
    assert before.base == after.base


@pytest.mark.filterwarnings("ignore:full whitening of 3 dimensions needs at least 6")
def test_full_whitening_of_few_draws_is_diagonal() -> None:
    """With the regression that goes with it; where it is full, nothing is regressed."""
    results = []
    for mode in ("full", "diagonal"):
        torch.manual_seed(0)
        whitening = build(True, mode)
        for _ in range(3):
            folds, context = draws(2, 4, B), contexts()
            if mode == "full":
                whitening.held_out(folds, context)
            whitening.pool(folds, context)
        results.append(whitening.frame(draws(8, B), context))
    for full, diagonal in zip(*(frame[:3] for frame in results), strict=True):
        assert torch.equal(full, diagonal)
    whitening = build(True, "full")
    for _ in range(3):
        folds = draws(F, N, B)
        whitening.held_out(folds, contexts())
        whitening.pool(folds, contexts())
    assert whitening.moments is not None
    assert int(whitening.moments.fits) == 0


def test_variance_is_that_of_a_gaussian_draw(float64: None) -> None:
    """With moments of S other draws, w of a Gaussian is a Student's t: its variance."""
    rows, count = 40_000, 12
    context = contexts(rows=rows)
    for mode, dim in (("diagonal", 1), ("full", 2)):
        frame = Whitening(dim, C, mode=mode).frame(torch.randn(count, rows, dim), context)
        square = frame.whiten(torch.randn(1, rows, dim)).square().flatten()
        error = float(square.std()) / len(square) ** 0.5
        # 6 instead of 4.4 standard errors (rate 1e-5): the fourth moment of t is heavy-tailed
        degrees = frame.base.degrees
        variance = frame.base.square_scale * degrees / (degrees - 2)
        assert abs(float(square.mean()) - variance) < 6 * error


def test_one_row_of_no_spread_stays_finite() -> None:
    z, context = torch.zeros(16, 2, D), torch.zeros(2, C)
    for mode in MODES:
        whitening = build(True, mode)
        for _ in range(3):
            whitening.pool(z.unsqueeze(0), context)
        frame = whitening.frame(z, context)
        assert bool(torch.isfinite(frame.whiten(z)).all())
        assert bool(torch.isfinite(frame.log_abs_det()).all())


@pytest.mark.parametrize("mode", ["diagonal", "pooled", "full"])
def test_a_constant_dimension_is_as_wide_as_its_rounding(mode: Any) -> None:
    """Scores go as one over the scale: of 1e-15 they would be rounding errors times 1e15."""
    whitening = Whitening(2, 0, mode=mode)
    z = torch.stack([torch.randn(8, 16, 1), torch.full((8, 16, 1), 0.7)], -1)
    for _ in range(3):
        whitening.pool(z, torch.zeros(1, 0))
    frame = whitening.frame(z[0], torch.zeros(1, 0))
    assert float(frame.scale.flatten()[1]) >= 0.7 * torch.finfo(z.dtype).eps
    assert float(frame.whiten(z[0]).abs().max()) < 10
