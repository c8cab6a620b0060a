# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of the score: a residual field, or the gradient of an energy, modulated by a context.

Both are functions of one flat tensor of weights, so that an optimizer step and a running average
are one operation each. The residual network's gradient is written out by hand: at the
size that pays here (1,000 rows, 64 units) the bookkeeping of autograd costs as much as the
arithmetic.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EnergyNetwork", "ResidualNetwork"]


class _Modulated:
    """SiLU layers of (w, sigma) with skip connections. An encoder of the features, run once per
    context, scales and shifts every layer (feature-wise linear modulation, Perez et al. 2018).
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
        return [
            flat[i:j].view(shape)
            for (i, j), shape in zip(pairwise(self.offsets), self.shapes, strict=True)
        ]

    def encode(self, parts: list[Tensor], features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Films ``[B, 2 depth hidden]`` of ``features [B, K]``, and what their gradient needs."""
        bias = parts[self.depth]
        if not self.feature_dim:
            return bias.unsqueeze(0), []
        first, first_bias, second, second_bias, last = parts[self.depth + 1 : self.depth + 6]
        a = torch.addmm(first_bias, features, first)
        g = F.silu(a)
        b = torch.addmm(second_bias, g, second)
        h = F.silu(b)
        return torch.addmm(bias, h, last), [features, a, g, b, h]

    def hidden(
        self, parts: list[Tensor], w: Tensor, sigma: Tensor, films: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Last hidden layer ``[n, B, hidden]``; by layer its input, product, argument, scale."""
        modulation = films.view(-1, self.depth, 2, self.hidden_dim)
        h = torch.cat([w, 3 * sigma.abs(), 9 * sigma.square()], -1)
        saved = []
        for i in range(self.depth):
            scale, shift = 1 + modulation[:, i, 0], modulation[:, i, 1]
            product = h @ parts[i]
            argument = torch.addcmul(shift, product, scale)
            saved.append((h, product, argument, scale))
            g = F.silu(argument)
            h = h + g if i else g
        return h, saved


class ResidualNetwork(_Modulated):
    r"""Field :math:`r(w, \sigma; c) = a(h) + b(h) \odot w`, locally a Gaussian's; zero at first.

    :param dim: dimensions D of w.
    :param feature_dim: dimensions K of the features of the context; 0 for none.
    :param hidden_dim: width.
    :param depth: number of hidden layers, >= 1.
    """

    def __init__(self, dim: int, feature_dim: int, hidden_dim: int, depth: int) -> None:
        super().__init__(dim, feature_dim, hidden_dim, depth, [[hidden_dim, 2 * dim], [2 * dim]])

    def field(self, flat: Tensor, w: Tensor, sigma: Tensor, features: Tensor) -> Tensor:
        """``w [n, B, D]``, ``sigma [n, B, 1]``, ``features [B, K]`` to ``[n, B, D]``."""
        parts = self.split(flat)
        films, _ = self.encode(parts, features)
        h, _ = self.hidden(parts, w, sigma, films)
        a, b = (h @ parts[-2] + parts[-1]).to(w.dtype).chunk(2, -1)
        return torch.addcmul(a, b, w)

    def loss(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
        target: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean square of ``target + weight * field``, and its gradient by the flat weights."""
        parts = self.split(flat)
        films, encoded = self.encode(parts, features)
        h, saved = self.hidden(parts, w, sigma, films)
        a, b = (h @ parts[-2] + parts[-1]).to(w.dtype).chunk(2, -1)
        error = torch.addcmul(target, weight, torch.addcmul(a, b, w))
        loss = error.square().mean()

        grad = torch.empty_like(flat)
        grads = self.split(grad)
        d_field = error.mul_(weight).mul_(2.0 / error.numel())
        d_out = torch.cat([d_field, d_field * w], -1).flatten(0, 1)
        grads[-2].copy_(h.flatten(0, 1).mT @ d_out)
        grads[-1].copy_(d_out.sum(0))
        d_hidden = d_out @ parts[-2].mT
        d_films = torch.empty_like(films).view(-1, self.depth, 2, self.hidden_dim)
        for i in reversed(range(self.depth)):
            below, product, argument, scale = saved[i]
            d_argument = torch.ops.aten.silu_backward(d_hidden.view(argument.shape), argument)
            d_films[:, i, 0] = (d_argument * product).sum(0).sum_to_size(scale.shape)
            d_films[:, i, 1] = d_argument.sum(0).sum_to_size(scale.shape)
            d_product = (d_argument * scale).flatten(0, 1)
            grads[i].copy_(below.flatten(0, 1).mT @ d_product)
            if i:
                d_hidden = torch.addmm(d_hidden, d_product, parts[i].mT)
        self._encoder_gradient(parts, grads, encoded, d_films.flatten(1))
        return loss, grad

    def _encoder_gradient(
        self, parts: list[Tensor], grads: list[Tensor], encoded: list[Tensor], d_films: Tensor
    ) -> None:
        grads[self.depth].copy_(d_films.sum(0))
        if not self.feature_dim:
            return
        features, a, g, b, h = encoded
        _, _, second, _, last = parts[self.depth + 1 : self.depth + 6]
        d_first, d_first_bias, d_second, d_second_bias, d_last = grads[
            self.depth + 1 : self.depth + 6
        ]
        d_last.copy_(h.mT @ d_films)
        d_b = torch.ops.aten.silu_backward(d_films @ last.mT, b)
        d_second.copy_(g.mT @ d_b)
        d_second_bias.copy_(d_b.sum(0))
        d_a = torch.ops.aten.silu_backward(d_b @ second.mT, a)
        d_first.copy_(features.mT @ d_a)
        d_first_bias.copy_(d_a.sum(0))


class EnergyNetwork(_Modulated):
    r"""Energy :math:`E = v^\top h + h_c^\top (A w + B w^2)`, whose negative gradient is
    the field; zero at first. The quadratic part, with :math:`h_c` the encoder's last layer, is that
    of a Gaussian.

    Parameters are those of :class:`ResidualNetwork`.
    """

    def __init__(self, dim: int, feature_dim: int, hidden_dim: int, depth: int) -> None:
        quadratic = [[hidden_dim if feature_dim else 1, 2 * dim]]
        super().__init__(dim, feature_dim, hidden_dim, depth, [[hidden_dim, 1], *quadratic])

    def energy(self, flat: Tensor, w: Tensor, sigma: Tensor, features: Tensor) -> Tensor:
        """``w [n, B, D]``, ``sigma [n, B, 1]``, ``features [B, K]`` to ``[n, B]``."""
        parts = self.split(flat)
        films, encoded = self.encode(parts, features)
        h, _ = self.hidden(parts, w, sigma, films)
        quadratic = (encoded[-1] @ parts[-1] if encoded else parts[-1]).to(w.dtype)
        a, b = quadratic.chunk(2, -1)
        bowl = (w * torch.addcmul(a, b, w)).sum(-1)
        return (h @ parts[-2]).to(w.dtype).squeeze(-1) + bowl

    def field(self, flat: Tensor, w: Tensor, sigma: Tensor, features: Tensor) -> Tensor:
        """``[n, B, D]``: minus the gradient of the energy by w."""
        return self._field(flat.detach(), w, sigma, features, create_graph=False)

    def loss(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
        target: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean square of ``target + weight * field``, and its gradient by the flat weights."""
        with torch.enable_grad():
            flat = flat.detach().requires_grad_()
            field = self._field(flat, w, sigma, features, create_graph=True)
            loss = torch.addcmul(target, weight, field).square().mean()
            (grad,) = torch.autograd.grad(loss, flat)
        return loss.detach(), grad

    def _field(
        self, flat: Tensor, w: Tensor, sigma: Tensor, features: Tensor, *, create_graph: bool
    ) -> Tensor:
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            energy = self.energy(flat, w, sigma, features).sum()
            (gradient,) = torch.autograd.grad(energy, w, create_graph=create_graph)
        return -gradient
