# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""What soft actor-critic needs of a policy: draws, and log π(a | s) with its gradient.

An explicit actor has a density. An implicit one has none: the gradient of log q comes from
:class:`pyro_ardae.ARDAE`, the estimator that the ELBOs use, its value from the same network, the
energy of which is normalized by importance sampling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.actors import FlowActor, GaussianActor, ImplicitActor, log_tanh_slope
from pyro_ardae.score import ScoreEstimator

__all__ = ["Draw", "ExplicitPolicy", "ImplicitPolicy", "Policy"]


class Draw(NamedTuple):
    """A draw of a policy in each of B states, for a step of the actor."""

    z: Tensor
    """What goes into the tanh, ``[B, D]``, differentiable."""
    log_pi: Tensor
    """Log π of the action ``[B]``, with the gradient along the draw."""
    penalty: Tensor | None
    """What keeps the policy in range, scalar, if something has to."""
    log_choice: Tensor | None
    """Log-probability of the discrete part of the noise ``[B]``, if there is one."""


class ExplicitPolicy(nn.Module):
    """The policy of an actor with a density.

    :param actor: the actor.
    """

    def __init__(self, actor: GaussianActor | FlowActor) -> None:
        super().__init__()
        self.actor = actor

    def fit(self, obs: Tensor) -> None:
        """Nothing is to be estimated."""

    def rsample(self, obs: Tensor, draws: None = None) -> Draw:
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


class ImplicitPolicy(nn.Module):
    r"""The policy of an implicit actor :math:`z = \mu(s) + \sigma(s) y`, with an estimated score.

    With :math:`f(y) \approx \nabla_y \log q(y \mid s)` the gradient of

    .. math:: \log \pi(a \mid s) = \log q(y \mid s) - \sum_i \log \sigma_i(s)
        - \sum_i \log(1 - \tanh^2 z_i)

    along a draw is that of :math:`f(y)^\top y` with f held fixed, and of the other two terms
    exactly.

    :param ImplicitActor actor: the actor.
    :param ScoreEstimator estimator: of the score of y given the state, with ``log_prob``.
    :param int num_draws: draws per state by which the score is learned, >= 1.
    :param float bound: magnitude of z from which on :meth:`rsample` counts excess, > 0. Beyond 4
        the tanh is flat, and only the entropy would still move a draw.
    """

    #: The same for y. Its width and σ could grow and shrink together, and an estimate that lags
    #: behind a growing y makes it grow: without a bound, y reached 1e11 in a thousand updates.
    BOUND_Y = 3.0

    #: Weight of the penalty on a mean and a variance of y other than 0 and 1. They are location's
    #: and scale's to fit; the score of a y ten times narrower is ten times as steep.
    GAUGE = 1.0

    def __init__(
        self, actor: ImplicitActor, estimator: ScoreEstimator, *, num_draws: int, bound: float = 4.0
    ) -> None:
        super().__init__()
        if num_draws < 1:
            raise ValueError(f"ImplicitPolicy: expected num_draws >= 1, got {num_draws}.")
        self.actor, self.estimator, self.num_draws = actor, estimator, num_draws
        self.bound = bound
        self.score_loss = torch.zeros(())

    @torch.no_grad()
    def fit(self, obs: Tensor) -> Tensor:
        """Updates the score by fresh draws y ``[num_draws, B, D]``, which it returns.

        :param obs: ``[B, obs_dim]``.
        """
        encoded = self.actor.encode(obs)
        draws, _ = self.actor.deviate(encoded, self.actor.noise(obs, self.num_draws))
        self.score_loss = self.estimator.update(draws, obs)
        return draws

    def rsample(self, obs: Tensor, draws: Tensor) -> Draw:
        """A differentiable draw.

        :param obs: ``[B, obs_dim]``.
        :param draws: what :meth:`fit` returned for it.
        """
        encoded = self.actor.encode(obs)
        fresh, log_choice = self.actor.deviate(encoded, self.actor.noise(obs))
        y, still = fresh[0], fresh.detach()
        score, value = (one[0] for one in self.estimator.score_and_log_prob(still, draws, obs))
        z = encoded.loc + encoded.log_scale.exp() * y
        along = (score * (y - still[0])).sum(-1)
        log_pi = value + along - encoded.log_scale.sum(-1) - log_tanh_slope(z)
        penalty = _excess(z, self.bound) + _excess(y, self.BOUND_Y) + self._unit(y, draws)
        return Draw(z, log_pi, penalty, log_choice[0])

    def _unit(self, y: Tensor, draws: Tensor) -> Tensor:
        """A term whose gradient is that of half of (m^2 + (v - 1)^2 / 2), m and v being mean and
        variance of y in a state, up to a constant factor: other draws estimate the coefficients.
        """
        variance, mean = torch.var_mean(draws, 0)
        off = (variance - 1).clamp(max=3.0)
        return self.GAUGE * (0.5 * off * (y - mean).square() + mean * y).sum(-1).mean()

    @torch.no_grad()
    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[B, D]`` and an estimate of log π of its action ``[B]``."""
        encoded = self.actor.encode(obs)
        y, _ = self.actor.deviate(encoded, self.actor.noise(obs))
        z = encoded.loc + encoded.log_scale.exp() * y[0]
        log_prob = self.estimator.log_prob(y, y, obs)[0]
        return z, log_prob - encoded.log_scale.sum(-1) - log_tanh_slope(z)

    @torch.no_grad()
    def log_prob(self, obs: Tensor, z: Tensor) -> Tensor:
        """An estimate of log q(z | s), ``[B]``, for ``z [B, D]``."""
        encoded = self.actor.encode(obs)
        y = ((z - encoded.loc) / encoded.log_scale.exp()).unsqueeze(0)
        return self.estimator.log_prob(y, y, obs)[0] - encoded.log_scale.sum(-1)

    @torch.no_grad()
    def diagnostics(self, obs: Tensor) -> dict[str, float]:
        r"""How far the estimates can be trusted.

        - ``score_loss``: of the last update.
        - ``stein``: the mean of :math:`f(y)^\top (y - m) / D`, -1 for the exact score of any q, and
          ``stein_se``, its standard error over the states; m is the mean of 16 other draws.
        - ``log_z``: root mean square over states of the log of the integral of the density, by 256
          draws: how far the values are from those of a normalized one.
        - ``width``: the standard deviation of y, around 1 if location and scale do their part.
        """
        draws, _ = self.actor.deviate(self.actor.encode(obs), self.actor.noise(obs, 17))
        y, others = draws.split([1, 16])
        score = self.estimator(y, y, obs)[0]
        stein = (score * (y[0] - others.mean(0))).mean(-1)
        return {
            "score_loss": float(self.score_loss),
            "stein": float(stein.mean()),
            "stein_se": float(stein.std() / len(stein) ** 0.5),
            "log_z": float(self.estimator.log_normalizer(y, obs).square().mean().sqrt()),
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
        noise = self.actor.noise(obs)
        shift = step * torch.randn(
            (perturbations, *noise.shape[1:]), dtype=noise.dtype, device=noise.device
        )
        moved, still = self.actor(obs, noise + shift).tanh(), self.actor(obs, noise).tanh()
        stretch = (moved - still).square().sum(-1) / shift.square().sum(-1)
        return (stretch - lowest).clamp_max(0).square().mean()


def _excess(value: Tensor, bound: float) -> Tensor:
    return (value.abs() - bound).clamp_min(0).square().sum(-1).mean()


Policy = ExplicitPolicy | ImplicitPolicy
