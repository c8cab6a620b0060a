# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.stack import ReLUStack


def _by_hand(stack: ReLUStack, inputs: Tensor) -> Tensor:
    layers = stack.layers
    h = inputs.expand(len(layers[0]), *inputs.shape)
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        h = torch.relu(h @ weight + bias)
    return h @ layers[-2] + layers[-1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(3, 8, 1), (3, 8, 4), (3, 8, 7, 6, 1), (3, 8, 7, 6, 4)])
@pytest.mark.parametrize("copies", [1, 2])
def test_values_and_gradients_are_those_of_autograd(copies: int, sizes: tuple[int, ...]) -> None:
    stack = ReLUStack(copies, sizes)
    inputs = torch.randn(5, 3).requires_grad_()
    found, expected = stack(inputs), _by_hand(stack, inputs)
    assert found.shape == (copies, 5, sizes[-1])
    assert torch.allclose(found, expected, atol=1e-12)
    wanted = [inputs, stack.flat]
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), wanted)
    for one, other in zip(
        ours, torch.autograd.grad((expected * weight).sum(), wanted), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_batch_shapes() -> None:
    stack = ReLUStack(2, (3, 8, 4))
    inputs = torch.randn(6, 5, 3)
    assert torch.allclose(stack(inputs)[:, 2], stack(inputs[2]), atol=1e-6)


def test_lower_precision_rounds_and_keeps_dtypes() -> None:
    torch.manual_seed(0)
    stack = ReLUStack(2, (5, 64, 64, 64, 3))
    inputs = torch.randn(200, 5).requires_grad_()
    wanted = [inputs, stack.flat]
    results = []
    for dtype in (None, torch.bfloat16):
        stack.compute_dtype = dtype
        output = stack(inputs)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), wanted)])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        # bf16 has 8 bits: a few roundings in a row, and units that change sides.
        assert float((exact - rounded).norm() / exact.norm()) < 0.1
    assert not torch.equal(results[0][0], results[1][0])


def test_first_weights_are_those_of_linear() -> None:
    stack = ReLUStack(2, (16, 400, 1))
    assert stack.layers[0].abs().max() <= 0.25
    assert float(stack.layers[0].detach().std()) == pytest.approx(0.25 / 3**0.5, rel=0.05)
    shapes = [(2, 16, 400), (2, 1, 400), (2, 400, 1), (2, 1, 1)]
    assert [layer.shape for layer in stack.layers] == shapes
    assert stack.flat.numel() == sum(layer.numel() for layer in stack.layers)


def test_no_hidden_layer() -> None:
    with pytest.raises(ValueError, match=r"expected one hidden layer at least, got \(3, 1\)"):
        ReLUStack(1, (3, 1))
