# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""ReLU networks of one shape side by side, with their gradient written out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["ReLUStack"]


class _Stack(torch.autograd.Function):
    """``inputs [B, in]`` and, for each layer, weights ``[N, in, out]`` and bias ``[N, 1, out]`` to
    ``[N, B, out]``; the products between hidden layers in ``dtype``.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, inputs: Tensor, *layers: Tensor) -> Tensor:
        weights, biases = [*layers[::2]], [*layers[1::2]]
        h = inputs.expand(len(weights[0]), *inputs.shape)
        weights[1:-1] = [weight.to(dtype) for weight in weights[1:-1]]
        saved = []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = h.to(weight.dtype)
            saved.append(h)
            h = torch.baddbmm(bias.to(weight.dtype), h, weight).relu_()
        h = h.to(inputs.dtype)
        ctx.save_for_backward(*saved, h, *weights)
        if weights[-1].shape[-1] > 1:
            return torch.baddbmm(biases[-1], h, weights[-1])
        # A batched product with one column takes seven times as long.
        last = zip(h, weights[-1].squeeze(-1), strict=True)
        return torch.stack([torch.mv(*one) for one in last]).unsqueeze(-1).add_(biases[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        saved, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * len(needed)
        full = grad.dtype
        for i in reversed(range(count)):
            h, weight = saved[i], weights[i]
            if needed[2 + 2 * i]:
                found[2 + 2 * i] = grad.sum(1, keepdim=True, dtype=full)
            column = weight.shape[-1] == 1
            if needed[1 + 2 * i] and column:
                pairs = zip(h, grad.squeeze(-1), strict=True)
                found[1 + 2 * i] = torch.stack([one.mT.mv(g) for one, g in pairs]).unsqueeze(-1)
            elif needed[1 + 2 * i]:
                found[1 + 2 * i] = torch.bmm(h.mT, grad).to(full)
            if i:
                below = weights[i - 1].dtype if i > 1 else full
                grad = grad * weight.mT if column else torch.bmm(grad, weight.mT)
                if h.dtype != grad.dtype:
                    h = h.to(grad.dtype)
                torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
                grad = grad.to(below)
            elif needed[0]:
                found[0] = torch.bmm(grad, weight.mT).sum(0)
        return None, *found


class ReLUStack(nn.Module):
    """Several ReLU networks of one shape, with weights of their own, each layer one product.

    Faster than modules: the gradient is written out, and the products between hidden layers, nearly
    all of the arithmetic, may run in a lower precision. Differentiable once.

    :param int copies: number N of networks, >= 1.
    :param Sequence[int] sizes: width of the input, of each hidden layer, one at least, and of the
        output.
    :param torch.dtype compute_dtype: dtype of the products between hidden layers, e.g.
        ``torch.bfloat16``; ``None`` computes in the parameters' dtype. Input, output and weights
        keep theirs.
    :raises ValueError: if there is no hidden layer.
    """

    def __init__(
        self, copies: int, sizes: Sequence[int], *, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if len(sizes) < 3:
            raise ValueError(f"sizes: expected one hidden layer at least, got {tuple(sizes)}")
        self.compute_dtype = compute_dtype
        layers = []
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5  # as torch.nn.Linear
            for shape in ((copies, fan_in, fan_out), (copies, 1, fan_out)):
                layers.append(nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        self.layers = nn.ParameterList(layers)

    @property
    def output_weight(self) -> nn.Parameter:
        """Weights of the last layer, ``[N, in, out]``."""
        return self.layers[-2]

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the last layer, ``[N, 1, out]``."""
        return self.layers[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """``[*batch, in]`` to ``[N, *batch, out]``."""
        # As a list: a ParameterList takes a while to iterate over.
        layers = list(self.layers._parameters.values())
        dtype = self.compute_dtype or inputs.dtype
        flat = inputs.flatten(0, -2) if inputs.dim() > 2 else inputs
        output: Tensor = _Stack.apply(dtype, flat, *layers)
        if inputs.dim() > 2:
            output = output.unflatten(1, inputs.shape[:-1])
        return output
