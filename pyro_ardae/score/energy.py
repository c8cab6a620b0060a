# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The network of the energy parametrization: a field that is the gradient of an energy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ardae.score.modulated import Films, Layer, Modulated, mean_square

__all__ = ["EnergyNetwork"]


class EnergyNetwork(Modulated):
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
        self, parts: list[Tensor], scales: Films, saved: list[Layer]
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
        scales: Films,
        shifts: Films,
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
