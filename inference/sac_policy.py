# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""What soft actor-critic needs of a policy: draws, and log π(a | s) with its gradient.

An explicit actor has a density. An implicit one has none: the gradient of log q comes from
:class:`pyro_ardae.ARDAE`, the estimator that the ELBOs use, its value from the same network, the
energy of which is normalized by importance sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.actors import FlowActor, GaussianActor, ImplicitActor, log_tanh_slope
from pyro_ardae.score import ScoreEstimator

__all__ = ["ExplicitPolicy", "ImplicitPolicy", "Policy"]


class ExplicitPolicy(nn.Module):
    """The policy of an actor with a density.

    :param actor: the actor.
    """

    def __init__(self, actor: GaussianActor | FlowActor) -> None:
        super().__init__()
        self.actor = actor

    def fit(self, obs: Tensor) -> None:
        """Nothing is to be estimated."""

    def rsample(self, obs: Tensor, draws: None = None) -> tuple[Tensor, Tensor]:
        """A draw z before the tanh ``[B, D]`` and log π of its action ``[B]``, differentiable."""
        z, log_prob = self.actor.rsample_and_log_prob(obs)
        return z, log_prob - log_tanh_slope(z)

    @torch.no_grad()
    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[B, D]`` and log π of its action ``[B]``."""
        return self.rsample(obs)

    @torch.no_grad()
    def diagnostics(self, obs: Tensor) -> dict[str, float]:
        """Nothing is estimated."""
        return {}

    def jacobian_penalty(self, obs: Tensor, lowest: float) -> Tensor:
        """Zero: a density keeps an actor from collapsing by itself."""
        return obs.new_zeros(())


class ImplicitPolicy(nn.Module):
    r"""The policy of an implicit actor, with the score of its q estimated from draws.

    With :math:`s(z) \approx \nabla_z \log q(z \mid s)`, the gradient of log π along a draw is
    :math:`s(z) + 2 \tanh z`, the second term exactly that of the tanh.

    :param ImplicitActor actor: the actor.
    :param ScoreEstimator estimator: of the score of q given the state, with ``log_prob``.
    :param int num_draws: draws per state by which the score is learned, >= 2.
    :param int num_moment_draws: draws per state that accompany a query, >= 2. Those by which the
        estimator whitens in training, ``num_draws - num_draws / num_folds``, meet the same law.
    :raises ValueError: if there are too few draws.
    """

    def __init__(
        self,
        actor: ImplicitActor,
        estimator: ScoreEstimator,
        *,
        num_draws: int,
        num_moment_draws: int,
    ) -> None:
        super().__init__()
        if not 2 <= num_moment_draws <= num_draws:
            raise ValueError(
                f"ImplicitPolicy: expected 2 <= num_moment_draws <= num_draws, got "
                f"{num_moment_draws} and {num_draws}."
            )
        self.actor, self.estimator = actor, estimator
        self.num_draws, self.num_moment_draws = num_draws, num_moment_draws
        self.score_loss = torch.zeros(())

    @torch.no_grad()
    def fit(self, obs: Tensor) -> Tensor:
        """Updates the score; returns draws ``[num_moment_draws, B, D]`` for :meth:`rsample`."""
        draws = self.actor.draw(obs, self.num_draws)
        self.score_loss = self.estimator.update(draws, obs)
        return draws[: self.num_moment_draws]

    def rsample(self, obs: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """A differentiable draw z ``[B, D]``, and ``[B]`` that is zero with the gradient of log π.

        :param obs: ``[B, obs_dim]``.
        :param draws: what :meth:`fit` returned for it.
        """
        z = self.actor.draw(obs)[0]
        value = z.detach()
        slope = self.estimator(value.unsqueeze(0), draws, obs)[0] + 2 * value.tanh()
        return z, (slope * (z - value)).sum(-1)

    @torch.no_grad()
    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A draw z ``[B, D]`` and an estimate of log π of its action ``[B]``."""
        z, *draws = self.actor.draw(obs, 1 + self.num_moment_draws)
        log_prob = self.estimator.log_prob(z.unsqueeze(0), torch.stack(draws), obs)[0]
        return z, log_prob - log_tanh_slope(z)

    @torch.no_grad()
    def diagnostics(self, obs: Tensor) -> dict[str, float]:
        r"""How far the estimates can be trusted.

        - ``score_loss``: of the last update.
        - ``stein``: the mean of :math:`s(z)^\top (z - m) / D`, -1 for the exact score of any q, and
          ``stein_se``, its standard error over the states.
        - ``log_prob_se``: standard deviation of log π by the draws for its normalizing constant.
        """
        z = self.actor.draw(obs, 1 + 2 * self.num_moment_draws)
        value, draws, others = z.split([1, self.num_moment_draws, self.num_moment_draws])
        score = self.estimator(value, draws, obs)[0]
        stein = (score * (value[0] - others.mean(0))).mean(-1)
        first, second = (self.estimator.log_prob(value, draws, obs) for _ in range(2))
        return {
            "score_loss": float(self.score_loss),
            "stein": float(stein.mean()),
            "stein_se": float(stein.std() / len(stein) ** 0.5),
            "log_prob_se": float((first - second).square().mean().div(2).sqrt()),
        }

    def jacobian_penalty(
        self, obs: Tensor, lowest: float, *, perturbations: int = 10, step: float = 0.01
    ) -> Tensor:
        r"""Jacobian clamping (Lim et al. 2020, appendix): the mean of
        :math:`\min(\lVert J v \rVert^2 / \lVert v \rVert^2 - \eta, 0)^2`, J being the Jacobian of
        the action by the noise, in directions v by finite differences.

        :param obs: ``[B, obs_dim]``.
        :param lowest: :math:`\\eta`, the squared stretch below which is penalized, >= 0.
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


Policy = ExplicitPolicy | ImplicitPolicy
