# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Soft actor-critic: the algorithm, for explicit and implicit policies alike."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from inference.agents.options import Config
from inference.agents.policy import ImplicitPolicy, Policy, Proposal
from inference.agents.replay import Batch

__all__ = ["ActionValue", "Agent"]


class ActionValue(Protocol):
    """Estimates of Q: ``obs [B, obs_dim]``, ``action [B, D]`` in (-1, 1) to ``[any number, B]``."""

    def __call__(self, obs: Tensor, action: Tensor) -> Tensor: ...


class Agent:
    r"""Soft actor-critic (Haarnoja et al. 2018) with a policy whose density need not be known.

    One update of the critics minimizes, with :math:`a', \log \pi` by the policy at s',

    .. math:: \tfrac12 \sum_{j=1,2} E[(Q_j(s, a) - y)^2], \quad
        y = r + \gamma (1 - d) (\min_j \bar Q_j(s', a') - \alpha \log \pi(a' \mid s')),

    then one of the policy :math:`E[\alpha \log \pi(a \mid s) - \min_j Q_j(s, a)]`, a drawn anew,
    with the updated critics; d is 1 where the episode terminated, 0 where it was cut off.

    The agent takes batches, in random order, and returns metrics; where they come from is not its
    concern.

    :param Policy policy: the policy.
    :param critic: two critics in one module; anything that gives values, without parameters, if
        :meth:`update_critic` is not called.
    :param Config config: options.
    """

    #: Bound, in temperatures, of the difference in cost by which the odds of two parts move.
    MAX_EXCESS = 0.5

    def __init__(
        self, policy: Policy, critic: ActionValue | torch.nn.Module, config: Config
    ) -> None:
        self.config, self.policy, self.critic = config, policy, critic
        action_dim = policy.actor.action_dim
        target = -float(action_dim) if config.target_entropy is None else config.target_entropy
        self.target_entropy = target
        self.log_alpha = torch.full((), math.log(config.alpha), device=config.device)
        self.log_alpha.requires_grad_(config.auto_alpha)
        self.entropy_mean = torch.zeros((), device=config.device)
        self.force = torch.zeros((), device=config.device)
        self.updates = 0
        self.actor_parameters = list(policy.actor.parameters())
        self.critic_parameters: list[Tensor] = []
        rate, actor_rate = config.learning_rate, config.actor_learning_rate
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, actor_rate, fused=True)
        if isinstance(critic, torch.nn.Module):
            self.target_critic = copy.deepcopy(critic).requires_grad_(False)
            # Collecting parameters takes a while; an update is a few milliseconds.
            self.critic_parameters = list(critic.parameters())
            self.target_parameters = list(self.target_critic.parameters())
            # An optimizer of its own for the temperature would take a fiftieth of an update.
            learning = [*self.critic_parameters, self.log_alpha]
            self.critic_optimizer = torch.optim.Adam(learning, rate, fused=True)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of score, critics, temperature and policy; returns scalars, detached.

        :raises ValueError: for a batch of other shapes, or numbers that are not finite; nothing is
            learned from it.
        """
        _check(batch, self.policy.actor.action_dim)
        proposal = self.policy.fit(batch.obs)
        metrics = self.update_critic(batch) | self.update_actor(batch.obs, proposal)
        self.updates += 1
        return metrics

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        """One step on both critics, one of their targets, and one of the temperature on the mean of
        log π, by its logarithm.
        """
        config = self.config
        next_z, log_pi = self.policy.sample(batch.next_obs)
        mean = log_pi.mean()
        if config.subtract_entropy_mean:
            self.entropy_mean.lerp_(mean, 0.01 if self.updates else 1.0)
            log_pi = log_pi - self.entropy_mean
        with torch.no_grad():
            next_q = self.target_critic(batch.next_obs, next_z.tanh()).amin(0)
            next_value = next_q - self.alpha * log_pi
            goes_on = 1 - batch.terminated.to(next_value.dtype)
            target = batch.reward + config.gamma * goes_on * next_value
        q = self.critic(batch.obs, batch.action)
        # The gradient of the loss by q is known.
        error = q.detach() - target
        q.backward(error / len(target))
        if config.auto_alpha:
            self.log_alpha.grad = -(mean + self.target_entropy)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, config.tau)
        q, loss = q.detach(), 0.5 * error.square().mean(1).sum()
        return {"critic_loss": loss, "q": q.mean(), "log_pi": mean}

    def update_actor(self, obs: Tensor, proposal: Proposal | None) -> dict[str, Tensor]:
        """One step of the actor.

        :param obs: ``[B, obs_dim]``.
        :param proposal: what ``policy.fit(obs)`` returned.
        """
        z, log_pi, penalty, other = self.policy.rsample(obs, proposal)
        valued = z
        if penalty is not None:
            valued = z.clone()
            valued.register_hook(self._feel)
        self._learn_critic(False)
        q = self.critic(obs, valued.tanh()).amin(0)
        self._learn_critic(True)
        cost = self.alpha * log_pi - q
        loss = cost.mean()
        if penalty is not None:
            # What keeps a policy in range has to hold against the values, whatever their unit.
            weight = self.force.clamp_min(1.0).clone()
            loss = loss + weight * penalty + self.jacobian_clamp(obs)
        if other is not None:
            # With the best odds, draws cost the same on average whatever their part.
            with torch.no_grad():
                of_other = self.critic(obs[other.rows], other.z.tanh()).amin(0)
                excess = cost.detach()[other.rows] - (self.alpha * other.log_pi - of_other)
                limit = self.MAX_EXCESS * self.alpha
            loss = loss + (excess.clamp(-limit, limit) * other.log_odds).mean()
        loss.backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad(set_to_none=True)
        return {"q_policy": q.detach().mean(), "max_z": z.detach().abs().max()}

    def _learn_critic(self, learns: bool) -> None:
        """Whether what follows computes gradients by the critics' weights."""
        for parameter in self.critic_parameters:
            parameter.requires_grad_(learns)

    def _feel(self, gradient: Tensor) -> None:
        """Running mean of the magnitude of the values' gradient by a coordinate of z."""
        self.force.lerp_(gradient.abs().mean() * len(gradient), 0.02)

    def jacobian_clamp(self, obs: Tensor) -> Tensor | float:
        """The weighted penalty of Jacobian clamping; zero for a policy with a density."""
        config = self.config
        if not config.jacobian_clamp or not isinstance(self.policy, ImplicitPolicy):
            return 0.0
        weight = min(1 + self.updates**config.jacobian_exponent / 1000, 1e5)
        return weight * self.policy.jacobian_penalty(obs, config.jacobian_clamp)

    @property
    def alpha(self) -> float:
        """The temperature of the next update."""
        return math.exp(float(self.log_alpha.detach()))

    @torch.no_grad()
    def act(self, obs: Tensor, *, noise: bool = True) -> Tensor:
        """Actions ``[B, D]`` in (-1, 1) for ``obs [B, obs_dim]``."""
        actor = self.policy.actor
        return (actor.draw(obs)[0] if noise else actor.center(obs)).tanh()

    def state_dict(self) -> dict[str, Any]:
        """All that an update changes, as tensors and plain values."""
        return {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "target_critic": self.target_critic.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "log_alpha": self.log_alpha.detach().clone(),
            "entropy_mean": self.entropy_mean.clone(),
            "force": self.force.clone(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        for name in (
            *("policy", "critic", "target_critic"),
            *("actor_optimizer", "critic_optimizer"),
        ):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
            self.entropy_mean.copy_(state["entropy_mean"])
            self.force.copy_(state["force"])
        self.updates = state["updates"]


def _check(batch: Batch, action_dim: int) -> None:
    obs, action, reward, next_obs, terminated = batch
    size = obs.shape[:1]
    if not (
        obs.dim() == 2
        and next_obs.shape == obs.shape
        and action.shape == (*size, action_dim)
        and reward.shape == terminated.shape == size
    ):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in batch._asdict().items())
        raise ValueError(
            f"Agent: expected obs and next_obs [B, obs_dim], action [B, {action_dim}], reward and "
            f"terminated [B], got {shapes}."
        )
    # One number to wait for on a GPU: a sum is finite if all of it is, up to overflow.
    if not math.isfinite(sum(x.sum() for x in batch)):
        raise ValueError("Agent: expected finite numbers, got NaN or infinity.")
