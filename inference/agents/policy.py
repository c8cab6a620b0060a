# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""What soft actor-critic needs of a policy: draws, and log π(a | s) with its gradient.

An explicit actor has a density. An implicit one has none: the gradient of log q comes from
:class:`pyro_ardae.ARDAE`, the estimator that the ELBOs use, its value from the same network, the
energy of which learns to be normalized.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.actors import FlowActor, GaussianActor, log_tanh_slope
from models.implicit_actor import Encoded, ImplicitActor, PartPosterior
from pyro_ardae import ARDAE

__all__ = ["Alternative", "Draw", "ExplicitPolicy", "ImplicitPolicy", "Policy", "Proposal"]


class Alternative(NamedTuple):
    """A draw of another part than a :class:`Draw` has, any, in some of its states."""

    rows: slice
    """In which of them, S of B."""
    z: Tensor
    """``[S, D]``, detached."""
    log_pi: Tensor
    """``[S]``, detached."""
    log_odds: Tensor
    """Log-probability of the draw's part less that of this one's, ``[S]``, differentiable."""


class Draw(NamedTuple):
    """A draw of a policy in each of B states, for a step of the actor."""

    z: Tensor
    """What goes into the tanh, ``[B, D]``, differentiable."""
    log_pi: Tensor
    """Log π of the action ``[B]``, with the gradient along the draw."""
    penalty: Tensor | None
    """What keeps the policy in range, scalar, if something has to."""
    alternative: Alternative | None
    """Another draw, if the actor has parts."""


class ExplicitPolicy(nn.Module):
    """The policy of an actor with a density.

    :param actor: the actor.
    """

    def __init__(self, actor: GaussianActor | FlowActor) -> None:
        super().__init__()
        self.actor = actor

    def fit(self, obs: Tensor) -> None:
        """Nothing is to be estimated."""

    def rsample(self, obs: Tensor, proposal: None = None) -> Draw:
        """A draw without penalty."""
        z, log_prob = self.actor.rsample_and_log_prob(obs)
        return Draw(z, log_prob - log_tanh_slope(z), None, None)

    @torch.no_grad()
    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[B, D]`` and log π of its action ``[B]``."""
        return self.rsample(obs)[:2]

    @torch.no_grad()
    def diagnostics(self, obs: Tensor) -> dict[str, float]:
        """Nothing is estimated."""
        return {}


class Proposal(NamedTuple):
    """What :meth:`ImplicitPolicy.fit` has learned by: valid until the actor's next step."""

    encoded: Encoded
    """The states as the actor sees them, differentiable."""
    part: Tensor
    """``[1, B]``."""
    mean: Tensor
    """Estimated mean of y ``[B, D]``, ..."""
    variance: Tensor
    """... and its variance, by more draws."""


