# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Whether critics promise what follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.signal import lfilter

from inference.agents.agent import Agent
from inference.agents.replay import Batch
from inference.agents.rollout import Episode

__all__ = ["q_bias"]


@torch.no_grad()
def q_bias(agent: Agent, episodes: Sequence[Episode]) -> float:
    r"""What the critics say of the steps of episodes, less what followed: the mean over all steps t
    of :math:`\min_j Q_j(s_t, a_t) - G_t`, with the soft return

    .. math:: G_t = r_t + \gamma (1 - d_t) (G_{t+1} - \alpha \log \pi(a \mid s_{t+1})),
        \quad a \sim \pi(\cdot \mid s_{t+1}).

    Where an episode was cut off, the critics' own value stands for the rest (Chen et al. 2021,
    `arXiv 2101.05982 <https://arxiv.org/abs/2101.05982>`_, measure it likewise).

    :param Agent agent: the agent.
    :param Sequence[Episode] episodes: episodes of its policy with noise, with their transitions.
    :raises ValueError: if an episode has none.
    """
    held = [episode.transitions for episode in episodes if episode.transitions is not None]
    if len(held) < len(episodes) or not held:
        raise ValueError("q_bias: expected episodes with transitions, found some without.")
    config, device = agent.config, agent.config.device
    steps = Batch(*(torch.cat(column).to(device) for column in zip(*held, strict=True)))
    q = agent.critic(steps.obs, steps.action).amin(0)
    next_z, log_pi = agent.policy.sample(steps.next_obs)
    if config.subtract_entropy_mean:  # as in what the critics learn
        log_pi = log_pi - agent.entropy_mean
    bonus = -agent.alpha * log_pi
    rest = agent.critic(steps.next_obs, next_z.tanh()).amin(0)
    received = []
    lengths = [len(one.reward) for one in held]
    discount = config.gamma * (1 - steps.terminated)
    parts = (steps.reward + discount * bonus, discount * rest)
    for flow, value in zip(*(part.split(lengths) for part in parts), strict=True):
        flow[-1] += value[-1]
        # Backwards in time each return is its own step's flow and the discounted one before it.
        backwards = lfilter([1.0], [1.0, -config.gamma], flow.flip(0).double().cpu().numpy())
        received.append(torch.from_numpy(backwards.copy()).flip(0))
    return float((q.double().cpu() - torch.cat(received)).mean())
