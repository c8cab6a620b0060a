# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from models.contraction import Contraction, contracted

SHAPES = ((64, 100), (32, 64), (5, 5), (7, 1))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_contracted_matrices_have_a_norm_below_1_and_near_it(float64: None, scale: float) -> None:
    weights = [scale * torch.randn(shape) for shape in SHAPES]
    for one, shape in zip(contracted(weights), SHAPES, strict=True):
        assert min(shape) ** (-1 / 16) - 1e-9 < torch.linalg.matrix_norm(one, 2) < 1 + 1e-9


def test_small_matrices_stay_as_they_are(float64: None) -> None:
    weights = [1e-6 * torch.randn(64, 100), torch.zeros(3, 4)]
    assert all(map(torch.equal, contracted(weights), weights))


def test_contracted_matrices_and_their_gradient(float64: None) -> None:
    # The third is within its bound, and stays as it is.
    weights = [
        factor * torch.randn(shape) for factor, shape in zip((2, 3, 0.01), SHAPES[1:], strict=True)
    ]
    found = contracted(weights)
    for one, weight in zip(found[:2], weights[:2], strict=True):
        schatten = torch.linalg.svdvals(weight).pow(16).sum() ** (1 / 16)
        assert schatten > 1
        assert torch.allclose(one, weight / schatten, rtol=1e-12)
    assert torch.equal(found[2], weights[2])
    small = [factor * torch.randn(3, n) for factor, n in ((1, 5), (1, 2), (0.01, 3))]
    assert torch.autograd.gradcheck(
        lambda *given: contracted(given), [w.requires_grad_() for w in small]
    )


def test_network_starts_at_zero_and_brings_nothing_apart(float64: None) -> None:
    net = Contraction(5, 4, sizes=(8, 7, 3))
    projected = net.project(torch.randn(6, 4))
    one, other = torch.randn(2, 50, 6, 5)
    assert torch.equal(net(one, projected, net.matrices()), torch.zeros(50, 6, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(3 * torch.randn_like(parameter))
    matrices = net.matrices()
    moved = net(one, projected, matrices) - net(other, projected, matrices)
    ratio = moved.norm(dim=-1) / (one - other).norm(dim=-1)
    assert 1e-2 < ratio.max() < 1


def test_no_hidden_layer() -> None:
    with pytest.raises(ValueError, match="expected at least one hidden layer, got none"):
        Contraction(3, 4, sizes=(2,))