class ImplicitPolicy(nn.Module):
    r"""The policy of an implicit actor, with an estimated score.

    The actor draws a part c, a y given it, and :math:`z = \mu(s, c) + \sigma(s, c) y`. So

    .. math:: \log \pi(a \mid s) = \log q(y \mid s, c) - \sum_i \log \sigma_i(s, c)
        + \log P(c \mid s) - \log P(c \mid z, s) - \sum_i \log(1 - \tanh^2 z_i),

    whatever the c that z came from. Two terms are estimated: the first, :math:`\log q` and its
    gradient f by y, by the estimator, with state and part as its context, and the fourth by a
    network that learns to tell the part from the draw
    (:class:`~models.implicit_actor.PartPosterior`). Given its part a draw has one mode, as a rule,
    which leaves the estimator little to learn. The gradient along a draw is that of
    :math:`f(y)^\top y` with f held fixed for the first term, exact for the others.

    The part itself has no path to differentiate along. With the best probabilities, draws have the
    same :math:`\alpha \log \pi - Q` on average whatever their part; so the agent compares two, in
    half of the states. In a share of the states the parts are drawn evenly, so that one that
    has lost its probability learns on, and can come back.

    With an r(c | z, s) that is off, :math:`-\log \pi` is too small on average (by the divergence
    of r from the true one; Ranganath et al. 2016, `arXiv 1511.02386
    <https://arxiv.org/abs/1511.02386>`_): a lower bound of the entropy.

    :param ImplicitActor actor: the actor.
    :param ARDAE estimator: of the score of y given state and part (as a context of
        ``obs_dim + K``), in the energy parametrization and without whitening: it is queried by
        single draws.
    :param int num_draws: draws per state by which the score is learned, >= 1.
    :param float bound: magnitude of z from which on :meth:`rsample` counts excess, > 0. Beyond 4
        the tanh is flat, and only the entropy would still move a draw.
    :param float learning_rate: step size of Adam for the network that tells the parts.
    :param float even_share: share of the states in which parts are drawn evenly, in [0, 1).
    """

    #: The same for y. Its width and σ could grow and shrink together, and an estimate that lags
    #: behind a growing y makes it grow: without a bound, y reached 1e11 in a thousand updates.
    BOUND_Y = 3.0

    #: Weight of the penalty on a mean and a variance of y other than 0 and 1. They are location's
    #: and scale's to fit. Where y wanders the estimates lag behind: with a fifth of the weight, and
    #: moments that were mostly the batch's, log q was off by 2 nats in some states of multi-goal.
    GAUGE = 5.0

    #: Draws per state, in pairs of opposite noise, by which its moments are estimated. The pairs
    #: leave little noise in the mean; ...
    MOMENT_DRAWS = 8

    #: ... of the variance, this share is the state's own, the rest the batch's.
    OWN = 0.3

    def __init__(
        self,
        actor: ImplicitActor,
        estimator: ARDAE,
        *,
        num_draws: int,
        bound: float = 4.0,
        learning_rate: float = 2e-3,
        even_share: float = 0.5,
    ) -> None:
        super().__init__()
        if num_draws < 1:
            raise ValueError(f"ImplicitPolicy: expected num_draws >= 1, got {num_draws}.")
        self.actor, self.estimator, self.num_draws = actor, estimator, num_draws
        self.parts = PartPosterior(actor)
        self.bound, self.learning_rate, self.even_share = bound, learning_rate, even_share
        self.score_loss = torch.zeros(())
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """That of the network that tells the parts."""
        if self._optimizer is None:  # by now on the device where it stays
            parameters = self.parts.parameters()
            self._optimizer = torch.optim.Adam(parameters, self.learning_rate, fused=True)
        return self._optimizer

    def fit(self, obs: Tensor) -> Proposal:
        """Updates both estimates by fresh draws, and returns what the actor's step needs of them.

        :param obs: ``[B, obs_dim]``.
        """
        encoded = self.actor.encode(obs)
        with torch.no_grad():
            even = round(self.even_share * len(obs))
            part = self.actor.choose(encoded)
            part[:, :even] = self._any(part[:, :even])
            # The first half of the draws are independent of each other.
            count = max(self.num_draws, self.MOMENT_DRAWS // 2)
            noise = self.actor.noise(obs, count)
            several = self.actor.deviate(encoded, part, torch.cat([noise, -noise]))
            draws = several[: self.num_draws]
            mean = several.mean(0)
            variance = (several - mean).square().mean(0)  # torch.var_mean takes ten times as long
            loc, log_scale = self.actor.place(encoded, part)
            u = loc + log_scale.exp() * draws
        self.score_loss = self.estimator.update(draws, self._context(obs, part))
        told = _of(self.parts(encoded, u, even=even), part.expand(u.shape[:-1]))
        told.mean().neg().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Proposal(encoded, part, mean, variance)

    def rsample(self, obs: Tensor, proposal: Proposal) -> Draw:
        """A differentiable draw.

        :param obs: ``[B, obs_dim]``, in random order: which states compare parts, and in which
            parts are drawn evenly, goes by the place in the batch.
        :param proposal: what :meth:`fit` returned for it.
        """
        encoded, part, mean, variance = proposal
        count = len(obs)
        # The middle half: half of it has evenly drawn parts, with the default share.
        rows = slice(count // 4, count // 4 + (count + 1) // 2)
        # Draws and alternatives go the same way, together.
        obs = torch.cat([obs, obs[rows]])
        part = torch.cat([part, self._any(part[:, rows])], -1)
        encoded = Encoded(*(torch.cat([value, value[rows]]) for value in encoded))
        y = self.actor.deviate(encoded, part, self.actor.noise(obs))
        still = y.detach()
        score, value = self.estimator.score_and_log_prob(still, still, self._context(obs, part))
        u, z, log_slope = self._compose(encoded, part, y)
        log_weight = _of(encoded.log_weights, part)[0]
        log_told, of_u = self.parts.value_and_gradient(encoded, u[0], part[0])
        of_z = of_u / encoded.log_scale.detach().exp()
        log_pi = value[0] + log_weight.detach() - log_told - log_slope
        log_pi = log_pi + (score * (y - still))[0].sum(-1) - (of_z * (z - z.detach())).sum(-1)
        log_odds = log_weight[:count][rows] - log_weight[count:]
        other = Alternative(rows, z[count:].detach(), log_pi[count:].detach(), log_odds)
        y, z, log_pi = y[:, :count], z[:count], log_pi[:count]
        penalty = _excess(z, self.bound) + _excess(y, self.BOUND_Y)
        return Draw(z, log_pi, penalty + self._unit(y[0], mean, variance), other)

    def _any(self, part: Tensor) -> Tensor:
        """Parts drawn evenly, as many."""
        return torch.randint(self.actor.num_parts, part.shape, device=part.device)

    def _context(self, obs: Tensor, part: Tensor) -> Tensor:
        return torch.cat([obs, self.actor.codes[part[0]]], -1)

    def _compose(self, encoded: Encoded, part: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What becomes of a draw ``y [1, B, D]``: u, z ``[B, D]``, and the logarithm of the
        action's slope by y, ``[B]``.
        """
        loc, log_scale = self.actor.place(encoded, part)
        u = loc + log_scale.exp() * y
        z = (encoded.loc + encoded.log_scale.exp() * u)[0]
        log_slope = log_scale[0].sum(-1) + encoded.log_scale.sum(-1) + log_tanh_slope(z)
        return u, z, log_slope

    def _unit(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """A term whose gradient is, up to a constant factor, that of the divergence
        (v - 1 - log v + m^2 / v) / 2 of normals, m and v being mean and variance of y, to first
        order in m: other draws estimate the coefficients.
        """
        typical = variance.mean(0).clamp_min(0.01)
        off = (variance - 1).clamp(max=3.0)
        off = off.mean(0).lerp(off, self.OWN)
        terms = (0.5 * off * (y - mean).square() + mean * y) / typical
        return self.GAUGE * terms.sum(-1).mean()

    @torch.no_grad()
    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[B, D]`` and an estimate of log π of its action ``[B]``."""
        encoded = self.actor.encode(obs)
        part = self.actor.choose(encoded)
        y = self.actor.deviate(encoded, part, self.actor.noise(obs))
        u, z, log_slope = self._compose(encoded, part, y)
        value = self.estimator.log_prob(y, y, self._context(obs, part))
        log_told = _of(self.parts(encoded, u), part)
        return z, (value + _of(encoded.log_weights, part) - log_told)[0] - log_slope

    @torch.no_grad()
    def diagnostics(self, obs: Tensor) -> dict[str, float]:
        r"""How far the estimates can be trusted; all but the first given random parts.

        - ``score_loss``: of the last update.
        - ``stein``: the mean of :math:`-f(y)^\top (y - m) / D`, 1 for the exact score of any q, and
          ``stein_se``, its standard error over the states; m is the mean of 16 other draws.
        - ``log_z``: root mean square over states of the log of the integral of the density, by 256
          draws: how far the values are from those of a normalized one.
        - ``width``: the standard deviation of y, around 1 if location and scale do their part.
        """
        encoded = self.actor.encode(obs)
        part = self.actor.choose(encoded)
        y, others = self.actor.deviate(encoded, part, self.actor.noise(obs, 17)).split([1, 16])
        context = self._context(obs, part)
        score = self.estimator(y, y, context)[0]
        stein = -(score * (y[0] - others.mean(0))).mean(-1)
        return {
            "score_loss": float(self.score_loss),
            "stein": float(stein.mean()),
            "stein_se": float(stein.std() / len(stein) ** 0.5),
            "log_z": float(self.estimator.log_normalizer(y, context).square().mean().sqrt()),
            "width": float(others.std(0).mean()),
        }

    def jacobian_penalty(
        self, obs: Tensor, lowest: float, *, perturbations: int = 10, step: float = 0.01
    ) -> Tensor:
        r"""Jacobian clamping (Lim et al. 2020, appendix): the mean of
        :math:`\min(\lVert J v \rVert^2 / \lVert v \rVert^2 - \eta, 0)^2`, J being the Jacobian of
        the action by the noise, in directions v by finite differences.

        :param obs: ``[B, obs_dim]``.
        :param lowest: :math:`\eta`, the squared stretch below which is penalized, >= 0.
        :param perturbations: directions per state.
        :param step: scale of v.
        """
        noise, part = self.actor.noise(obs), self.actor.choose(self.actor.encode(obs))
        shift = step * torch.randn(
            (perturbations, *noise.shape[1:]), dtype=noise.dtype, device=noise.device
        )
        moved = self.actor(obs, part, noise + shift).tanh()
        still = self.actor(obs, part, noise).tanh()
        stretch = (moved - still).square().sum(-1) / shift.square().sum(-1)
        return (stretch - lowest).clamp_max(0).square().mean()

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the optimizer, and the last loss of the score."""
        return {"optimizer": self.optimizer.state_dict(), "score_loss": self.score_loss}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.score_loss = state["score_loss"]


def _of(table: Tensor, part: Tensor) -> Tensor:
    """Entries ``[n, B]`` for the parts ``[n, B]`` of a ``table [..., B, C]``."""
    table = table.expand(*part.shape, table.shape[-1])
    return table.gather(-1, part.unsqueeze(-1)).squeeze(-1)


def _excess(value: Tensor, bound: float) -> Tensor:
    return (value.abs() - bound).clamp_min(0).square().sum(-1).mean()


Policy = ExplicitPolicy | ImplicitPolicy
