# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of the score: a residual field, or the gradient of an energy, modulated by a context.

Both are functions of one flat tensor of weights, so that an optimizer step and a running average
are one operation each. The gradients of their losses are written out by hand: at the size that pays
here (1,000 rows, 64 units) the bookkeeping of autograd costs as much as the arithmetic, and so does
every pass over the rows that is no matrix product.
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
        return [
            flat[i:j].view(shape)
            for (i, j), shape in zip(pairwise(self.offsets), self.shapes, strict=True)
        ]

    def encode(self, parts: list[Tensor], features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Films ``[B, depth, 2, hidden]``: by layer, what is added to a scale of 1, and the shift.

        :param features: ``[B, K]``.
        :returns: the films (B = 1 without features), and what their gradient needs.
        """
        shape = -1, self.depth, 2, self.hidden_dim
        bias = parts[self.depth]
        if not self.feature_dim:
            return bias.view(shape), []
        first, first_bias, second, second_bias, last = parts[self.depth + 1 : self.depth + 6]
        a = torch.addmm(first_bias, features, first)
        g = F.silu(a)
        b = torch.addmm(second_bias, g, second)
        h = F.silu(b)
        return torch.addmm(bias, h, last).view(shape), [features, a, g, b, h]

    def _encoder_gradient(
        self,
        parts: list[Tensor],
        grads: list[Tensor],
        encoded: list[Tensor],
        d_films: Tensor,
        d_encoded: Tensor | None = None,
    ) -> None:
        """Write the encoder's gradient, from that by the films and by its last layer."""
        grads[self.depth].copy_(d_films.sum(0))
        if not self.feature_dim:
            return
        features, a, g, b, h = encoded
        _, _, second, _, last = parts[self.depth + 1 : self.depth + 6]
        d_first, d_first_bias, d_second, d_second_bias, d_last = grads[
            self.depth + 1 : self.depth + 6
        ]
        torch.mm(h.mT, d_films, out=d_last)
        d_h = d_films @ last.mT
        d_b = torch.ops.aten.silu_backward(d_h if d_encoded is None else d_h.add_(d_encoded), b)
        torch.mm(g.mT, d_b, out=d_second)
        d_second_bias.copy_(d_b.sum(0))
        d_a = torch.ops.aten.silu_backward(d_b @ second.mT, a)
        torch.mm(features.mT, d_a, out=d_first)
        d_first_bias.copy_(d_a.sum(0))

    def _hidden(
        self, parts: list[Tensor], x: Tensor, films: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]]:
        """Last hidden layer ``[n B, hidden]``; by layer input, product, sigmoid, SiLU and scale."""
        h = x.view(-1, x.shape[-1])
        saved = []
        for i in range(self.depth):
            scale = 1 + films[:, i, 0]
            product = (h @ parts[i]).view(*x.shape[:-1], self.hidden_dim)
            argument = torch.addcmul(films[:, i, 1], product, scale)
            sigmoid = argument.sigmoid()
            g = argument * sigmoid
            saved.append((h, product, sigmoid, g, scale))
            h = g.flatten(0, 1) + h if i else g.flatten(0, 1)
        return h, saved

    def _hidden_gradient(
        self,
        parts: list[Tensor],
        grads: list[Tensor],
        films: Tensor,
        saved: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
        d_hidden: Tensor,
    ) -> Tensor:
        """Write the layers' gradient, from that by the last one, and return that by the films."""
        d_films = torch.empty_like(films)
        for i in reversed(range(self.depth)):
            below, product, sigmoid, g, scale = saved[i]
            # The derivative of SiLU. torch's own takes the sigmoid again: twice as long.
            slope = torch.addcmul(sigmoid, sigmoid, g, value=-1).add_(g)
            d_argument = slope.mul_(d_hidden.view(slope.shape))
            d_films[:, i, 0] = product.mul_(d_argument).sum(0).sum_to_size(scale.shape)
            d_films[:, i, 1] = d_argument.sum(0).sum_to_size(scale.shape)
            d_product = d_argument.mul_(scale).flatten(0, 1)
            torch.mm(below.mT, d_product, out=grads[i])
            if i:
                d_hidden.addmm_(d_product, parts[i].mT)
        return d_films

    @staticmethod
    def inputs(w: Tensor, sigma: Tensor) -> Tensor:
        """``[n, B, D + 2]``: w, and two functions of sigma of the order of 1."""
        return torch.cat([w, 3 * sigma.abs(), 9 * sigma.square()], -1)


