# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of one global latent vector: implicit, normalizing flow, Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.flows import import_zuko
from models.networks import MLP
from pyro_ardae import Implicit

__all__ = ["FlowPosterior", "GaussianPosterior", "ImplicitPosterior"]


class ImplicitPosterior(nn.Module):
    r"""A Gaussian whose mean and factor are networks of further noise, then Langevin steps.

    .. math::
        z_0 &= s\, \epsilon_{1:D} + \mu(c\, \epsilon) + (t I + L(c\, \epsilon))\, \epsilon_0 \\
        z_{k + 1} &= z_k - a\, \beta \nabla U(z_k) + \sqrt{2 a}\, \epsilon_{k + 1}

    The network distributes the mass, the steps mend its shape. Neither part has a density: a guide
    that need only be sampled may contain the model's own gradient. The steps are unadjusted, so a
    has to be small; they have no parameters, and in the gradient their derivative is taken for
    the identity: the network's draw is pulled to where the density is too low after the steps. This
    is not the gradient of the divergence, but vanishes with it. It takes no second derivatives, and
    no slope that shrinks by a factor with each step across a ridge and grows between two.

    :param int latent_dim: width D of the latent.
    :param int noise_dim: width of the noise :math:`\epsilon`, D at least.
    :param Sequence[int] hidden_dims: widths of the hidden layers.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param float spread: s, the scale of the draws before training.
    :param float width: t, the scale of the Gaussian before training.
    :param float input_scale: c. Above 1 the network starts with the higher frequencies that narrow
        and winding densities take.
    :param Callable slope: the gradient of U, ``[*, D]`` to ``[*, D]``.
    :param int langevin_steps: number of steps; none without a slope.
    :param float step_size: a.
    :raises ValueError: if the noise is too narrow, or steps are asked for without a slope.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        noise_dim: int,
        hidden_dims: Sequence[int],
        activation: type[nn.Module] = nn.SiLU,
        spread: float = 1.0,
        width: float = 0.5,
        input_scale: float = 1.0,
        slope: Callable[[Tensor], Tensor] | None = None,
        langevin_steps: int = 0,
        step_size: float = 0.01,
    ) -> None:
        super().__init__()
        if noise_dim < latent_dim:
            raise ValueError(
                f"noise_dim: expected at least latent_dim = {latent_dim}, got {noise_dim}"
            )
        if langevin_steps and slope is None:
            raise ValueError(f"langevin_steps: expected 0 without a slope, got {langevin_steps}")
        self.latent_dim = latent_dim
        self.noise_dim = noise_dim
        self.spread, self.width, self.input_scale = spread, width, input_scale
        outputs = latent_dim * (1 + latent_dim)
        self.net = MLP((noise_dim, *hidden_dims, outputs), activation=activation)
        self.slope, self.langevin_steps, self.step_size = slope, langevin_steps, step_size

    def forward(self, beta: float = 1.0) -> dist.TorchDistribution:
        """The guide, whose steps lead to the density exp(-beta U)."""
        noise_dim = self.noise_dim + self.latent_dim * (1 + self.langevin_steps)
        zero = next(self.net.parameters()).new_zeros(noise_dim)
        noise = dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(1)
        return Implicit(partial(self._transform, beta=beta), noise, None, (self.latent_dim,))

    def _transform(self, noise: Tensor, beta: float = 1.0) -> Tensor:
        noise, first, *rest = noise.split(
            [self.noise_dim, *[self.latent_dim] * (1 + self.langevin_steps)], -1
        )
        start = self._start(noise, first)
        z = start.detach()
        for noise in rest:
            z = z - self.step_size * beta * self.slope(z) + (2 * self.step_size) ** 0.5 * noise
        return z + (start - start.detach())

    def _start(self, noise: Tensor, last: Tensor) -> Tensor:
        output = self.net(self.input_scale * noise)
        loc, factor = output.split([self.latent_dim, self.latent_dim**2], -1)
        factor = factor.unflatten(-1, (self.latent_dim, self.latent_dim))
        turned = (factor * last.unsqueeze(-2)).sum(-1)
        return self.spread * noise[..., : self.latent_dim] + loc + self.width * last + turned


class FlowPosterior(nn.Module):
    """A neural spline flow of zuko, in the direction that is fast to sample.

    Its splines map ``[-5, 5]`` to itself and leave the rest alone, so they work in units of
    ``spread``.

    :param int latent_dim: width of the latent.
    :param int transforms: number of autoregressive transforms.
    :param Sequence[int] hidden_dims: widths of the hidden layers of each.
    :param int bins: pieces of each spline.
    :param float spread: the scale of the draws before training.
    :param Tensor loc: their location, ``[latent_dim]``; 0 by default.
    :raises ModuleNotFoundError: if zuko is not installed.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        transforms: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        bins: int = 8,
        spread: float = 1.0,
        loc: Tensor | None = None,
    ) -> None:
        super().__init__()
        zuko = import_zuko()
        shift = torch.zeros(latent_dim) if loc is None else -loc.detach() / spread
        unit = zuko.lazy.UnconditionalTransform(
            zuko.transforms.MonotonicAffineTransform,
            shift=shift,
            scale=torch.full((latent_dim,), -math.log(spread)),
        )
        splines = zuko.flows.NSF(
            latent_dim, transforms=transforms, hidden_features=[*hidden_dims], bins=bins
        )
        # Inverse autoregressive: a draw takes one pass per transform, not one per dimension.
        transform = zuko.lazy.LazyComposedTransform(unit, splines.transform.inv)
        self.flow = zuko.flows.Flow(transform, splines.base)

    def forward(self) -> dist.TorchDistribution:
        from pyro.contrib.zuko import ZukoToPyro

        return ZukoToPyro(self.flow())


class GaussianPosterior(nn.Module):
    """A Gaussian with full covariance.

    :param int latent_dim: width of the latent.
    :param float spread: standard deviation before training.
    """

    def __init__(self, latent_dim: int, *, spread: float = 1.0) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_diagonal = nn.Parameter(torch.full((latent_dim,), math.log(spread)))
        self.below = nn.Parameter(torch.zeros(latent_dim, latent_dim))

    def forward(self) -> dist.TorchDistribution:
        factor = self.below.tril(-1) + self.log_diagonal.exp().diag()
        return dist.MultivariateNormal(self.loc, scale_tril=factor, validate_args=False)
