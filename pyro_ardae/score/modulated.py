# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The hidden layers of the networks of the score, modulated by a context.

Networks are functions of one flat tensor of weights, so that an optimizer step and a running
average are one operation each. The gradients of their losses are written out by hand: at the size
that pays here (1,000 rows, 64 units) the bookkeeping of autograd costs as much as the arithmetic,
and so does every pass over the rows that is no matrix product.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Films", "Layer", "Modulated", "mean_square"]

#: By layer.
Films = tuple[Tensor, ...]

#: Of a hidden layer the input ``[n B, fan-in]``, its product with the weights and the slope of SiLU
#: ``[n B, hidden]``.
Layer = tuple[Tensor, Tensor, Tensor]


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares, in one pass."""
    x = x.reshape(-1)
    return torch.dot(x, x) / x.numel()


class Modulated:
    """SiLU layers of (w, sigma) with skip connections. An encoder of the features, run once per
    context, scales and shifts every layer (feature-wise linear modulation, Perez et al. 2018).
    Shifts alone would be a fifth cheaper and, at equal time, leave a third more error.
    """

    def __init__(
        self, dim: int, feature_dim: int, hidden_dim: int, depth: int, head_shapes: list[list[int]]
    ) -> None:
        self.dim, self.feature_dim = dim, feature_dim
        self.hidden_dim, self.depth = hidden_dim, depth
        films = 2 * depth * hidden_dim
        shapes = [[dim + 2, hidden_dim]] + [[hidden_dim, hidden_dim]] * (depth - 1)
        shapes += [[films]]
        if feature_dim:
            shapes += [[feature_dim, hidden_dim], [hidden_dim]]
            shapes += [[hidden_dim, hidden_dim], [hidden_dim], [hidden_dim, films]]
        self.shapes = shapes + head_shapes
        self.offsets = [0, *accumulate(math.prod(shape) for shape in self.shapes)]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.offsets[-1]

    def initial(self) -> Tensor:
        """Flat weights ``[size]`` at which the field is zero."""
        flat = torch.zeros(self.size)
        parts = self.split(flat)
        for i in range(self.depth):
            bound = parts[i].shape[0] ** -0.5
            parts[i].uniform_(-bound, bound)
        films = parts[self.depth].view(self.depth, 2, self.hidden_dim)
        films[:, 1].uniform_(-(self.hidden_dim**-0.5), self.hidden_dim**-0.5)
        if self.feature_dim:
            first, first_bias, second, second_bias, last = parts[self.depth + 1 : self.depth + 6]
            for weight, bias in ((first, first_bias), (second, second_bias)):
                bound = weight.shape[0] ** -0.5
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            last.normal_(std=0.5 / self.hidden_dim**0.5)
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of the weights, or of their gradient."""
        start = flat.storage_offset()  # one call a part: half the time of a slice and a view
        return [
            flat.as_strided(shape, (*shape[1:], 1), start + offset)
            for shape, offset in zip(self.shapes, self.offsets, strict=False)
        ]

    def encode(self, parts: list[Tensor], features: Tensor) -> tuple[Films, Films, list[Tensor]]:
        """Scales and shifts of the layers, ``[B, hidden]`` each (B = 1 without features), and what
        their gradient needs.

        Each is contiguous: a pass over rows with a strided one takes half as long again.

        :param features: ``[B, K]``.
        """
        count = 2 * self.depth
        films = parts[self.depth].view(count, 1, self.hidden_dim)
        encoded: list[Tensor] = []
        if self.feature_dim:
            first, first_bias, second, second_bias, last = parts[self.depth + 1 : self.depth + 6]
            a = torch.addmm(first_bias, features, first)
            g = F.silu(a)
            b = torch.addmm(second_bias, g, second)
            h = F.silu(b)
            last = last.view(-1, count, self.hidden_dim).transpose(0, 1)
            films = torch.baddbmm(films, h.expand(count, *h.shape), last)
            encoded = [features, a, g, b, h]
        return (1 + films[::2]).unbind(), films[1::2].unbind(), encoded

    def _encoder_gradient(
        self,
        parts: list[Tensor],
        grads: list[Tensor],
        encoded: list[Tensor],
        d_films: Tensor,
        d_encoded: Tensor | None = None,
    ) -> None:
        """Write the encoder's gradient, from that by the films and by its last layer.

        :param d_films: ``[2 depth, B, hidden]``, a scale before each shift.
        """
        d_films = d_films.transpose(0, 1).flatten(1)
        torch.sum(d_films, 0, out=grads[self.depth])
        if not self.feature_dim:
            return
        features, a, g, b, h = encoded
        _, _, second, _, last = parts[self.depth + 1 : self.depth + 6]
        d_first, d_first_bias, d_second, d_second_bias, d_last = grads[
            self.depth + 1 : self.depth + 6
        ]
        torch.mm(h.t(), d_films, out=d_last)
        d_h = d_films @ last.t()
        d_b = torch.ops.aten.silu_backward(d_h if d_encoded is None else d_h.add_(d_encoded), b)
        torch.mm(g.t(), d_b, out=d_second)
        torch.sum(d_b, 0, out=d_second_bias)
        d_a = torch.ops.aten.silu_backward(d_b @ second.t(), a)
        torch.mm(features.t(), d_a, out=d_first)
        torch.sum(d_a, 0, out=d_first_bias)

    def _last_hidden(self, parts: list[Tensor], x: Tensor, scales: Films, shifts: Films) -> Tensor:
        """Last hidden layer of ``x [n, B, D + 2]``, ``[n B, hidden]``."""
        h, by_context = x.flatten(0, 1), (-1, *scales[0].shape)
        for i in range(self.depth):
            product = torch.mm(h, parts[i]).view(by_context)
            g = F.silu(torch.addcmul(shifts[i], product, scales[i])).flatten(0, 1)
            h = h + g if i else g
        return h

    def _hidden(
        self,
        parts: list[Tensor],
        x: Tensor,
        scales: Films,
        shifts: Films,
        curves: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Layer]]:
        """As :meth:`_last_hidden`, with what the gradient needs of every layer.

        :param curves: takes the second derivatives of SiLU, if they are wanted.
        """
        h, one, by_context = x.flatten(0, 1), x.new_ones(()), (-1, *scales[0].shape)
        saved = []
        argument: Tensor | None = None
        for i in range(self.depth):
            product = torch.mm(h, parts[i])
            argument = torch.addcmul(shifts[i], product.view(by_context), scales[i], out=argument)
            g = argument.view(-1, self.hidden_dim)
            sigmoid = g.sigmoid()
            g.mul_(sigmoid)
            if curves is not None:  # (1 - s) (2 s + g (1 - 2 s))
                curve = torch.addcmul(g, sigmoid, g, value=-2).add_(sigmoid, alpha=2)
                curves.append(curve.addcmul_(sigmoid, curve, value=-1))
            # torch's own derivative of SiLU takes the sigmoid again: twice as long.
            slope = torch.lerp(g, one, sigmoid, out=sigmoid)
            saved.append((h, product, slope))
            if i:  # the next layer's argument may overwrite g
                h = h + g
            else:
                h, argument = g, None
        return h, saved

    def _hidden_gradient(
        self,
        parts: list[Tensor],
        grads: list[Tensor],
        scales: Films,
        saved: list[Layer],
        d_hidden: Tensor,
    ) -> Tensor:
        """Write the layers' gradient, from that by the last one, and return that by the films.

        What is saved is used up: in place, a pass fetches no memory that it only writes to.
        """
        by_context = (-1, *scales[0].shape)
        d_films = d_hidden.new_empty(2 * self.depth, *scales[0].shape)
        by_film = d_films.unbind()
        for i in reversed(range(self.depth)):
            below, product, slope = saved[i]
            d_product = slope.mul_(d_hidden)
            d_argument = d_product.view(by_context)
            torch.sum(product.mul_(d_product).view(by_context), 0, out=by_film[2 * i])
            torch.sum(d_argument, 0, out=by_film[2 * i + 1])
            d_argument.mul_(scales[i])  # from here on d_product is that
            torch.mm(below.t(), d_product, out=grads[i])
            if i:
                d_hidden.addmm_(d_product, parts[i].t())
        return d_films

    @staticmethod
    def inputs(w: Tensor, sigma: Tensor) -> Tensor:
        """``[n, B, D + 2]``: w, and two functions of sigma of the order of 1."""
        level = 3 * sigma.abs()
        return torch.cat([w, level, level.square()], -1)