class ResidualNetwork(_Modulated):
    r"""Field :math:`r(w, \sigma; c) = a(h) + b(h) \odot w`, locally a Gaussian's; zero at first.

    :param dim: dimensions D of w.
    :param feature_dim: dimensions K of the features of the context; 0 for none.
    :param hidden_dim: width.
    :param depth: number of hidden layers, >= 1.
    """

    def __init__(self, dim: int, feature_dim: int, hidden_dim: int, depth: int) -> None:
        super().__init__(dim, feature_dim, hidden_dim, depth, [[hidden_dim, 2 * dim], [2 * dim]])

    def field(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
    ) -> Tensor:
        """``w [n, B, D]``, ``sigma [n, B, 1]``, ``features [B, K]`` to ``[n, B, D]``."""
        parts = self.split(flat)
        films, _ = self.encode(parts, features)
        h, _ = self._hidden(parts, self.inputs(w, sigma), films)
        gate = torch.addmm(parts[-1], h, parts[-2]).view(*w.shape[:-1], -1)
        return torch.addcmul(gate[..., : self.dim], gate[..., self.dim :], w)

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
        h, saved = self._hidden(parts, self.inputs(w, sigma), films)
        gate = torch.addmm(parts[-1], h, parts[-2])
        value, weight = w.reshape(-1, self.dim), weight.expand(*w.shape[:-1], 1).reshape(-1, 1)
        field = torch.addcmul(gate[:, : self.dim], gate[:, self.dim :], value)
        error = torch.addcmul(target.reshape(-1, self.dim), weight, field)
        loss = error.square().mean()

        grad = torch.empty_like(flat)
        grads = self.split(grad)
        d_gate = gate  # no longer needed: its memory is
        torch.mul(error, weight * (2.0 / error.numel()), out=d_gate[:, : self.dim])
        torch.mul(d_gate[:, : self.dim], value, out=d_gate[:, self.dim :])
        torch.sum(d_gate, 0, out=grads[-1])
        torch.mm(h.mT, d_gate, out=grads[-2])
        d_films = self._hidden_gradient(parts, grads, films, saved, d_gate @ parts[-2].mT)
        self._encoder_gradient(parts, grads, encoded, d_films.flatten(1))
        return loss, grad


