# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients that are written out by hand, against autograd."""

from __future__ import annotations

import pytest
import torch

from pyro_ardae.score.energy import EnergyNetwork
from pyro_ardae.score.residual import ResidualNetwork


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [EnergyNetwork, ResidualNetwork])
@pytest.mark.parametrize("feature_dim", [0, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradient_of_the_loss(
    kind: type[EnergyNetwork] | type[ResidualNetwork], feature_dim: int, depth: int
) -> None:
    network = kind(3, feature_dim, 8, depth)
    flat = (network.initial().double() + 0.1 * torch.randn(network.size)).requires_grad_()
    w, sigma, features = torch.randn(4, 5, 3), torch.randn(4, 5, 1), torch.randn(5, feature_dim)
    target, weight = torch.randn(4, 5, 3), torch.randn(4, 5, 1)
    inputs = flat.detach(), w.clone(), sigma, features, target
    if isinstance(network, EnergyNetwork):
        weight = torch.ones_like(weight)
        value, gradient = network.loss(*inputs)
    else:
        value, gradient = network.loss(*inputs, weight)

    if isinstance(network, EnergyNetwork):
        w = w.requires_grad_()
        energy = network.energy(flat, w, sigma, features).sum()
        field = -torch.autograd.grad(energy, w, create_graph=True)[0]
        assert torch.allclose(network.field(flat, w, sigma, features), field.detach())
    else:
        field = network.field(flat, w, sigma, features)
    loss = (target + weight * field).square().mean()
    (expected,) = torch.autograd.grad(loss, flat)
    assert torch.allclose(value, loss.detach(), rtol=0, atol=1e-12)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)

    if isinstance(network, EnergyNetwork):
        draws, others = torch.randn(4, 5, 3), torch.randn(2, 5, 3)
        value, both = network.loss(*inputs, contrast=(draws, others, 0.7))
        _, of_ratio = network.ratio_loss(flat.detach(), draws, others, features)
        assert torch.allclose(value, loss.detach(), rtol=0, atol=1e-12)
        assert torch.allclose(both, expected + 0.7 * of_ratio, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("feature_dim", [0, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_gradient_of_the_ratio_loss(feature_dim: int, depth: int) -> None:
    network = EnergyNetwork(3, feature_dim, 8, depth)
    flat = (network.initial().double() + 0.1 * torch.randn(network.size)).requires_grad_()
    draws, others = torch.randn(4, 5, 3), torch.randn(2, 5, 3)
    features = torch.randn(5, feature_dim)
    value, gradient = network.ratio_loss(flat.detach(), draws, others, features)

    def energy(w: torch.Tensor) -> torch.Tensor:
        return network.energy(flat, w, torch.zeros(*w.shape[:-1], 1), features)

    loss = (1 + energy(draws).exp()).log().mean() + (1 + (-energy(others)).exp()).log().mean()
    (expected,) = torch.autograd.grad(loss, flat)
    assert torch.allclose(value, loss.detach(), rtol=0, atol=1e-12)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)
