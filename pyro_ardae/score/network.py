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
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EnergyNetwork", "ResidualNetwork", "mean_square"]

#: By layer.
_Films = tuple[Tensor, ...]

#: Of a hidden layer the input ``[n B, fan-in]``, its product with the weights and the slope of SiLU
#: ``[n B, hidden]``.
_Layer = tuple[Tensor, Tensor, Tensor]


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares, in one pass."""
    x = x.reshape(-1)
    return torch.dot(x, x) / x.numel()


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
        start = flat.storage_offset()  # one call a part: half the time of a slice and a view
        return [
            flat.as_strided(shape, (*shape[1:], 1), start + offset)
            for shape, offset in zip(self.shapes, self.offsets, strict=False)
        ]

    def encode(self, parts: list[Tensor], features: Tensor) -> tuple[_Films, _Films, list[Tensor]]:
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

    def _last_hidden(
        self, parts: list[Tensor], x: Tensor, scales: _Films, shifts: _Films
    ) -> Tensor:
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
        scales: _Films,
        shifts: _Films,
        curves: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[_Layer]]:
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
        scales: _Films,
        saved: list[_Layer],
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
        scales, shifts, _ = self.encode(parts, features)
        h = self._last_hidden(parts, self.inputs(w, sigma), scales, shifts)
        gate = torch.addmm(parts[-1], h, parts[-2]).view(*w.shape[:-1], -1)
        return torch.addcmul(gate[..., : self.dim], gate[..., self.dim :], w)

    def loss(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean square of ``target + weight * field``, and its gradient by the flat weights.

        :param weight: 1 if left out.
        """
        parts = self.split(flat)
        scales, shifts, encoded = self.encode(parts, features)
        h, saved = self._hidden(parts, self.inputs(w, sigma), scales, shifts)
        gate = torch.addmm(parts[-1], h, parts[-2])
        shift, factor = gate.split(self.dim, 1)
        value = w.reshape(-1, self.dim)
        field = torch.addcmul(shift, factor, value).view(w.shape)
        error = target + field if weight is None else torch.addcmul(target, weight, field)
        loss = mean_square(error)

        grad = torch.empty_like(flat)
        grads = self.split(grad)
        d_field = error.mul_(2.0 / error.numel())
        d_field = (d_field if weight is None else d_field * weight).reshape(-1, self.dim)
        d_gate = gate  # no longer needed: its memory is
        shift.copy_(d_field)
        torch.mul(d_field, value, out=factor)
        torch.sum(d_gate, 0, out=grads[-1])
        torch.mm(h.t(), d_gate, out=grads[-2])
        d_films = self._hidden_gradient(parts, grads, scales, saved, d_gate @ parts[-2].t())
        self._encoder_gradient(parts, grads, encoded, d_films)
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
        scales, shifts, encoded = self.encode(parts, features)
        h = self._last_hidden(parts, self.inputs(w, sigma), scales, shifts)
        return self._head(parts, h, w, *self._bowl(parts, encoded))

    def field(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
    ) -> Tensor:
        """``[n, B, D]``: minus the gradient of the energy by w."""
        return self.energy_and_field(flat, w, sigma, features)[1]

    @torch.no_grad()
    def energy_and_field(
        self, flat: Tensor, w: Tensor, sigma: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both, for little more than the field alone; not differentiable, as :meth:`field`."""
        parts = self.split(flat)
        scales, shifts, encoded = self.encode(parts, features)
        h, saved = self._hidden(parts, self.inputs(w, sigma), scales, shifts)
        bowl = self._bowl(parts, encoded)
        _, of_input = self._adjoints(parts, scales, saved)
        return self._head(parts, h, w, *bowl), self._slope(w, of_input, *bowl).neg_()

    def _bowl(self, parts: list[Tensor], encoded: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Coefficients of w and of its square, ``[B, D]`` each (B = 1 without features)."""
        a, b = (encoded[-1] @ parts[-1] if encoded else parts[-1]).chunk(2, -1)
        return a, b

    @staticmethod
    def _head(parts: list[Tensor], h: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The energy ``[n, B]``, by the last hidden layer and the bowl."""
        return (h @ parts[-2]).view(w.shape[:-1]) + (w * torch.addcmul(a, b, w)).sum(-1)

    def _slope(self, w: Tensor, of_input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The energy's gradient by w, by that of the layers' part by their input."""
        of_w = of_input.view(*w.shape[:-1], -1)[..., : self.dim]
        return torch.addcmul(a, b, w, value=2).add_(of_w)

    def _adjoints(
        self, parts: list[Tensor], scales: _Films, saved: list[_Layer]
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """The gradient of the layers' part of the energy by output, argument and product of each
        layer, and by the input ``[n B, D + 2]``.
        """
        by_context = (-1, *scales[0].shape)
        adjoints = []
        of_h = parts[-2].t()
        for i in reversed(range(self.depth)):
            slope = saved[i][2]
            of_argument = slope * of_h
            of_product = (of_argument.view(by_context) * scales[i]).view_as(slope)
            adjoints.append((of_h, of_argument, of_product))
            below = of_product @ parts[i].t()
            of_h = of_h + below if i else below
        adjoints.reverse()
        return adjoints, of_h

    def loss(
        self,
        flat: Tensor,
        w: Tensor,
        sigma: Tensor,
        features: Tensor,
        target: Tensor,
        *,
        contrast: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean square of ``target + field``, and its gradient by the flat weights.

        :param contrast: the arguments draws and others of :meth:`ratio_loss`, and a factor: so many
            times that loss's gradient is added, for less than by a call of its own. The value
            returned is without it.
        """
        parts, grad = self.split(flat), torch.empty_like(flat)
        grads = self.split(grad)
        scales, shifts, encoded = self.encode(parts, features)
        bowl = self._bowl(parts, encoded)
        curves: list[Tensor] = []
        _, saved = self._hidden(parts, self.inputs(w, sigma), scales, shifts, curves)
        adjoints, of_input = self._adjoints(parts, scales, saved)
        field = self._slope(w, of_input, *bowl).neg_()
        error = target + field
        loss = mean_square(error)

        # With e the loss's gradient by the field, that by the weights is the one of the energy's
        # derivative along -e: reverse over forward. Its adjoints by the tangents are those above.
        tangent_w = error.mul_(-2.0 / error.numel())
        by_context = (-1, *scales[0].shape)
        moved = torch.zeros_like(saved[0][0])
        moved[:, : self.dim] = tangent_w.flatten(0, 1)
        tangents = []
        for i in range(self.depth):
            product = moved @ parts[i]
            tangents.append((moved, product))
            g = (product.view(by_context) * scales[i]).view_as(product).mul_(saved[i][2])
            moved = moved + g if i else g
        grads[-2].copy_(moved.sum(0).unsqueeze(-1))
        d_films = w.new_empty(2 * self.depth, *scales[0].shape)
        d_h: Tensor | None = None
        for i in reversed(range(self.depth)):
            below, product, slope = saved[i]
            of_h, of_argument, of_product = adjoints[i]
            moved, tangent = tangents[i]
            d_argument = curves[i].mul_(tangent).mul_(of_h).view(by_context).mul_(scales[i])
            if d_h is not None:
                d_argument.addcmul_(slope.view(by_context), d_h.view(by_context))
            d_product = d_argument.view_as(slope)
            along = torch.addcmul(product.mul_(d_product), of_argument, tangent).view(by_context)
            torch.sum(along, 0, out=d_films[2 * i])
            torch.sum(d_argument, 0, out=d_films[2 * i + 1])
            d_argument.mul_(scales[i])
            torch.mm(below.t(), d_product, out=grads[i])
            grads[i].add_(moved.t() @ of_product)
            if i:
                up = d_product @ parts[i].t()
                d_h = up if d_h is None else d_h.add_(up)
        d_bowl = torch.cat([tangent_w.sum(0), (2 * w * tangent_w).sum(0)], -1)
        if contrast is not None:
            draws, others, factor = contrast
            further = torch.zeros_like(flat)
            _, films, of_bowl = self._ratio(
                parts, self.split(further), scales, shifts, bowl, draws, others
            )
            grad.add_(further, alpha=factor)
            d_films.add_(films, alpha=factor)
            d_bowl.add_(of_bowl, alpha=factor)
        self._bowl_gradient(parts, grads, encoded, d_films, d_bowl)
        return loss, grad

    def ratio_loss(
        self, flat: Tensor, draws: Tensor, others: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logistic loss of telling draws of q from those of the base by minus the energy, whose
        minimizer is the log ratio of their densities; and its gradient by the flat weights.

        :param draws: of q, ``[n, B, D]``.
        :param others: of the base, ``[m, B, D]``.
        """
        parts, grad = self.split(flat), torch.empty_like(flat)
        grads = self.split(grad)
        scales, shifts, encoded = self.encode(parts, features)
        bowl = self._bowl(parts, encoded)
        loss, d_films, d_bowl = self._ratio(parts, grads, scales, shifts, bowl, draws, others)
        self._bowl_gradient(parts, grads, encoded, d_films, d_bowl)
        return loss, grad

    def _ratio(
        self,
        parts: list[Tensor],
        grads: list[Tensor],
        scales: _Films,
        shifts: _Films,
        bowl: tuple[Tensor, Tensor],
        draws: Tensor,
        others: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ratio loss, and its gradient by films and bowl; write that by layers and head."""
        w = torch.cat([draws, others])
        level = w.new_zeros(*w.shape[:-1], 1)
        h, saved = self._hidden(parts, self.inputs(w, level), scales, shifts)
        of_draws, of_others = self._head(parts, h, w, *bowl).split([len(draws), len(others)])
        loss = F.softplus(of_draws).mean() + F.softplus(-of_others).mean()

        d_energy = torch.cat(
            [of_draws.sigmoid() / of_draws.numel(), -of_others.neg().sigmoid() / of_others.numel()]
        )
        rows = d_energy.view(-1, 1)
        torch.mm(h.t(), rows, out=grads[-2])
        d_films = self._hidden_gradient(parts, grads, scales, saved, rows @ parts[-2].t())
        along = d_energy.unsqueeze(-1) * w
        d_bowl = torch.cat([along.sum(0), along.mul_(w).sum(0)], -1)
        return loss, d_films, d_bowl

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
            torch.mm(encoded[-1].t(), d_bowl, out=grads[-1])
            self._encoder_gradient(parts, grads, encoded, d_films, d_bowl @ parts[-1].t())
        else:
            grads[-1].copy_(d_bowl.sum(0, keepdim=True))
            self._encoder_gradient(parts, grads, encoded, d_films)
