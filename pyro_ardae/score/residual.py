# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The network of the residual parametrization: a field."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ardae.score.modulated import Modulated, mean_square

__all__ = ["ResidualNetwork"]


class ResidualNetwork(Modulated):
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
