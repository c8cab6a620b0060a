# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What the estimators with a kernel have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_ardae import Implicit, TraceImplicit_ELBO
from pyro_ardae.score import KernelDensityScore, SpectralScore, SteinScore, kernel

KINDS: list[Any] = [
    KernelDensityScore,
    partial(KernelDensityScore, bandwidth=0.7),
    SteinScore,
    SpectralScore,
    partial(SpectralScore, num_eigen=4),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["kde", "kde h", "stein", "ssge", "ssge J"])


@every_kind
@pytest.mark.parametrize("batch", [(), (5,), (3, 1, 2)])
@pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (3, 4)])
def test_shapes(kind: Any, batch: tuple[int, ...], dim: int, context_dim: int) -> None:
    estimator = kind(dim, context_dim)
    samples = torch.randn(12, *batch, dim)
    context = torch.randn(*batch, context_dim) if context_dim else None
    loss = estimator.update(samples, context)
    assert (loss.shape, float(loss)) == ((), 0.0)
    for count in (7, 1, 0):
        value = torch.randn(count, *batch, dim)
        score = estimator(value, samples, context, center=torch.zeros(*batch, dim))
        assert score.shape == value.shape
        assert bool(torch.isfinite(score).all())


def scattered(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws, values and context, with locations and scales of their own in each context."""
    scale = torch.logspace(-3, 3, 6).reshape(3, 2, 1)
    location = 100 * scale * torch.randn(3, 2, 1)
    z, value = (
        location + scale * torch.randn(count, 3, 2, 2),
        location + scale * torch.randn(9, 3, 2, 2),
    )
    return z, value, torch.randn(3, 2, 5)


@every_kind
def test_each_context_by_itself(float64: None, kind: Any) -> None:
    estimator = kind(2, 5)
    z, value, c = scattered(20)
    together = estimator(value, z, c)
    for i in range(3):
        for j in range(2):
            alone = estimator(value[:, i, j], z[:, i, j], c[i, j])
            torch.testing.assert_close(together[:, i, j], alone, rtol=1e-9, atol=1e-9)


@every_kind
def test_each_value_by_itself(float64: None, kind: Any) -> None:
    estimator = kind(2, 5)
    z, value, c = scattered(20)
    alone = torch.cat([estimator(row, z, c) for row in value.split(1)])
    torch.testing.assert_close(estimator(value, z, c), alone, rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_follows_similarities(float64: None, kind: Any, scale: float) -> None:
    """The score of a Q z + b is Q s / a. A missing power of h would show."""
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    z, value = torch.randn(30, 3) ** 3, torch.randn(10, 3)
    estimator = kind(3)

    def moved(x: Tensor) -> Tensor:
        return scale * (x @ rotation.mT + 7)

    expected = estimator(value, z) @ rotation.mT / scale
    score = estimator(moved(value), moved(z))
    torch.testing.assert_close(scale * score, scale * expected, rtol=1e-8, atol=1e-8)


@every_kind
@pytest.mark.parametrize("limit", [1, 3 * 8 * 20 * 20])
def test_chunks_change_nothing(
    float64: None, kind: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is any kernel matrix larger than the limit, unless one context or value needs it."""
    estimator = kind(2, 5)
    z, value, c = scattered(20)
    value = value.repeat(7, 1, 1, 1)
    expected = estimator(value, z, c)
    sizes: list[int] = []

    def spied(y: Tensor, x: Tensor) -> Tensor:
        out = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist")
        sizes.append(out.element_size() * out.numel() if limit > 1 else len(out))
        return out

    monkeypatch.setattr(kernel, "CHUNK_BYTES", limit)
    for module in ("kernel", "kde", "stein", "spectral"):
        monkeypatch.setattr(f"pyro_ardae.score.{module}.distances", spied)
    torch.testing.assert_close(estimator(value, z, c), expected, rtol=1e-9, atol=1e-9)
    assert max(sizes) <= limit
    assert len(sizes) == (2 * (1 + 4) if limit > 1 else 6 * (1 + 63))


@every_kind
def test_no_gradient_leaks(kind: Any) -> None:
    z, value = torch.randn(20, 4, 2, requires_grad=True), torch.randn(5, 4, 2, requires_grad=True)
    c = torch.randn(4, 3, requires_grad=True)
    estimator = kind(2, 3)
    assert not estimator.update(z, c).requires_grad
    assert not estimator(value, z, c).requires_grad
    assert (list(estimator.parameters()), estimator.state_dict()) == ([], {})


@every_kind
def test_values_of_the_context_do_not_matter(kind: Any) -> None:
    z, value = torch.randn(20, 4, 2), torch.randn(5, 4, 2)
    estimator = kind(2, 3)
    scores = [estimator(value, z, torch.randn(4, 3)) for _ in range(2)]
    assert torch.equal(*scores)


@every_kind
@pytest.mark.parametrize("spread", [0.0, 1e-20])
def test_collapsed_draws_give_finite_scores(kind: Any, spread: float) -> None:
    z = 3.0 + spread * torch.randn(20, 2)
    z[:2] += 1.0
    assert bool(torch.isfinite(kind(2)(z + 0.5, z)).all())


@every_kind
def test_single_precision_far_from_the_origin(kind: Any) -> None:
    """Draws at 1000 +- 1 have 24 - 10 bits of their own: their scores 1e-4, amplified by a solve
    whose condition number is some hundred."""
    z, value = (1000 + torch.randn(n, 2) for n in (100, 50))
    exact = kind(2)(value.double(), z.double())
    torch.testing.assert_close(kind(2)(value, z).double(), exact, rtol=1e-2, atol=1e-2)


# ---- errors --------------------------------------------------------------------------------------

Z = torch.zeros(8, 5, 2)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "bandwidth 0": (lambda: KernelDensityScore(2, bandwidth=0.0), r"bandwidth in \(0, inf\), got"),
    "bandwidth nan": (lambda: SteinScore(2, bandwidth=float("nan")), "SteinScore: expected bandw"),
    "eta": (lambda: SteinScore(2, eta=0.0), r"SteinScore: expected eta in \(0, inf\), got 0.0"),
    "num_eigen": (lambda: SpectralScore(2, num_eigen=0), "num_eigen >= 1 or None, got 0"),
    "eigen_ratio 0": (lambda: SpectralScore(2, eigen_ratio=0.0), r"eigen_ratio in \(0, 1\]"),
    "eigen_ratio 2": (lambda: SpectralScore(2, eigen_ratio=2.0), "got 2.0"),
    "dim": (lambda: SteinScore(0), "SteinScore: expected dim >= 1"),
    "samples of another dim": (lambda: SteinScore(3).update(Z), r"\[S, \*batch, 3\], got"),
    "context missing": (lambda: SteinScore(2, 3).update(Z), r"context \[\*batch, 3\], got none"),
    "context of another batch shape": (
        lambda: SpectralScore(2, 3)(Z, Z, torch.zeros(4, 3)),
        r"batch shape \(5,\).*got \(4, 3\)",
    ),
    "value of another batch shape": (
        lambda: KernelDensityScore(2)(Z[:, :4], Z),
        r"KernelDensityScore: expected value .*\(5, 2\), got \(8, 4, 2\)",
    ),
    "one draw": (lambda: SpectralScore(2).update(Z[:1]), "2 draws per context, got 1. Raise num"),
    "one draw to answer from": (lambda: SteinScore(2)(Z, Z[:1]), "2 draws per context, got 1"),
    "density of a score": (lambda: SteinScore(2).log_prob(Z, Z), "no log_prob"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_error(row: str) -> None:
    call, words = ERRORS[row]
    with pytest.raises((ValueError, NotImplementedError), match=f"(?s){words}"):
        call()


# ---- in the ELBO ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KernelDensityScore, SteinScore, SpectralScore])
def test_conjugate_posterior(kind: Any) -> None:
    """Prior N(0, 1), two data of variance 1 at 1.5: the posterior is N(1, 1/3).

    The guide is m + s eps. Its gradient by log s is 1 - 3 s^2 with the exact score, and
    kappa - 3 s^2 with kappa = -E[s_hat(z) (z - m)] with this one; kappa does not depend on m and s
    (see test_follows_similarities), so that s ends where 3 s^2 = kappa: at 0.28 to 0.35 in place
    of 1/3. Over 20 seeds 3 s^2 / kappa is 0.98 to 1.09 with a standard deviation of 0.03, m
    is 0.94 to 1.01 with 0.02.
    """
    draws, particles, steps = 48, 64, 80

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z.squeeze(-1), 1.0), obs=torch.full((2,), 1.5))

    def guide() -> None:
        m, log_s = (pyro.param(name, torch.zeros(1)) for name in ("m", "log_s"))
        pyro.sample("z", Implicit(lambda eps: m + log_s.exp() * eps, 1))

    elbo = TraceImplicit_ELBO(
        kind, draws, 1, particles, vectorize_particles=True, max_plate_nesting=1
    )
    optim = pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optim, loss=elbo)
    for _ in range(steps):
        svi.step()
    mean, log_s = (float(pyro.param(name).detach()) for name in ("m", "log_s"))
    square = math.exp(2 * log_s)

    eps = torch.randn(draws, 4000, 1)
    at = torch.randn(1, 4000, 1)
    products = -kind(1)(at, eps) * at
    kappa = float(products.mean())  # to within 2 %
    assert square == pytest.approx(kappa / 3, rel=0.2)
    assert mean == pytest.approx(1.0, abs=0.12)
