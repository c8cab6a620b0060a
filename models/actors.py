# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Actors: policies over actions in :math:`(-1, 1)^D`, as distributions of what goes into a tanh.

All of them draw :math:`z = g(s, \epsilon)`, and the action is :math:`a = \tanh(z)`, so that

.. math:: \log \pi(a \mid s) = \log q(z \mid s) - \sum_i \log(1 - \tanh^2 z_i).

========================  ====  ====================================================================
:class:`GaussianActor`    2018  Haarnoja et al., `arXiv 1801.01290 <https://arxiv.org/abs/1801.01290>`_
:class:`FlowActor`        2019  Mazoure et al., `arXiv 1905.06893 <https://arxiv.org/abs/1905.06893>`_
:class:`ImplicitActor`    2020  Lim et al., `arXiv 2006.05164 <https://arxiv.org/abs/2006.05164>`_
========================  ====  ====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution

from models.networks import MLP

__all__ = ["Encoded", "FlowActor", "GaussianActor", "ImplicitActor", "log_tanh_slope"]

#: Bounds of the logarithm of a scale, those of Haarnoja et al.
_LOG_SCALE = (-20.0, 2.0)


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
    """

    def __init__(
        self, obs_dim: int, action_dim: int, *, hidden_dims: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.net = MLP((obs_dim, *hidden_dims, 2 * action_dim), activation=nn.ReLU)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """``obs [*batch, obs_dim]`` to location and logarithm of the scale, ``[*batch, D]``."""
        loc, log_scale = self.net(obs).chunk(2, -1)
        return loc, log_scale.clamp(*_LOG_SCALE)

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
        return loc + log_scale.exp() * torch.randn((num_draws, *loc.shape)).to(loc)

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
    ) -> None:
        super().__init__()
        validate = Distribution._validate_args
        from zuko.flows import NSF, Flow

        # Importing zuko turns the validation of all distributions off.
        Distribution.set_default_validate_args(validate)
        self.action_dim = action_dim
        outputs = 2 * action_dim + flow_dim
        self.net = MLP((obs_dim, *hidden_dims, outputs), activation=nn.ReLU)
        splines = NSF(
            action_dim,
            context=flow_dim,
            transforms=transforms,
            bins=bins,
            hidden_features=[flow_dim],
        )
        self.flow = Flow(splines.transform.inv, splines.base)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, log scale ``[*batch, D]``, and what the splines see ``[*batch, flow_dim]``."""
        output = self.net(obs)
        loc, log_scale = output[..., : 2 * self.action_dim].chunk(2, -1)
        return loc, log_scale.clamp(*_LOG_SCALE), output[..., 2 * self.action_dim :]

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


class Encoded(NamedTuple):
    """What an :class:`ImplicitActor` makes of a state: all that does not depend on the noise."""

    loc: Tensor
    """Location ``[*batch, D]``."""
    log_scale: Tensor
    """Logarithm of the scale ``[*batch, D]``."""
    logits: Tensor
    """Log odds of a positive sign ``[*batch, D]``."""
    seen: Tensor
    """What the layers that see the noise are told of the state."""


