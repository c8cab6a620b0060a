# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""ReLU networks of one shape side by side, with their gradient written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["ReLUStack"]


#: Shape of each layer's weights ``(N, in, out)`` and bias ``(N, 1, out)``, in turns.
_Shapes = Sequence[tuple[int, int, int]]


def _layers(flat: Tensor, shapes: _Shapes) -> list[Tensor]:
    """Views of the flat parameters, or of their gradient."""
    views, start = [], flat.storage_offset()
    for copies, fan_in, fan_out in shapes:  # one call a view
        stride = (fan_in * fan_out, fan_out, 1)
        views.append(flat.as_strided((copies, fan_in, fan_out), stride, start))
        start += copies * fan_in * fan_out
    return views


class _Stack(torch.autograd.Function):
    """``inputs [B, in]`` and the flat parameters of layers of so many ``shapes`` to
    ``[N, B, out]``; the products between hidden layers in ``dtype``.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, shapes: _Shapes, inputs: Tensor, flat: Tensor
    ) -> Tensor:
        layers = _layers(flat, shapes)
        weights, biases = layers[::2], layers[1::2]
        h = inputs.expand(len(weights[0]), *inputs.shape)
        if dtype != flat.dtype:
            weights[1:-1] = [weight.to(dtype) for weight in weights[1:-1]]
        saved = []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = h.to(weight.dtype)
            saved.append(h)
            h = torch.baddbmm(bias.to(weight.dtype), h, weight).relu_()
        h = h.to(inputs.dtype)
        ctx.shapes = shapes
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
        _, _, of_inputs, of_flat = ctx.needs_input_grad
        full = grad.dtype
        found = grad.new_empty(sum(map(math.prod, ctx.shapes))) if of_flat else None
        layers = [] if found is None else _layers(found, ctx.shapes)
        for i in reversed(range(count)):
            h, weight = saved[i], weights[i]
            column = weight.shape[-1] == 1
            if layers:
                d_weight, d_bias = layers[2 * i : 2 * i + 2]
                torch.sum(grad, 1, keepdim=True, dtype=full, out=d_bias)
                if column:
                    for one, by, out in zip(h, grad.squeeze(-1), d_weight, strict=True):
                        torch.mv(one.mT, by, out=out.squeeze(-1))
                elif grad.dtype == full:
                    torch.bmm(h.mT, grad, out=d_weight)
                else:
                    d_weight.copy_(torch.bmm(h.mT, grad))
            if i:
                below = weights[i - 1].dtype if i > 1 else full
                grad = grad * weight.mT if column else torch.bmm(grad, weight.mT)
                if h.dtype != grad.dtype:
                    h = h.to(grad.dtype)
                torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
                grad = grad.to(below)
            elif of_inputs:
                return None, None, torch.bmm(grad, weight.mT).sum(0), found
        return None, None, None, found


class ReLUStack(nn.Module):
    """Several ReLU networks of one shape, with weights of their own, each layer one product.

    Faster than modules: the gradient is written out, all parameters are one tensor, which an
    optimizer steps and an average follows in one pass, and the products between hidden layers,
    nearly all of the arithmetic, may run in a lower precision. Differentiable once.

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
        self.shapes, parts = [], []
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5  # as torch.nn.Linear
            for shape in ((copies, fan_in, fan_out), (copies, 1, fan_out)):
                self.shapes.append(shape)
                parts.append(torch.empty(math.prod(shape)).uniform_(-bound, bound))
        self.flat = nn.Parameter(torch.cat(parts))

    @property
    def layers(self) -> list[Tensor]:
        """Views of each layer's weights ``[N, in, out]`` and bias ``[N, 1, out]``, in turns."""
        return _layers(self.flat, self.shapes)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[*batch, in]`` to ``[N, *batch, out]``."""
        dtype = self.compute_dtype or inputs.dtype
        rows = inputs.flatten(0, -2) if inputs.dim() > 2 else inputs
        output: Tensor = _Stack.apply(dtype, self.shapes, rows, self.flat)
        if inputs.dim() > 2:
            output = output.unflatten(1, inputs.shape[:-1])
        return output
