# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_ardae.score import PaperARDAE
from tests.pyro_ardae.oracle import relative_error

SCALE = torch.tensor([1.0, 0.6])


@pytest.mark.parametrize("kind", ["energy", "residual"])
@pytest.mark.parametrize("batch", [(), (5,), (3, 1, 2)])
@pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (3, 4)])
def test_shapes(kind: Any, batch: tuple[int, ...], dim: int, context_dim: int) -> None:
    estimator = PaperARDAE(dim, context_dim, parametrization=kind, hidden_dim=8)
    samples, value = torch.randn(12, *batch, dim), torch.randn(7, *batch, dim)
    context = torch.randn(*batch, context_dim) if context_dim else None
    center = torch.randn(*batch, dim)
    assert estimator.update(samples, context, center=center).shape == ()
    assert estimator(value, samples, context, center=center).shape == value.shape


def test_settings_are_the_papers() -> None:
    """The table of the authors' run scripts."""
    gaussians, mnist, resconv = (
        make(2, 3) for make in (PaperARDAE.gaussians, PaperARDAE.mnist, PaperARDAE.resconv)
    )
    rows = [
        (gaussians, "energy", 1e4, 256, 3, 0.5),
        (mnist, "energy", 1e4, 256, 5, 0.5),
        (resconv, "residual", 100.0, 512, 5, 0.9),
    ]
    for estimator, kind, scale, width, depth, momentum in rows:
        assert estimator.parametrization == kind
        assert estimator.input_scale == scale
        assert estimator.delta == 0.1
        layers = [m for m in estimator.network if isinstance(m, nn.Linear)]
        assert [m.out_features for m in layers] == [width] * depth + [1 if kind == "energy" else 2]
        assert layers[0].in_features == 2 + 3 + 1
        group = estimator.optimizer.param_groups[0]
        assert isinstance(estimator.optimizer, torch.optim.RMSprop)
        assert (group["lr"], group["momentum"]) == (1e-4, momentum)
        assert estimator.needs_center


def test_queries_read_no_samples() -> None:
    estimator = PaperARDAE(2, 3, hidden_dim=8)
    value, context, center = torch.randn(6, 4, 2), torch.randn(4, 3), torch.randn(4, 2)
    assert not estimator.needs_samples
    without = estimator(value, value[:0], context, center=center)
    assert torch.equal(without, estimator(value, torch.randn(5, 4, 2), context, center=center))


@pytest.mark.parametrize("kind", ["energy", "residual"])
@pytest.mark.parametrize("input_scale", [1.0, 100.0])
def test_score_scales_with_the_input(float64: None, kind: Any, input_scale: float) -> None:
    """The network's field is the score of b (z - center); that of z is b times it."""
    estimator = PaperARDAE(2, parametrization=kind, input_scale=input_scale, hidden_dim=8).double()
    unit = PaperARDAE(2, parametrization=kind, input_scale=1.0, hidden_dim=8).double()
    unit.load_state_dict(estimator.state_dict())
    z, center = torch.randn(5, 2), torch.randn(2)
    scaled = input_scale * (z - center)
    expected = input_scale * unit(scaled, scaled, center=torch.zeros(2))
    torch.testing.assert_close(estimator(z, z, center=center), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["energy", "residual"])
def test_learns_the_score_of_conditional_gaussians(kind: Any) -> None:
    """With inputs of size 1 and a larger rate; at b = 1e4 it takes the paper's 10^5 updates.

    The zero score has error 1; a tenth of it is what 300 steps reach (0.01 and 0.03) with room.
    """
    estimator = PaperARDAE(
        2,
        2,
        parametrization=kind,
        input_scale=1.0,
        hidden_dim=32,
        depth=2,
        delta=0.5,
        learning_rate=3e-3,
        momentum=0.9,
    )

    def draw(count: int) -> tuple[Tensor, Tensor]:
        c = torch.randn(32, 2)
        return c + SCALE * torch.randn(count, 32, 2), c

    for _ in range(300):
        z, c = draw(32)
        estimator.update(z, c, center=c)
    z, c = draw(100)
    expected = -(z - c) / SCALE**2
    assert relative_error(estimator(z, z, c, center=c), expected) < 0.1
