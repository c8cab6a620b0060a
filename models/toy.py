# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Toy densities: the mixture of 25 Gaussians on a grid, and the decoder used for it."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.networks import MLP

__all__ = ["EXPECTED_LOG_PROB", "VARIANCE", "NormalDecoder", "log_prob", "modes", "sample"]

#: Variance of each component, in each direction.
VARIANCE = 0.1

#: The highest expected log-likelihood that a model can reach: minus the entropy of the data, in
#: nats, by quadrature. The value usually quoted, ``-log(25) - log(2 * pi * e * VARIANCE)``
#: = -3.754, is that of components that do not overlap at all.
EXPECTED_LOG_PROB = -3.747


def modes() -> Tensor:
    """Returns the means of the 25 components.

    :returns: tensor of shape ``[25, 2]``: a 5 by 5 grid over ``[-4, 4]^2``, row by row.
    """
    axis = torch.linspace(-4.0, 4.0, 5)
    return torch.cartesian_prod(axis, axis)


def sample(num_points: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws points of the mixture.

    :param int num_points: number of points.
    :param torch.Generator generator: source of randomness; the global one by default.
    :returns: tensor of shape ``[num_points, 2]``.
    """
    component = torch.randint(25, (num_points,), generator=generator)
    noise = torch.randn(num_points, 2, generator=generator)
    return modes()[component] + math.sqrt(VARIANCE) * noise


def log_prob(value: Tensor) -> Tensor:
    """Evaluates the exact log-density of the mixture.

    :param Tensor value: points, ``[*batch, 2]``.
    :returns: log-density in nats, ``[*batch]``.
    """
    squared = (value.unsqueeze(-2) - modes().to(value)).pow(2).sum(-1)
    log_component = -squared / (2 * VARIANCE) - math.log(2 * math.pi * VARIANCE)
    return log_component.logsumexp(-1) - math.log(25)


class NormalDecoder(nn.Module):
    """Maps a latent to a diagonal Normal over the data, mean and scale both learned.

    :param int latent_dim: width of the latent.
    :param int data_dim: width of a data point.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param float input_scale: factor on the latent before the first layer. The cells of the latent
        space are far narrower than a standard deviation, and features of that scale find their
        borders sooner.
    :param float min_scale: lower limit of the scale; keeps the likelihood bounded.
    """

    def __init__(
        self,
        latent_dim: int = 2,
        data_dim: int = 2,
        *,
        hidden_dims: tuple[int, ...] = (256, 256),
        activation: type[nn.Module] = nn.ReLU,
        input_scale: float = 1.0,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        self.net = MLP((latent_dim, *hidden_dims, 2 * data_dim), activation=activation)
        self.input_scale = input_scale
        self.min_scale = min_scale

    def forward(self, latent: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.net(self.input_scale * latent).chunk(2, -1)
        scale = log_scale.exp() + self.min_scale
        return dist.Normal(loc, scale, validate_args=False).to_event(1)
