# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Multilayer perceptrons and the activations that the provided models choose from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["ACTIVATIONS", "ELU", "MLP", "ConditionalMLP", "Network"]


class _ELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        exp = value.clamp(max=0).exp_()
        ctx.save_for_backward(exp)
        return torch.maximum(value, exp - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # exp(min(value, 0)) is the derivative on both sides of zero.
        return grad * ctx.saved_tensors[0]


class ELU(nn.Module):
    """The exponential linear unit, four times as fast on a CPU as :class:`torch.nn.ELU`.

    ``max(x, exp(min(x, 0)) - 1)``: the exponential is the derivative too, so nothing is computed
    twice. It differs from ``expm1`` by one rounding of 1. Differentiable once.
    """

    def forward(self, value: Tensor) -> Tensor:
        return _ELU.apply(value)


#: Activations by the name that the programs' options use. Nanoseconds an element with gradient, on
#: one core: ReLU 1, SiLU 2, ELU 3 (torch's own 10), softplus 11.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": ELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class Network(nn.Module):
    """Layers whose matrix products may run in a lower precision.

    :param nn.Module layers: what is computed.
    :param torch.dtype compute_dtype: the dtype of the matrix products under
        :class:`torch.autocast`, e.g. ``torch.bfloat16``; ``None`` computes in the parameters'
        dtype. The output has the parameters' dtype either way.
    """

    def __init__(self, layers: nn.Module, *, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.compute_dtype = compute_dtype

    def forward(self, value: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return self.layers(value)
        with torch.autocast(value.device.type, self.compute_dtype):
            output = self.layers(value)
        return output.to(value.dtype)


class MLP(Network):
    """A multilayer perceptron whose matrix products may run in a lower precision.

    :param Sequence[int] sizes: width of the input, of each hidden layer, and of the output; at
        least two entries.
    :param type[nn.Module] activation: activation after each hidden layer.
    :param bool activate_output: whether an activation follows the last layer as well.
    :param Tensor mean: mean of the input, ``[sizes[0]]``: the first bias starts such that it counts
        for zero. Subtracting it from every input instead would keep Adam drifting along inputs
        that are nearly constant, like the rim of MNIST, which costs 0.4 nats on test images.
    :param torch.dtype compute_dtype: as in :class:`Network`.
    :raises ValueError: if there are fewer than two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: type[nn.Module] = nn.SiLU,
        activate_output: bool = False,
        mean: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(
                f"sizes: expected an input and an output width at least, got {tuple(sizes)}"
            )
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        super().__init__(
            nn.Sequential(*(layers if activate_output else layers[:-1])),
            compute_dtype=compute_dtype,
        )
        if mean is not None:
            first = self.layers[0]
            with torch.no_grad():
                first.bias.sub_(first.weight @ mean)

    @property
    def last(self) -> nn.Linear:
        """The last linear layer."""
        return next(layer for layer in reversed(self.layers) if isinstance(layer, nn.Linear))

    @property
    def output_bias(self) -> nn.Parameter:
        """The bias of the output."""
        return self.last.bias


class ConditionalMLP(nn.Module):
    """A multilayer perceptron of an input and of a condition, e.g. noise and features.

    The first layer is split in two, so that the condition is projected once per row however many
    inputs there are for it: ``net(value, net.project(condition))``.

    :param int input_dim: width of the input.
    :param int condition_dim: width of the condition.
    :param Sequence[int] sizes: width of each hidden layer, one at least, and of the output.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param bool activate_output: whether an activation follows the last layer as well.
    :param bool zero_output: whether the last layer starts at zero.
    :param torch.dtype compute_dtype: as in :class:`Network`.
    :raises ValueError: if there is no hidden layer.
    """

    def __init__(
        self,
        input_dim: int,
        condition_dim: int,
        *,
        sizes: Sequence[int],
        activation: type[nn.Module] = nn.SiLU,
        activate_output: bool = False,
        zero_output: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError("hidden_dims: expected at least one hidden layer, got none")
        self.from_condition = Network(
            nn.Linear(condition_dim, sizes[0]), compute_dtype=compute_dtype
        )
        self.from_input = MLP((input_dim, sizes[0]), compute_dtype=compute_dtype)
        self.activation = activation()
        self.net = MLP(
            sizes,
            activation=activation,
            activate_output=activate_output,
            compute_dtype=compute_dtype,
        )
        if zero_output:
            nn.init.zeros_(self.net.last.weight)
            nn.init.zeros_(self.net.last.bias)

    def project(self, condition: Tensor) -> Tensor:
        """The condition's part of the first layer, ``[*batch, sizes[0]]``."""
        return self.from_condition(condition)

    def forward(self, value: Tensor, projected: Tensor) -> Tensor:
        return self.net(self.activation(self.from_input(value) + projected))