class EnergyNetwork(_Modulated):
    r"""Energy :math:`E = v^\top h + h_c^\top (A w + B w^2)`, whose negative gradient is
    the field; zero at first. The quadratic part, with :math:`h_c` the encoder's last layer, is that
    of a Gaussian.

    Parameters are those of :class:`ResidualNetwork`.
    """

    def __init__(self, dim: int, feature_dim: int, hidden_dim: int, depth: int) -> None:
        quadratic = [[hidden_dim if feature_dim else 1, 2 * dim]]
        super().__init__(dim, feature_dim, hidden_dim, depth, [[hidden_dim, 1], *quadratic])

    def energy(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
    ) -> Tensor:
        """``w [n, B, D]``, ``sigma [n, B, 1]``, ``features [B, K]`` to ``[n, B]``."""
        parts = self.split(flat)
        films, encoded = self.encode(parts, features)
        h = self.inputs(w, sigma)
        for i in range(self.depth):
            g = F.silu(torch.addcmul(films[:, i, 1], h @ parts[i], 1 + films[:, i, 0]))
            h = h + g if i else g
        quadratic = encoded[-1] @ parts[-1] if encoded else parts[-1]
        a, b = quadratic.chunk(2, -1)
        return (h @ parts[-2]).squeeze(-1) + (w * torch.addcmul(a, b, w)).sum(-1)

    def field(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
    ) -> Tensor:
        """``[n, B, D]``: minus the gradient of the energy by w."""
        return self.energy_and_field(flat, w, sigma, features)[1]

    def energy_and_field(
        self, flat: Tensor, w: Tensor, sigma: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both, for little more than the field alone."""
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            energy = self.energy(flat.detach(), w, sigma, features)
            (gradient,) = torch.autograd.grad(energy.sum(), w)
        return energy.detach(), -gradient

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
        v, quadratic = parts[-2:]
        _, saved = self._hidden(parts, self.inputs(w, sigma), films)

        # The energy's gradient by w: its adjoints by h, argument and product in every layer.
        adjoints = []
        of_h = v.mT
        for i in reversed(range(self.depth)):
            _, _, sigmoid, g, scale = saved[i]
            slope = torch.addcmul(sigmoid, sigmoid, g, value=-1).add_(g)
            of_argument = slope * of_h
            of_product = (of_argument * scale).flatten(0, 1)
            adjoints.append((slope, of_h, of_argument, of_product))
            below = (of_product @ parts[i].mT).view(*w.shape[:-1], -1)
            of_h = of_h + below if i else below
        adjoints.reverse()
        bowl = encoded[-1] @ quadratic if encoded else quadratic
        a, b = bowl.chunk(2, -1)
        slope_w = torch.addcmul(a, b, w, value=2).add_(of_h[..., : self.dim])
        error = torch.addcmul(target, weight, slope_w, value=-1)
        loss = error.square().mean()

        # With e the loss's gradient by the field, that by the weights is the one of the energy's
        # derivative along -e: reverse over forward. Its adjoints by the tangents are those above.
        tangent_w = (error * weight).mul_(-2.0 / error.numel())
        grad = torch.empty_like(flat)
        grads = self.split(grad)
        moved = torch.zeros_like(saved[0][0])
        moved[:, : self.dim] = tangent_w.flatten(0, 1)
        tangents = []
        for i in range(self.depth):
            product = (moved @ parts[i]).view(*w.shape[:-1], self.hidden_dim)
            tangents.append((moved, product))
            g = (product * saved[i][4]).mul_(adjoints[i][0]).flatten(0, 1)
            moved = moved + g if i else g
        grads[-2].copy_(moved.sum(0).unsqueeze(-1))
        d_films = torch.empty_like(films)
        d_h: Tensor | None = None
        for i in reversed(range(self.depth)):
            below, product, sigmoid, g, scale = saved[i]
            slope, of_h, of_argument, of_product = adjoints[i]
            moved, tangent = tangents[i]
            # The second derivative of SiLU: (1 - s) (2 s + g (1 - 2 s)).
            curve = torch.addcmul(g, sigmoid, g, value=-2).add_(sigmoid, alpha=2)
            curve.addcmul_(sigmoid, curve, value=-1)
            d_argument = curve.mul_(tangent).mul_(scale).mul_(of_h)
            if d_h is not None:
                d_argument.addcmul_(slope, d_h)
            along = torch.addcmul(product.mul_(d_argument), of_argument, tangent)
            d_films[:, i, 0] = along.sum(0).sum_to_size(scale.shape)
            d_films[:, i, 1] = d_argument.sum(0).sum_to_size(scale.shape)
            d_product = d_argument.mul_(scale).flatten(0, 1)
            torch.mm(below.mT, d_product, out=grads[i])
            grads[i].add_(moved.mT @ of_product)
            if i:
                up = (d_product @ parts[i].mT).view_as(slope)
                d_h = up if d_h is None else d_h.add_(up)
        d_bowl = torch.cat([tangent_w.sum(0), (2 * w * tangent_w).sum(0)], -1)
        self._bowl_gradient(parts, grads, encoded, d_films.flatten(1), d_bowl)
        return loss, grad

    def ratio_loss(
        self, flat: Tensor, draws: Tensor, others: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logistic loss of telling draws of q from those of the base by minus the energy, whose
        minimizer is the log ratio of their densities; and its gradient by the flat weights.

        :param draws: of q, ``[n, B, D]``.
        :param others: of the base, ``[m, B, D]``.
        """
        parts = self.split(flat)
        films, encoded = self.encode(parts, features)
        w = torch.cat([draws, others])
        h, saved = self._hidden(parts, self.inputs(w, w.new_zeros(*w.shape[:-1], 1)), films)
        v, quadratic = parts[-2:]
        bowl = encoded[-1] @ quadratic if encoded else quadratic
        a, b = bowl.chunk(2, -1)
        energy = (h @ v).view(w.shape[:-1]) + (w * torch.addcmul(a, b, w)).sum(-1)
        of_draws, of_others = energy.split([len(draws), len(others)])
        loss = F.softplus(of_draws).mean() + F.softplus(-of_others).mean()

        d_energy = torch.cat(
            [of_draws.sigmoid() / of_draws.numel(), -of_others.neg().sigmoid() / of_others.numel()]
        )
        grad = torch.empty_like(flat)
        grads = self.split(grad)
        rows = d_energy.view(-1, 1)
        torch.mm(h.mT, rows, out=grads[-2])
        d_films = self._hidden_gradient(parts, grads, films, saved, rows @ v.mT)
        along = d_energy.unsqueeze(-1) * w
        d_bowl = torch.cat([along.sum(0), along.mul_(w).sum(0)], -1)
        self._bowl_gradient(parts, grads, encoded, d_films.flatten(1), d_bowl)
        return loss, grad

    def _bowl_gradient(
        self,
        parts: list[Tensor],
        grads: list[Tensor],
        encoded: list[Tensor],
        d_films: Tensor,
        d_bowl: Tensor,
    ) -> None:
        """Write the gradient of the quadratic part and the encoder."""
        if encoded:
            torch.mm(encoded[-1].mT, d_bowl, out=grads[-1])
            self._encoder_gradient(parts, grads, encoded, d_films, d_bowl @ parts[-1].mT)
        else:
            grads[-1].copy_(d_bowl.sum(0, keepdim=True))
            self._encoder_gradient(parts, grads, encoded, d_films)