class ImplicitActor(nn.Module):
    r"""A network of state and noise before the tanh: samples, no density.

    .. math:: z = \mu(s) + \sigma(s) \odot y, \quad
        y = \kappa b + \rho\, \epsilon_{1:D} + m(s, b, \epsilon)
        + t(s, b, \epsilon) \odot \epsilon'

    Only y is implicit: location and scale enter the density in closed form,
    :math:`\log q(z) = \log q(y) - \sum_i \log \sigma_i`, and leave a y about as wide as 1
    whatever the policy's width. The state is encoded once for any number of draws; the layers that
    see the noise are narrower. :math:`\epsilon'`, as wide as the action, keeps the draws off a
    manifold: without it a policy in the plane collapses onto a curve.

    b is a random sign for each action, positive with probability :math:`p_i(s)`. A continuous map
    of Gaussian noise alone separates modes only by a steep slope, and shifts mass from one to the
    other only through the few draws in between: with the exact score in place of an estimate, its
    policies stayed .3 to .7 nats from one with two modes, or dropped one. By the signs, modes are
    apart without a slope, and their weights are the :math:`p_i`, which have a likelihood-ratio
    gradient. They leave nothing that a continuous map has: the network sees them like other noise.

    :param int obs_dim: width of an observation, >= 1.
    :param int action_dim: width D of an action, >= 1.
    :param Sequence[int] hidden_dims: widths of the layers that encode the state, one at least.
    :param int noise_dim: width of :math:`\epsilon`, >= D.
    :param Sequence[int] noise_hidden_dims: widths of the layers that see the noise, one or more.
    :param float noise_scale: factor on the noise before the first layer, > 0: above 1 the map
        starts with the steep slopes that separated modes need.
    :param float spread: :math:`\sigma` before training, > 0.
    :param float sign_scale: :math:`\kappa`, in [0, 0.9]; :math:`\rho^2 = 0.91 - \kappa^2` makes
        y start about as wide as 1.
    :param float min_scale: lower bound of t, > 0. Thinner than that, no ridge forms for the score
        network to resolve.
    """

    #: Bound of the log odds of a sign: each keeps a share of 1.8 %, so that none is lost for good.
    MAX_LOGIT = 4.0

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden_dims: Sequence[int] = (256, 256),
        noise_dim: int = 10,
        noise_hidden_dims: Sequence[int] = (64, 64),
        noise_scale: float = 1.0,
        spread: float = 0.6,
        sign_scale: float = 0.6,
        min_scale: float = 0.05,
    ) -> None:
        super().__init__()
        if noise_dim < action_dim or not noise_hidden_dims:
            raise ValueError(
                f"ImplicitActor: expected noise_dim >= action_dim = {action_dim} and one layer "
                f"that sees the noise, got {noise_dim} and {tuple(noise_hidden_dims)}."
            )
        if not 0 <= sign_scale <= 0.9:
            raise ValueError(f"ImplicitActor: expected sign_scale in [0, 0.9], got {sign_scale}.")
        self.action_dim, self.noise_dim = action_dim, noise_dim
        self.noise_scale, self.min_scale = noise_scale, min_scale
        self.sign_scale, self.base_scale = sign_scale, math.sqrt(0.91 - sign_scale**2)
        first = noise_hidden_dims[0]
        self.trunk = MLP((obs_dim, *hidden_dims), activation=nn.ReLU, activate_output=True)
        self.head = nn.Linear(hidden_dims[-1], 3 * action_dim + first)
        self.of_noise = nn.Linear(noise_dim + action_dim, first, bias=False)
        self.net = MLP((*noise_hidden_dims, 2 * action_dim), activation=nn.ReLU)
        with torch.no_grad():
            _, scale, odds, _ = self.head.bias.split(self._widths)
            scale.fill_(math.log(spread))
            odds.zero_()
            self.head.weight.split(self._widths)[2].zero_()
            loc, raw = self.net.last.bias.view(2, action_dim)
            loc.zero_()
            raw.fill_(math.log(math.expm1(0.25)))

    @property
    def _widths(self) -> list[int]:
        return [self.action_dim] * 3 + [self.of_noise.out_features]

    def encode(self, obs: Tensor) -> Encoded:
        """``obs [*batch, obs_dim]`` to what does not depend on the noise."""
        loc, log_scale, odds, seen = self.head(self.trunk(obs)).split(self._widths, -1)
        logits = self.MAX_LOGIT * (odds / self.MAX_LOGIT).tanh()
        return Encoded(loc, log_scale.clamp(*_LOG_SCALE), logits, seen)

    def deviate(self, encoded: Encoded, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws y ``[n, *batch, D]``, and the log-probability of its signs ``[n, *batch]``.

        :param noise: ``[n, *batch, noise_dim + 2 D]``, as from :meth:`noise`.
        """
        noise, choice, last = noise.split([self.noise_dim, self.action_dim, self.action_dim], -1)
        sign = torch.where(choice + encoded.logits.detach() >= 0, 1.0, -1.0).to(noise)
        inputs = torch.cat([noise, sign], -1)
        hidden = torch.relu(encoded.seen + self.noise_scale * self.of_noise(inputs))
        center, raw = self.net(hidden).chunk(2, -1)
        center = center + self.sign_scale * sign + self.base_scale * noise[..., : self.action_dim]
        y = torch.addcmul(center, F.softplus(raw) + self.min_scale, last)
        return y, F.logsigmoid(sign * encoded.logits).sum(-1)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """``obs [*batch, obs_dim]`` and noise as from :meth:`noise` to ``[n, *batch, D]``."""
        encoded = self.encode(obs)
        return encoded.loc + encoded.log_scale.exp() * self.deviate(encoded, noise)[0]

    def noise(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Fresh noise ``[num_draws, *batch, noise_dim + 2 D]`` for :meth:`forward`: normal, but for
        the D columns after the first ``noise_dim``, a logistic variable for each sign.
        """
        shape = (num_draws, *obs.shape[:-1], self.noise_dim + 2 * self.action_dim)
        noise = torch.randn(shape, dtype=obs.dtype, device=obs.device)
        choice = noise[..., self.noise_dim : -self.action_dim]
        choice.copy_(torch.rand_like(choice).logit_(1e-7))
        return noise

    def draw(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Draws z, ``[num_draws, *batch, D]``, differentiable."""
        return self(obs, self.noise(obs, num_draws))

    def center(self, obs: Tensor) -> Tensor:
        """The z for the more probable signs and no other noise, ``[*batch, D]``."""
        return self(obs, torch.zeros_like(self.noise(obs)))[0]
