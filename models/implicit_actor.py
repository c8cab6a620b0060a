# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The implicit actor, and what its draws tell of the part that they came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.actors import LOG_SCALE
from models.networks import MLP
from models.stack import ReLUStack

__all__ = ["Encoded", "ImplicitActor", "PartPosterior"]


class Encoded(NamedTuple):
    """What an :class:`ImplicitActor` makes of a state: all that does not depend on chance."""

    loc: Tensor
    """Location ``[*batch, D]``."""
    log_scale: Tensor
    """Logarithm of the scale ``[*batch, D]``."""
    log_weights: Tensor
    """Log-probabilities of the parts ``[*batch, C]``."""
    seen: Tensor
    """What the layers that see part and noise are told of the state, ``[*batch, S]``."""


class ImplicitActor(nn.Module):
    r"""A network of state, a random part and noise before the tanh: samples, no density.

    .. math::
        z &= \mu(s) + \sigma(s) \odot [ S b_c + \mu'(s, b_c) + \sigma'(s, b_c) \odot y ], \\
        y &= \rho\, \epsilon_{1:D} + m(s, b_c, \epsilon) + t(s, b_c, \epsilon) \odot \epsilon'

    c is one of :math:`C = 2^K` parts, drawn with probabilities that are a network of the state, and
    :math:`b_c \in \{-1, 1\}^K` its number in binary. A continuous map of Gaussian noise alone
    separates modes only by a steep slope, and shifts mass from one to the other only through the
    few draws in between: with the exact score in place of an estimate, its policies stayed .3 to
    .7 nats from one with two modes, or dropped one. By parts, modes are apart without a slope.
    There are more parts than modes as a rule: with as many, two that settle in one mode leave
    another empty.

    Only y is implicit. Given state and part, location and scale enter the density in closed form,
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
    :param float part_scale: length :math:`\kappa` of the rows of S, in [0, 0.9];
        :math:`\sigma'` starts at :math:`(1 - \kappa^2)^{1/2}`, so that z starts about as wide as
        :math:`\sigma`. From 0.85 on, the parts start apart enough to take a mode each.
    :param int part_bits: K, >= 1; by default two more than actions, 6 at most.
    :param float min_scale: lower bound of t, > 0. Thinner than that, no ridge forms for the score
        network to resolve.
    :param torch.dtype compute_dtype: as in :class:`~models.stack.ReLUStack`.
    """

    #: Bound of the logits of the parts: the least likely has e^-8 of the likeliest's share or more.
    MAX_LOGIT = 4.0

    #: Share in the squared length of a row of S of the bits beyond one for each action.
    EXTRA_SHARE = 0.4

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
        part_scale: float = 0.85,
        part_bits: int | None = None,
        min_scale: float = 0.3,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if noise_dim < action_dim or not noise_hidden_dims:
            raise ValueError(
                f"ImplicitActor: expected noise_dim >= action_dim = {action_dim} and one layer "
                f"that sees the noise, got {noise_dim} and {tuple(noise_hidden_dims)}."
            )
        if not 0 <= part_scale <= 0.9:
            raise ValueError(f"ImplicitActor: expected part_scale in [0, 0.9], got {part_scale}.")
        bits = min(action_dim + 2, 6) if part_bits is None else part_bits
        if bits < 1:
            raise ValueError(f"ImplicitActor: expected part_bits >= 1, got {part_bits}.")
        self.action_dim, self.noise_dim = action_dim, noise_dim
        self.noise_scale, self.min_scale = noise_scale, min_scale
        self.part_scale, self.base_scale = part_scale, math.sqrt(1 - self.FIRST_SCALE**2)
        self.seen_dim = noise_hidden_dims[0]
        self.num_bits, self.num_parts = bits, 2**bits
        sizes = (obs_dim, *hidden_dims, sum(self._widths))
        self.trunk = ReLUStack(1, sizes, compute_dtype=compute_dtype)
        number = torch.arange(self.num_parts).unsqueeze(-1)
        self.register_buffer("codes", 1.0 - 2 * (number >> torch.arange(bits) & 1))
        self.register_buffer("spots", part_scale * self._directions())
        self.of_part = nn.Linear(bits, self.seen_dim, bias=False)
        self.side = nn.Linear(self.seen_dim, 2 * action_dim)
        self.of_noise = nn.Linear(noise_dim + bits, self.seen_dim, bias=False)
        self.net = MLP((*noise_hidden_dims, 2 * action_dim), activation=nn.ReLU)
        with torch.no_grad():
            weight, bias = self.trunk.layers[-2:]
            _, scale, logits, _ = bias.split(self._widths, -1)
            scale.fill_(math.log(spread))
            logits.zero_()
            weight.split(self._widths, -1)[2].zero_()
            self.side.weight.zero_()
            loc, scale = self.side.bias.view(2, action_dim)
            loc.zero_()
            scale.fill_(0.5 * math.log1p(-(part_scale**2)))
            loc, raw = self.net.last.bias.view(2, action_dim)
            loc.zero_()
            raw.fill_(math.log(math.expm1(max(self.FIRST_SCALE - min_scale, 1e-3))))

    @property
    def _widths(self) -> list[int]:
        return [self.action_dim] * 2 + [self.num_parts, self.seen_dim]

    def _directions(self) -> Tensor:
        """What each bit adds to the location, ``[K, D]``, columns of length 1. A bit for each
        action moves it alone; further ones move all, along rows of a Hadamard matrix. With fewer
        bits than actions, several share one.
        """
        dim, bits = self.action_dim, self.num_bits
        action = torch.arange(dim)
        own = (action % bits == torch.arange(bits).unsqueeze(-1)).to(torch.get_default_dtype())
        extra = max(bits - dim, 0)
        if not extra:
            return own
        # Its signs are the parity of the common bits of row and column.
        common = torch.arange(extra).unsqueeze(-1) & action
        odd = sum(common >> place & 1 for place in range(16)) % 2
        own[-extra:] = (1 - 2 * odd) * math.sqrt(self.EXTRA_SHARE / extra)
        own[:-extra] *= math.sqrt(1 - self.EXTRA_SHARE)
        return own

    def encode(self, obs: Tensor) -> Encoded:
        """``obs [*batch, obs_dim]`` to what does not depend on chance."""
        loc, log_scale, logits, seen = self.trunk(obs)[0].split(self._widths, -1)
        log_weights = _bounded(logits, self.MAX_LOGIT).log_softmax(-1)
        return Encoded(loc, log_scale.clamp(*LOG_SCALE), log_weights, seen)

    @torch.no_grad()
    def choose(self, encoded: Encoded, num_draws: int = 1) -> Tensor:
        """Random parts ``[num_draws, *batch]``, by inversion of their distribution."""
        below = encoded.log_weights.exp().cumsum(-1)
        level = torch.rand((num_draws, *below.shape[:-1]), dtype=below.dtype, device=below.device)
        level = level.movedim(0, -1).contiguous() * below[..., -1:]
        part = torch.searchsorted(below, level).movedim(-1, 0)
        return part.clamp_(max=self.num_parts - 1)

    def place(self, encoded: Encoded, part: Tensor) -> tuple[Tensor, Tensor]:
        r"""Location of z given the part ``[..., *batch]``, and logarithm of its scale,
        ``[..., *batch, D]``, in units of what the state gives: :math:`S b_c + \mu'` and
        :math:`\log \sigma'`.
        """
        code = self.codes[part]
        hidden = (encoded.seen + self.of_part(code)).relu_()
        loc, log_scale = self.side(hidden).chunk(2, -1)
        return loc + code @ self.spots, log_scale.clamp(*LOG_SCALE)

    def deviate(self, encoded: Encoded, part: Tensor, noise: Tensor) -> Tensor:
        """Draws y ``[n, *batch, D]``.

        :param part: ``[n or 1, *batch]``.
        :param noise: ``[n, *batch, noise_dim + D]``, as from :meth:`noise`.
        """
        noise, last = noise.split([self.noise_dim, self.action_dim], -1)
        code = self.codes[part]
        inputs = torch.cat([noise, code.expand(len(noise), *code.shape[1:])], -1)
        hidden = torch.add(encoded.seen, self.of_noise(inputs), alpha=self.noise_scale).relu_()
        center, raw = self.net(hidden).chunk(2, -1)
        center = torch.add(center, noise[..., : self.action_dim], alpha=self.base_scale)
        return torch.addcmul(center, F.softplus(raw) + self.min_scale, last)

    def forward(self, obs: Tensor, part: Tensor, noise: Tensor) -> Tensor:
        """``obs [*batch, obs_dim]``, parts and noise as for :meth:`deviate`: ``[n, *batch, D]``."""
        return self._draw(self.encode(obs), part, noise)

    def _draw(self, encoded: Encoded, part: Tensor, noise: Tensor) -> Tensor:
        loc, log_scale = self.place(encoded, part)
        y = self.deviate(encoded, part, noise)
        return encoded.loc + encoded.log_scale.exp() * (loc + log_scale.exp() * y)

    def noise(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Fresh normal noise ``[num_draws, *batch, noise_dim + D]`` for :meth:`deviate`."""
        shape = (num_draws, *obs.shape[:-1], self.noise_dim + self.action_dim)
        return torch.randn(shape, dtype=obs.dtype, device=obs.device)

    def draw(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        """Draws z, ``[num_draws, *batch, D]``, differentiable."""
        encoded = self.encode(obs)
        return self._draw(encoded, self.choose(encoded, num_draws), self.noise(obs, num_draws))

    def center(self, obs: Tensor) -> Tensor:
        """The z of the policy's mode ``[*batch, D]``, each part taken for a normal: from the part's
        location where the density is highest, one step of the fixed-point iteration that climbs it
        (Carreira-Perpinan 2000).
        """
        encoded = self.encode(obs)
        parts = torch.arange(self.num_parts, device=obs.device).view(-1, *[1] * (obs.ndim - 1))
        loc, log_scale = self.place(encoded, parts.expand(-1, *obs.shape[:-1]))
        precision = (-2 * log_scale).exp()
        # [C, C, *batch]: what each part adds to the density at each location.
        distance = (precision * (loc.unsqueeze(1) - loc).square()).sum(-1)
        terms = encoded.log_weights.movedim(-1, 0) - log_scale.sum(-1) - 0.5 * distance
        best = terms.logsumexp(1).argmax(0).expand(1, self.num_parts, *obs.shape[:-1])
        weight = terms.gather(0, best)[0].softmax(0).unsqueeze(-1) * precision
        return encoded.loc + encoded.log_scale.exp() * (weight * loc).sum(0) / weight.sum(0)


class _Bounded(torch.autograd.Function):
    """A clamp that is left as it is entered: beyond the bound, only a gradient by which a descent
    would go further out is zero.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bound = bound
        return value.clamp(-bound, bound)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        outward = (value.abs() > ctx.bound) & (value * grad < 0)
        return grad.masked_fill(outward, 0.0), None


def _bounded(value: Tensor, bound: float) -> Tensor:
    found: Tensor = _Bounded.apply(value, bound)
    return found


class PartPosterior(nn.Module):
    r"""r(c | u, s): what a draw :math:`u = (z - \mu) / \sigma` of an :class:`ImplicitActor` tells
    of the part that it came from. By Bayes' rule,

    .. math:: r(c \mid u, s) \propto P(c \mid s)\, e^{e_c(u, s)},

    the prior's being known and the evidence :math:`e_c` learned. It is the same whatever the prior:
    what is learned from evenly drawn parts holds for the policy's. It starts with what u would
    tell if each part were normal.

    :param ImplicitActor actor: the actor.
    :param int hidden_dim: width of the network, >= 1.
    """

    def __init__(self, actor: ImplicitActor, *, hidden_dim: int = 64) -> None:
        super().__init__()
        dim, count = actor.action_dim, actor.num_parts
        self.of_state = nn.Linear(actor.seen_dim, hidden_dim)
        self.of_draw = nn.Linear(dim, hidden_dim, bias=False)
        self.net = MLP((hidden_dim, hidden_dim, count), activation=nn.SiLU)
        spots, variance = actor.codes @ actor.spots, 1 - actor.part_scale**2
        self.slope = nn.Parameter(spots.mT / variance)
        with torch.no_grad():
            self.net.last.weight.zero_()
            self.net.last.bias.copy_(spots.square().sum(-1) / (-2 * variance))

    def forward(self, encoded: Encoded, u: Tensor, *, even: int = 0) -> Tensor:
        """Log r ``[n, B, C]`` of all parts; no gradient reaches the actor but by u.

        :param encoded: of B states.
        :param u: ``[n, B, D]``.
        :param even: in so many states, the first ones, the parts are equally likely.
        """
        evidence = self.net(F.silu(self.of_state(encoded.seen.detach()) + self.of_draw(u)))
        prior = encoded.log_weights.detach().clone()
        prior[:even] = 0.0
        return (prior + evidence + u @ self.slope).log_softmax(-1)

    @torch.no_grad()
    def value_and_gradient(
        self, encoded: Encoded, u: Tensor, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log r of one part each ``[B]`` and its gradient by u ``[B, D]``, written out.

        :param u: ``[B, D]``.
        :param part: ``[B]``.
        """
        first, _, last = self.net.layers
        a = self.of_state(encoded.seen) + self.of_draw(u)
        b = first(F.silu(a))
        log_r = (encoded.log_weights + last(F.silu(b)) + u @ self.slope).log_softmax(-1)
        index = part.unsqueeze(-1)
        value = log_r.gather(-1, index).squeeze(-1)
        of_logits = log_r.exp_().neg_().scatter_add_(-1, index, torch.ones_like(u[:, :1]))
        of_b = torch.ops.aten.silu_backward(of_logits @ last.weight, b)
        of_a = torch.ops.aten.silu_backward(of_b @ first.weight, a)
        return value, torch.addmm(of_logits @ self.slope.mT, of_a, self.of_draw.weight)
