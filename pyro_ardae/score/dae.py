# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The regular denoising autoencoder as a score estimator: the baseline that AR-DAE mends."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.residual import ResidualNetwork
from pyro_ardae.score.trained import TrainedEstimator

__all__ = ["DAE"]


class DAE(TrainedEstimator):
    r"""Denoising autoencoder at one noise level, not amortized over :math:`\sigma`.

    With ``residual=False`` a network R learns :math:`E \lVert R(z + \sigma u, c) - z \rVert^2` and
    the score is :math:`(R(z, c) - z) / \sigma^2` (Alain & Bengio 2014). Its error is divided by
    :math:`\sigma^2`, so it grows without bound as :math:`\sigma \to 0`, while the score it aims
    at, that of :math:`q * N(0, \sigma^2 I)`, is off by :math:`O(\sigma^2)`. With ``residual=True``
    the network is the score, with loss :math:`E \lVert u + \sigma f(z + \sigma u, c) \rVert^2`.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param residual: see above.
    :param sigma: noise level, > 0, in units of the mean standard deviation of the draws.
    :param sigma_start: if given, the level falls geometrically from here to ``sigma``.
    :param anneal_updates: updates over which it falls, >= 1.
    :param hidden_dim: width of the network, >= 1.
    :param depth: hidden layers of the network, >= 1.
    :param learning_rate: Adam's step size.
    :raises ValueError: for a parameter out of range.

    References: Vincent, "A connection between score matching and denoising autoencoders", 2011;
    Alain & Bengio, "What regularized auto-encoders learn from the data generating distribution",
    JMLR 2014; Lim et al. 2020, sec. 3.1.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        residual: bool = False,
        sigma: float = 0.1,
        sigma_start: float | None = None,
        anneal_updates: int = 1000,
        hidden_dim: int = 64,
        depth: int = 4,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(dim, context_dim)
        self._check_network(hidden_dim, depth)
        if sigma <= 0 or (sigma_start is not None and sigma_start < sigma) or anneal_updates < 1:
            raise ValueError(
                "DAE: expected 0 < sigma <= sigma_start and anneal_updates >= 1, got "
                f"sigma={sigma}, sigma_start={sigma_start}, anneal_updates={anneal_updates}."
            )
        self.residual, self.sigma, self.sigma_start = residual, sigma, sigma_start
        self.anneal_updates = anneal_updates
        self.learning_rate = learning_rate
        self.network = ResidualNetwork(dim, context_dim, hidden_dim, depth)
        self.weights = torch.nn.Parameter(self.network.initial(), requires_grad=False)

    def level(self) -> float:
        """The noise level of the next update, in units of the draws' standard deviation."""
        if self.sigma_start is None:
            return self.sigma
        done = min(1.0, self.updates / self.anneal_updates)
        return float(self.sigma_start * (self.sigma / self.sigma_start) ** done)

    @torch.no_grad()
    def update(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Tensor:
        """One optimizer step."""
        z, context = self._rows(samples, context, least=2)
        sigma = self.level() * _mean_std(z)
        u = torch.randn_like(z)
        x = z + sigma * u
        target, weight = (u, sigma) if self.residual else (-z, torch.ones_like(sigma))
        level = torch.zeros_like(x[..., :1])
        loss, self.weights.grad = self.network.loss(self.weights, x, level, context, target, weight)
        self.optimizer.step()
        self.weights.grad = None
        self.updates += 1
        return loss

    @torch.no_grad()
    def forward(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch dim"]:
        """The score of q smoothed with the current noise level."""
        z, context = self._rows(samples, context, least=0 if self.residual else 2)
        at = self._points(value, samples)
        out = self.network.field(self.weights, at, torch.zeros_like(at[..., :1]), context)
        if not self.residual:
            out = (out - at) / (self.level() * _mean_std(z)).square()
        return out.reshape(value.shape)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.weights], self.learning_rate, fused=True)


def _mean_std(z: Tensor) -> Tensor:
    """``z [S, B, D]`` to ``[B, 1]``: the standard deviation per context, mean over dimensions."""
    return z.std(0).mean(-1, keepdim=True).clamp_min(1e-12)
