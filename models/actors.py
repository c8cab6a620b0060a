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
from models.stack import ReLUStack

__all__ = [
    "Encoded",
    "FlowActor",
    "GaussianActor",
    "ImplicitActor",
    "SignPosterior",
    "log_prob_of_signs",
    "log_tanh_slope",
]

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
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        validate = Distribution._validate_args
        from zuko.flows import NSF, Flow

        # Importing zuko turns the validation of all distributions off.
        Distribution.set_default_validate_args(validate)
        self.action_dim = action_dim
        sizes = (obs_dim, *hidden_dims, 2 * action_dim + flow_dim)
        self.net = ReLUStack(1, sizes, compute_dtype=compute_dtype)
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
        output = self.net(obs)[0]
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
    """What an :class:`ImplicitActor` makes of a state: all that does not depend on chance."""

    loc: Tensor
    """Location ``[*batch, D]``."""
    log_scale: Tensor
    """Logarithm of the scale ``[*batch, D]``."""
    logits: Tensor
    """Log odds of each sign's being positive, ``[*batch, D]``, ..."""
    pairs: Tensor
    """... and what each sign adds to those of the later ones, ``[*batch, D (D - 1) / 2]``."""
    seen: Tensor
    """What the layers that see signs and noise are told of the state, ``[*batch, S]``."""


