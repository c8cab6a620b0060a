# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ardae.score.whitening import Whitening

F, N, B, D = 4, 8, 5, 3
MODES = ["pooled", "full", "diagonal", "none"]


def draws(*shape: int) -> Tensor:
    """Correlated, off-centre, of different scales, and far from Gaussian."""
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.1, -0.3, 0.05]])
    return torch.randn(*shape, D).exp() @ mix.mT + torch.tensor([1.0, -2.0, 30.0])


def frames(mode: Any, conditional: bool) -> tuple[Any, Any, Tensor]:
    """A held-out and a query frame of one whitening, after two updates."""
    whitening = Whitening(D, conditional, mode=mode)
    for _ in range(2):
        folds = draws(F, N, B)
        held_out = whitening.held_out(folds)
        whitening.pool(folds)
    return held_out, whitening.frame(draws(F * N, B)), folds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditional", [True, False])
def test_frame_is_what_autograd_says(float64: None, mode: Any, conditional: bool) -> None:
    """pull_back and log_abs_det against the Jacobian of whiten."""
    for frame, z in zip(frames(mode, conditional), (draws(F, N, B), draws(N, B)), strict=False):
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
    held_out, query, _ = frames(mode, conditional)
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
    signs = a.sign()
    results = []
    for folds, value in ((y, at), (a * y + b, a * at + b)):
        whitening = Whitening(D, conditional, mode=mode)
        whitening.pool(folds)
        frame = whitening.frame(folds.flatten(0, 1))
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
    y, at = torch.randn(F, 64, B, D), torch.randn(6, B, D)
    scores, smallest = [], []
    for folds, value in ((y, at), (y @ A.mT + b, at @ A.mT + b)):
        whitening = Whitening(D, conditional, mode=mode)
        whitening.pool(folds)
        frame = whitening.frame(folds.flatten(0, 1))
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
    w = Whitening(D, True, mode="full").frame(z).whiten(z)
    for b in range(B):
        corr = torch.corrcoef(z[:, b].mT)
        bound = 1e-5 / float(torch.linalg.eigvalsh(corr)[0])
        assert float((torch.cov(w[:, b].mT) - torch.eye(D)).abs().max()) < bound
    torch.testing.assert_close(w.mean(0), torch.zeros(B, D), atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["pooled", "full"])
def test_unconditional_frame_whitens_thin_directions(float64: None, mode: Any) -> None:
    """Condition number 1e4: pooled in full, since all rows are draws of one q."""
    z = torch.randn(F, 512, B, 1) + 1e-2 * torch.randn(F, 512, B, 2)
    whitening = Whitening(2, False, mode=mode)
    whitening.pool(z)
    w = whitening.frame(z.flatten(0, 1)).whiten(z).reshape(-1, 2)
    assert float((torch.cov(w.mT) - torch.eye(2)).abs().max()) < 0.01


def test_pooled_correlation_stays_within_its_borders(float64: None) -> None:
    """Eigenvalues inside [low, high] are left alone, the others are brought to the border."""
    z = torch.randn(F, 512, B, 1) + 0.1 * torch.randn(F, 512, B, 4)
    whitening = Whitening(4, True, mode="pooled", low=0.2, high=3.0)
    whitening.pool(z)
    corr = whitening.unmix @ whitening.pooled_corr @ whitening.unmix.mT
    values = torch.linalg.eigvalsh(corr)
    assert float(values[0]) > 0.19
    assert float(values[-1]) < 3.01
    near = Whitening(4, True, mode="pooled")
    near.pool(torch.randn(F, 512, B, 4))
    torch.testing.assert_close(near.unmix, torch.eye(4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["full", "diagonal"])
def test_held_out_frame_does_not_see_its_own_fold(float64: None, mode: Any) -> None:
    folds = draws(F, N, B)
    before = Whitening(D, True, mode=mode).held_out(folds)
    changed = folds.clone()
    changed[1] = 3 * changed[1] - 7
    after = Whitening(D, True, mode=mode).held_out(changed)
    for name in ("mean", "scale", "unmix"):
        old, new = getattr(before, name), getattr(after, name)
        if old.dim() == 2:  # no unmixing
            assert torch.equal(old, new)
            continue
        torch.testing.assert_close(old[1], new[1], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(old[0], new[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["full", "diagonal"])
def test_held_out_frame_is_that_of_the_other_folds(float64: None, mode: Any) -> None:
    folds = draws(F, N, B)
    held_out = Whitening(D, True, mode=mode).held_out(folds)
    value = draws(6, B)
    for fold in range(F):
        rest = torch.cat([folds[:fold], folds[fold + 1 :]]).flatten(0, 1)
        alone = Whitening(D, True, mode=mode).frame(rest)
        expected = alone.whiten(value)
        torch.testing.assert_close(
            held_out.whiten(value.expand(F, *value.shape))[fold], expected, rtol=1e-8, atol=1e-8
        )
        assert alone.base == held_out.base


@pytest.mark.parametrize("conditional", [True, False])
def test_pooled_statistics_of_an_update_are_those_of_earlier_ones(conditional: bool) -> None:
    """From the second update on, a fold is not whitened by a correlation that it shaped."""
    whitening = Whitening(D, conditional, mode="pooled")
    whitening.pool(draws(F, N, B))
    folds = draws(F, N, B)
    before = whitening.held_out(folds).unmix.clone()
    changed = folds.clone()
    changed[1] = 3 * changed[1] - 7
    assert torch.equal(whitening.held_out(changed).unmix, before)


def test_variance_is_that_of_a_gaussian_draw(float64: None) -> None:
    """With moments of S other draws, w of a Gaussian is a Student's t: its variance."""
    rows, count = 40_000, 12
    for mode, dim in (("diagonal", 1), ("full", 2)):
        frame = Whitening(dim, True, mode=mode).frame(torch.randn(count, rows, dim))
        square = frame.whiten(torch.randn(1, rows, dim)).square().flatten()
        error = float(square.std()) / len(square) ** 0.5
        # 6 instead of 4.4 standard errors (rate 1e-5): the fourth moment of t is heavy-tailed
        assert abs(float(square.mean()) - frame.base.variance) < 6 * error


def test_one_row_of_no_spread_stays_finite() -> None:
    z = torch.zeros(16, 2, D)
    for mode in MODES:
        whitening = Whitening(D, True, mode=mode)
        whitening.pool(z.unsqueeze(0))
        frame = whitening.frame(z)
        assert bool(torch.isfinite(frame.whiten(z)).all())
        assert bool(torch.isfinite(frame.log_abs_det()).all())
