# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Critics: the twin action-value networks of soft actor-critic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["TwinCritic"]


class _Stack(torch.autograd.Function):
    """Scalar ReLU networks side by side, with their gradient written out, faster than modules.

    Inputs are ``[B, in]``, and for each layer weights ``[N, in, out]`` and bias ``[N, 1, out]``,
    the last one's out being 1; the output is ``[N, B]``.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *layers: Tensor) -> Tensor:
        weights, biases = layers[::2], layers[1::2]
        h = inputs.expand(len(weights[0]), *inputs.shape)
        saved = [h]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = torch.baddbmm(bias, h, weight).relu_()
            saved.append(h)
        ctx.save_for_backward(*saved, *weights)
        # A batched product with one column takes seven times as long.
        last = zip(h, weights[-1].squeeze(-1), strict=True)
        return torch.stack([torch.mv(*one) for one in last]).add_(biases[-1].squeeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        saved, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needed)
        grad = grad.unsqueeze(-1)
        for i in reversed(range(count)):
            if needed[2 + 2 * i]:
                found[2 + 2 * i] = grad.sum(1, keepdim=True)
            if needed[1 + 2 * i] and i + 1 < count:
                found[1 + 2 * i] = saved[i].mT @ grad
            elif needed[1 + 2 * i]:
                last = zip(saved[i], grad.squeeze(-1), strict=True)
                found[1 + 2 * i] = torch.stack([h.mT.mv(g) for h, g in last]).unsqueeze(-1)
            if i:
                grad = grad * weights[i].mT if i + 1 == count else grad @ weights[i].mT
                torch.ops.aten.threshold_backward.grad_input(grad, saved[i], 0, grad_input=grad)
            elif needed[0]:
                found[0] = (grad @ weights[0].mT).sum(0)
        return tuple(found)


class TwinCritic(nn.Module):
    """Two action-value networks with weights of their own.

    Both are trained by one loss and one optimizer step, and the smaller value is used (clipped
    double Q-learning, Fujimoto et al. 2018, `arXiv 1802.09477 <https://arxiv.org/abs/1802.09477>`_).
    Their layers are stacked, so that one product serves both; differentiable once.

    :param int obs_dim: width of an observation, >= 1.
    :param int action_dim: width of an action, >= 1.
    :param Sequence[int] hidden_dims: widths of the hidden layers.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, *, hidden_dims: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__()
        layers = []
        for fan_in, fan_out in pairwise((obs_dim + action_dim, *hidden_dims, 1)):
            bound = fan_in**-0.5
            layers.append(nn.Parameter(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound)))
            layers.append(nn.Parameter(torch.empty(2, 1, fan_out).uniform_(-bound, bound)))
        self.layers = nn.ParameterList(layers)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """``obs [B, obs_dim]`` and ``action [B, D]`` in ``(-1, 1)`` to values ``[2, B]``."""
        # As a list: a ParameterList takes a while to iterate over.
        layers = list(self.layers._parameters.values())
        values: Tensor = _Stack.apply(torch.cat([obs, action], -1), *layers)
        return values