class ImplicitActor(nn.Module):
    r"""A network of state, random signs and noise before the tanh: samples, no density.

    .. math::
        z &= \mu(s) + \sigma(s) \odot [ \kappa b + \mu'(s, b) + \sigma'(s, b) \odot y ], \\
        y &= \rho\, \epsilon_{1:D} + m(s, b, \epsilon) + t(s, b, \epsilon) \odot \epsilon'

    b has a random sign for each action. Its distribution is a network's too, the log odds of a sign
    being linear in those before it: bounded,
    :math:`\mathrm{logit}\, p_i = l_i(s) + \sum_{j < i} B_{ij}(s)\, b_j`. A continuous map of
    Gaussian noise alone separates modes only by a steep slope, and shifts mass from one to the
    other only through the few draws in between: with the exact score in place of an estimate, its
    policies stayed .3 to .7 nats from one with two modes, or dropped one. By the signs, modes are
    apart without a slope, and their weights have a likelihood-ratio gradient.

    Only y is implicit. Given state and signs, location and scale enter the density in closed form,
    and leave a y about as wide as 1 whatever the policy's width. The state is encoded once for any
    number of draws; the layers that see the noise are narrower. :math:`\epsilon'`, as wide as the
    action, keeps the draws off a manifold: without it a policy in the plane collapses onto a curve.

    :param int obs_dim: width of an observation, >= 1.
    :param int action_dim: width D of an action, >= 1.
    :param Sequence[int] hidden_dims: widths of the layers that encode the state, one at least.
    :param int noise_dim: width of :math:`\epsilon`, >= D.
    :param Sequence[int] noise_hidden_dims: widths of the layers that see the noise, one or more.
    :param float noise_scale: factor on the noise before the first layer, > 0: above 1 the map
        starts with the steep slopes that separated modes need.
    :param float spread: :math:`\sigma` before training, > 0.
    :param float sign_scale: :math:`\kappa`, in [0, 0.9]; :math:`\sigma'` starts at
        :math:`(1 - \kappa^2)^{1/2}`, so that z starts about as wide as :math:`\sigma`. With 0.6
        both modes could end under one value of a sign; from 0.85 on they start apart enough.
    :param float min_scale: lower bound of t, > 0. Thinner than that, no ridge forms for the score
        network to resolve.
    :param torch.dtype compute_dtype: as in :class:`~models.stack.ReLUStack`.
    """

    #: Bound of the log odds of a sign: each keeps a share of 1.8 %, so that none is lost for good.
    MAX_LOGIT = 4.0

    #: t before training. :math:`\rho` makes y start about as wide as 1.
    FIRST_SCALE = 0.5

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden_dims: Sequence[int] = (256, 256),
        noise_dim: int = 10,
        noise_hidden_dims: Sequence[int] = (64, 64),
        noise_scale: float = 1.0,
        spread: float = 1.0,
        sign_scale: float = 0.85,
        min_scale: float = 0.3,
        compute_dtype: torch.dtype | None = None,
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
        self.sign_scale, self.base_scale = sign_scale, math.sqrt(1 - self.FIRST_SCALE**2)
        self.seen_dim = noise_hidden_dims[0]
        self.pair_dim = action_dim * (action_dim - 1) // 2
        sizes = (obs_dim, *hidden_dims, sum(self._widths))
        self.trunk = ReLUStack(1, sizes, compute_dtype=compute_dtype)
        self.of_sign = nn.Linear(action_dim, self.seen_dim, bias=False)
        self.side = nn.Linear(self.seen_dim, 2 * action_dim)
        self.of_noise = nn.Linear(noise_dim + action_dim, self.seen_dim, bias=False)
        self.net = MLP((*noise_hidden_dims, 2 * action_dim), activation=nn.ReLU)
        with torch.no_grad():
            _, scale, *odds, _ = self.trunk.output_bias.split(self._widths, -1)
            scale.fill_(math.log(spread))
            for one in (*odds, *self.trunk.output_weight.split(self._widths, -1)[2:4]):
                one.zero_()
            self.side.weight.zero_()
            loc, scale = self.side.bias.view(2, action_dim)
            loc.zero_()
            scale.fill_(0.5 * math.log1p(-(sign_scale**2)))
            loc, raw = self.net.last.bias.view(2, action_dim)
            loc.zero_()
            raw.fill_(math.log(math.expm1(max(self.FIRST_SCALE - min_scale, 1e-3))))

    @property
    def _widths(self) -> list[int]:
        return [self.action_dim] * 3 + [self.pair_dim, self.seen_dim]

    def encode(self, obs: Tensor) -> Encoded:
        """``obs [*batch, obs_dim]`` to what does not depend on chance."""
        loc, log_scale, logits, pairs, seen = self.trunk(obs)[0].split(self._widths, -1)
        return Encoded(loc, log_scale.clamp(*_LOG_SCALE), logits, pairs, seen)

    def choose(self, encoded: Encoded, num_draws: int = 1) -> Tensor:
        """Random signs ``[num_draws, *batch, D]``."""
        logits = encoded.logits
        shape = num_draws, *logits.shape
        return self._signs(encoded, torch.rand(shape, dtype=logits.dtype, device=logits.device))

    @torch.no_grad()
    def _signs(self, encoded: Encoded, uniform: Tensor) -> Tensor:
        """Signs by inversion of their distribution."""
        level = uniform.logit().unbind(-1)
        logits, pairs = encoded.logits.unbind(-1), encoded.pairs.unbind(-1)
        found: list[Tensor] = []
        for i in range(self.action_dim):
            odds = logits[i]
            for j, sign in enumerate(found):
                odds = torch.addcmul(odds, pairs[i * (i - 1) // 2 + j], sign)
            odds = _bounded(odds, self.MAX_LOGIT)
            found.append(torch.where(level[i] <= odds, 1.0, -1.0).to(logits[i]))
        return torch.stack(found, -1)

    def log_odds(self, encoded: Encoded, sign: Tensor) -> Tensor:
        """Of each sign's being positive, given those before it, ``[..., *batch, D]``."""
        return _bounded(_with_pairs(encoded.logits, encoded.pairs, sign), self.MAX_LOGIT)

    def place(self, encoded: Encoded, sign: Tensor) -> tuple[Tensor, Tensor]:
        r"""Location of z given the signs ``[..., *batch, D]``, and logarithm of its scale, in units
        of what the state gives: :math:`\kappa b + \mu'` and :math:`\log \sigma'`.
        """
        hidden = torch.relu(encoded.seen + self.of_sign(sign))
        loc, log_scale = self.side(hidden).chunk(2, -1)
        return loc + self.sign_scale * sign, log_scale.clamp(*_LOG_SCALE)

    def deviate(self, encoded: Encoded, sign: Tensor, noise: Tensor) -> Tensor:
        """Draws y ``[n, *batch, D]``.

        :param sign: ``[n or 1, *batch, D]``.
        :param noise: ``[n, *batch, noise_dim + D]``, as from :meth:`noise`.
        """
        noise, last = noise.split([self.noise_dim, self.action_dim], -1)
        inputs = torch.cat([noise, sign.expand_as(last)], -1)
        hidden = torch.relu(encoded.seen + self.noise_scale * self.of_noise(inputs))
        center, raw = self.net(hidden).chunk(2, -1)
        center = center + self.base_scale * noise[..., : self.action_dim]
        return torch.addcmul(center, F.softplus(raw) + self.min_scale, last)

    def forward(self, obs: Tensor, sign: Tensor, noise: Tensor) -> Tensor:
        """``obs [*batch, obs_dim]``, signs and noise as for :meth:`deviate`: ``[n, *batch, D]``."""
        encoded = self.encode(obs)
        loc, log_scale = self.place(encoded, sign)
        y = self.deviate(encoded, sign, noise)
        return encoded.loc + encoded.log_scale.exp() * (loc + log_scale.exp() * y)

    def noise(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Fresh normal noise ``[num_draws, *batch, noise_dim + D]`` for :meth:`deviate`."""
        shape = (num_draws, *obs.shape[:-1], self.noise_dim + self.action_dim)
        return torch.randn(shape, dtype=obs.dtype, device=obs.device)

    def draw(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Draws z, ``[num_draws, *batch, D]``, differentiable."""
        sign = self.choose(self.encode(obs), num_draws)
        return self(obs, sign, self.noise(obs, num_draws))

    def center(self, obs: Tensor) -> Tensor:
        """The z for signs each of which is the more probable one given those before it, and no
        other noise, ``[*batch, D]``.
        """
        encoded = self.encode(obs)
        sign = self._signs(encoded, torch.full_like(encoded.logits, 0.5).unsqueeze(0))
        return self(obs, sign, torch.zeros_like(self.noise(obs)))[0]


def log_prob_of_signs(sign: Tensor, log_odds: Tensor) -> Tensor:
    """Signs ``[..., D]`` and the log odds of each one's being positive to ``[...]``."""
    return F.logsigmoid(sign * log_odds).sum(-1)


def _bounded(odds: Tensor, bound: float) -> Tensor:
    return bound * (odds / bound).tanh()


def _with_pairs(odds: Tensor, pairs: Tensor, sign: Tensor) -> Tensor:
    """``odds [..., D]`` of signs, and what each adds to later ones, ``pairs [..., P]``."""
    dim = odds.shape[-1]
    if dim == 1:
        return odds
    later, earlier = torch.tril_indices(dim, dim, -1, device=odds.device)
    return odds.expand_as(sign).index_add(-1, later, pairs * sign[..., earlier])


class SignPosterior(nn.Module):
    r"""r(b | u, s): what a draw :math:`u = (z - \mu) / \sigma` of an :class:`ImplicitActor` tells
    of the signs that it came from. The log odds of a sign given those before it are

    .. math:: \mathrm{logit}\, p_i + w_i u_i + f_i(u, s) + \sum_{j < i} A_{ij}(u, s)\, b_j,

    the prior's and, learned, the evidence. It starts with what u would tell if it were normal.

    :param ImplicitActor actor: the actor.
    :param int hidden_dim: width of the network, >= 1.
    """

    def __init__(self, actor: ImplicitActor, *, hidden_dim: int = 64) -> None:
        super().__init__()
        dim = actor.action_dim
        self.of_state = nn.Linear(actor.seen_dim, hidden_dim)
        self.of_draw = nn.Linear(dim, hidden_dim, bias=False)
        self.net = MLP((hidden_dim, hidden_dim, dim * (dim + 1) // 2), activation=nn.SiLU)
        nn.init.zeros_(self.net.last.weight)
        nn.init.zeros_(self.net.last.bias)
        slope = 2 * actor.sign_scale / (1 - actor.sign_scale**2)
        self.slope = nn.Parameter(torch.full((dim,), slope))

    def forward(self, seen: Tensor, prior: Tensor, u: Tensor, sign: Tensor) -> Tensor:
        """Log r ``[n, *batch]`` of signs.

        :param seen: of the actor's ``Encoded``.
        :param prior: log odds of the signs, ``[n or 1, *batch, D]``.
        :param u: ``[n, *batch, D]``.
        :param sign: as ``prior``.
        """
        dim = u.shape[-1]
        sign = sign.expand_as(u)
        found = self.net(F.silu(self.of_state(seen) + self.of_draw(u)))
        odds = prior + self.slope * u + found[..., :dim]
        return log_prob_of_signs(sign, _with_pairs(odds, found[..., dim:], sign))
