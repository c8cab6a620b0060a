# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""AR-DAE in the paper's own setting, to be compared with."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_ardae.score.trained import TrainedEstimator

__all__ = ["PaperARDAE"]


class PaperARDAE(TrainedEstimator):
    r"""The authors' network, input scaling, noise and optimizer.

    An MLP of :math:`(b (z - \bar z), c, \sigma)`, where :math:`\bar z` is the sampler's output for
    zero noise, with one optimizer step on all draws. :math:`\sigma` has the scale
    :math:`\delta` times the mean over dimensions of the per-context standard deviation. The runs of
    the paper draw 625 (MNIST) or 256 (25 Gaussians) samples per context.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param parametrization: ``"energy"`` (the score is minus the gradient of a scalar) or
        ``"residual"``.
    :param input_scale: b, > 0.
    :param hidden_dim: width of the network, >= 1.
    :param depth: hidden layers of the network, >= 1.
    :param delta: relative noise scale, > 0.
    :param learning_rate: RMSprop's step size.
    :param momentum: RMSprop's momentum.
    :raises ValueError: for a parameter out of range, or if ``center`` is missing.

    Reference: Lim et al. 2020, sec. 3.2, app. C and D, and the authors' run scripts.
    """

    needs_center = True
    needs_samples = False

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        parametrization: Literal["energy", "residual"] = "energy",
        input_scale: float = 1e4,
        hidden_dim: int = 256,
        depth: int = 3,
        delta: float = 0.1,
        learning_rate: float = 1e-4,
        momentum: float = 0.5,
    ) -> None:
        super().__init__(dim, context_dim)
        self._check_network(hidden_dim, depth)
        if parametrization not in ("energy", "residual"):
            raise ValueError(
                "PaperARDAE: expected parametrization 'energy' or 'residual', got "
                f"{parametrization!r}."
            )
        if input_scale <= 0 or delta <= 0:
            raise ValueError(
                f"PaperARDAE: expected input_scale and delta > 0, got {input_scale} and {delta}."
            )
        self.parametrization, self.input_scale, self.delta = parametrization, input_scale, delta
        self.learning_rate, self.momentum = learning_rate, momentum
        widths = [dim + context_dim + 1] + [hidden_dim] * depth
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.Softplus()]
        layers.append(nn.Linear(hidden_dim, 1 if parametrization == "energy" else dim))
        self.network = nn.Sequential(*layers)

    @classmethod
    def gaussians(cls, dim: int, context_dim: int = 0) -> PaperARDAE:
        """The setting of the 25 Gaussians; use 256 draws per context."""
        return cls(dim, context_dim)

    @classmethod
    def mnist(cls, dim: int, context_dim: int = 0) -> PaperARDAE:
        """The setting of the MLP and Conv runs on MNIST; use 625 draws per context."""
        return cls(dim, context_dim, depth=5)

    @classmethod
    def resconv(cls, dim: int, context_dim: int = 0) -> PaperARDAE:
        """The setting of the ResConv runs; use 625 draws per context and two updates."""
        return cls(
            dim,
            context_dim,
            parametrization="residual",
            input_scale=100.0,
            hidden_dim=512,
            depth=5,
            momentum=0.9,
        )

    def update(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Tensor:
        """One optimizer step on all draws."""
        z, context = self._rows(samples, context, least=2)
        x = self._scaled(z, center)
        spread = x.std(0).mean(-1, keepdim=True)
        sigma = self.delta * spread * torch.randn_like(x[..., :1])
        u = torch.randn_like(x)
        with torch.enable_grad():
            field = self._field(x + sigma * u, sigma, context)
            loss = (u + sigma * field).square().sum(-1).mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return loss.detach()

    @torch.no_grad()
    def forward(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch dim"]:
        """The score at ``value``: the network at sigma = 0."""
        _, context = self._rows(samples, context)
        x = self._scaled(self._points(value, samples), center)
        score = self.input_scale * self._field(x, torch.zeros_like(x[..., :1]), context)
        return score.reshape(value.shape)

    def _scaled(self, z: Tensor, center: Tensor | None) -> Tensor:
        if center is None:
            raise ValueError(
                "PaperARDAE: expected center [*batch, dim], the sampler's output for zero noise, "
                "got none."
            )
        return self.input_scale * (z - center.detach().reshape(-1, self.dim))

    def _field(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        context = context.expand(len(x), -1, -1)
        if self.parametrization == "residual":
            return self.network(torch.cat([x, context, sigma], -1))
        training = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if x.is_inference():  # which autograd would not take
                x, sigma, context = x.clone(), sigma.clone(), context.clone()
            x = x.detach().requires_grad_()
            energy = self.network(torch.cat([x, context, sigma], -1)).sum()
            (gradient,) = torch.autograd.grad(energy, x, create_graph=training)
        return -gradient

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(
            self.network.parameters(), self.learning_rate, momentum=self.momentum
        )
