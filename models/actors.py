# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Actors: policies over actions in :math:`(-1, 1)^D`, as distributions of what goes into a tanh.

All of them draw :math:`z = g(s, \epsilon)`, and the action is :math:`a = \tanh(z)`, so that

.. math:: \log \pi(a \mid s) = \log q(z \mid s) - \sum_i \log(1 - \tanh^2 z_i).

========================  ====  ====================================================================
:class:`GaussianActor`    2018  Haarnoja et al., `arXiv 1801.01290 <https://arxiv.org/abs/1801.01290>`_
:class:`FlowActor`        2019  Mazoure et al., `arXiv 1905.06893 <https://arxiv.org/abs/1905.06893>`_
========================  ====  ====================================================================

:mod:`models.implicit_actor` has the one without a density, of Lim et al. (2020, `arXiv 2006.05164
<https://arxiv.org/abs/2006.05164>`_).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.flows import import_zuko
from models.stack import ReLUStack

__all__ = ["LOG_SCALE", "FlowActor", "GaussianActor", "log_tanh_slope"]

#: Bounds of the logarithm of a scale, those of Haarnoja et al.
LOG_SCALE = (-20.0, 2.0)


class _LogTanhSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return 2 * (math.log(2) - z - F.softplus(-2 * z)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return z.tanh().mul_(-2).mul_(grad.unsqueeze(-1))


def log_tanh_slope(z: Tensor) -> Tensor:
    r"""``[..., D]`` to ``[...]``: :math:`\sum_i \log(1 - \tanh^2 z_i)`, without overflow.

    It equals :math:`\sum_i 2 (\log 2 - z_i - \mathrm{softplus}(-2 z_i))`; its gradient is
    :math:`-2 \tanh z`. Differentiable once.
    """
    slope: Tensor = _LogTanhSlope.apply(z)
    return slope


class GaussianActor(nn.Module):
    """A diagonal Gaussian before the tanh.

    :param int obs_dim: width of an observation, >= 1.
    :param int action_dim: width D of an action, >= 1.
    :param Sequence[int] hidden_dims: widths of the hidden layers, one at least.
    :param torch.dtype compute_dtype: as in :class:`~models.stack.ReLUStack`.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden_dims: Sequence[int] = (256, 256),
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        sizes = (obs_dim, *hidden_dims, 2 * action_dim)
        self.net = ReLUStack(1, sizes, compute_dtype=compute_dtype)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """``obs [*batch, obs_dim]`` to location and logarithm of the scale, ``[*batch, D]``."""
        loc, log_scale = self.net(obs)[0].chunk(2, -1)
        return loc, log_scale.clamp(*LOG_SCALE)

    def rsample_and_log_prob(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[*batch, D]`` and log q(z | s) ``[*batch]``, both differentiable."""
        loc, log_scale = self(obs)
        noise = torch.randn_like(loc)
        log_prob = -(0.5 * noise.square() + log_scale).sum(-1)
        z = torch.addcmul(loc, log_scale.exp(), noise)
        return z, log_prob - 0.5 * self.action_dim * math.log(2 * math.pi)

    def draw(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Draws z, ``[num_draws, *batch, D]``, differentiable."""
        loc, log_scale = self(obs)
        return loc + log_scale.exp() * torch.randn(
            (num_draws, *loc.shape), dtype=loc.dtype, device=loc.device
        )

    def center(self, obs: Tensor) -> Tensor:
        """The z without noise: the mode of q, ``[*batch, D]``."""
        return self(obs)[0]


class FlowActor(nn.Module):
    r"""A Gaussian before the tanh whose noise passes through a neural spline flow of zuko.

    :math:`z = \mu(s) + \sigma(s) \odot T(\epsilon; s)` with an inverse autoregressive T: a draw and
    its density take one pass. Mazoure et al. use radial and other flows of 2019 that do not depend
    on the state.

    :param int obs_dim: width of an observation, >= 1.
    :param int action_dim: width D of an action, >= 1.
    :param Sequence[int] hidden_dims: widths of the hidden layers, one at least.
    :param int transforms: number of spline transforms.
    :param int bins: pieces of each spline.
    :param int flow_dim: width of the networks of the splines, and of what they see of the state.
    :raises ModuleNotFoundError: if zuko is not installed.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden_dims: Sequence[int] = (256, 256),
        transforms: int = 1,
        bins: int = 8,
        flow_dim: int = 64,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        flows = import_zuko().flows
        self.action_dim = action_dim
        sizes = (obs_dim, *hidden_dims, 2 * action_dim + flow_dim)
        self.net = ReLUStack(1, sizes, compute_dtype=compute_dtype)
        splines = flows.NSF(
            action_dim,
            context=flow_dim,
            transforms=transforms,
            bins=bins,
            hidden_features=[flow_dim],
        )
        self.flow = flows.Flow(splines.transform.inv, splines.base)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, log scale ``[*batch, D]``, and what the splines see ``[*batch, flow_dim]``."""
        output = self.net(obs)[0]
        loc, log_scale = output[..., : 2 * self.action_dim].chunk(2, -1)
        return loc, log_scale.clamp(*LOG_SCALE), output[..., 2 * self.action_dim :]

    def rsample_and_log_prob(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[*batch, D]`` and log q(z | s) ``[*batch]``, both differentiable."""
        loc, log_scale, seen = self(obs)
        x, log_prob = self.flow(seen).rsample_and_log_prob()
        return torch.addcmul(loc, log_scale.exp(), x), log_prob - log_scale.sum(-1)

    def draw(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Draws z, ``[num_draws, *batch, D]``, differentiable."""
        loc, log_scale, seen = self(obs)
        return loc + log_scale.exp() * self.flow(seen).rsample((num_draws,))

    def center(self, obs: Tensor) -> Tensor:
        """The z for zero noise, ``[*batch, D]``."""
        loc, log_scale, seen = self(obs)
        return loc + log_scale.exp() * self.flow(seen).transform.inv(torch.zeros_like(loc))
