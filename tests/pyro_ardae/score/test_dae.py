# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ardae.score import DAE, PaperARDAE
from tests.pyro_ardae.oracle import relative_error

SCALE = torch.tensor([1.0, 0.6])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("batch", [(), (5,), (3, 1, 2)])
@pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (3, 4)])
def test_shapes(residual: bool, batch: tuple[int, ...], dim: int, context_dim: int) -> None:
    estimator = DAE(dim, context_dim, residual=residual, hidden_dim=8)
    samples, value = torch.randn(12, *batch, dim), torch.randn(7, *batch, dim)
    context = torch.randn(*batch, context_dim) if context_dim else None
    assert estimator.update(samples, context).shape == ()
    assert estimator(value, samples, context).shape == value.shape


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_learns_the_smoothed_score_of_a_gaussian(residual: bool, context_dim: int) -> None:
    """The minimizer is the score of q * N(0, s^2 I), exactly: -(z - m) / (scale^2 + s^2).

    The zero score has error 1; a tenth of it is what 300 steps reach (0.003 to 0.027) with room.
    """
    sigma = 0.5
    estimator = DAE(
        2, context_dim, residual=residual, sigma=sigma, hidden_dim=32, depth=2, learning_rate=5e-3
    )

    def draw(count: int) -> tuple[Tensor, Tensor | None, Tensor]:
        c = torch.randn(32, context_dim) if context_dim else None
        mean = torch.zeros(32, 2) if c is None else c
        return mean + SCALE * torch.randn(count, 32, 2), c, mean

    for _ in range(300):
        z, c, _ = draw(32)
        estimator.update(z, c)
    z, c, mean = draw(400)
    level = sigma * SCALE.mean()
    expected = -(z - mean) / (SCALE**2 + level**2)
    assert relative_error(estimator(z, z, c), expected) < 0.1


def test_error_of_the_plain_autoencoder_grows_as_sigma_falls() -> None:
    """What the residual form mends: the network's error is divided by sigma^2."""
    errors = {}
    for residual in (True, False):
        torch.manual_seed(0)
        estimator = DAE(2, residual=residual, sigma=0.02, hidden_dim=32, learning_rate=5e-3)
        for _ in range(200):
            estimator.update(SCALE * torch.randn(512, 2))
        z = SCALE * torch.randn(2000, 2)
        errors[residual] = relative_error(estimator(z, z), -z / SCALE**2)
    assert errors[False] > 10 * errors[True]


def test_level_falls_geometrically() -> None:
    estimator = DAE(1, sigma=0.1, sigma_start=1.6, anneal_updates=4, hidden_dim=4)
    levels = []
    for _ in range(6):
        levels.append(estimator.level())
        estimator.update(torch.randn(8, 1))
    expected = torch.tensor([1.6, 0.8, 0.4, 0.2, 0.1, 0.1])
    torch.testing.assert_close(torch.tensor(levels), expected)
    assert DAE(1, sigma=0.3).level() == 0.3


@pytest.mark.parametrize("make", [DAE, PaperARDAE])
@pytest.mark.parametrize("option", ["hidden_dim", "depth"])
def test_size_of_the_network(make: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__}: expected {option} >= 1, got 0"):
        make(2, **{option: 0})
