# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What the critics promise against what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.agents.agent import Agent
from inference.agents.calibration import q_bias
from inference.agents.options import Config
from inference.agents.replay import Batch
from inference.agents.rollout import Episode


class Policy(nn.Module):
    """Log π is the first number of the observation."""

    def __init__(self) -> None:
        super().__init__()
        self.actor: Any = nn.Linear(1, 1)
        self.actor.action_dim = 1

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(obs), 1), obs[:, 0]


class Critic(nn.Module):
    """Promises the second number of the observation, or more."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([obs[:, 1], obs[:, 1] + 1])


def episode(rewards: list[float], log_pi: list[float], q: list[float], terminated: bool) -> Episode:
    obs = torch.tensor([log_pi, q]).mT
    count = len(rewards)
    ends = torch.zeros(count)
    ends[-1] = float(terminated)
    steps = Batch(obs[:-1], torch.zeros(count, 1), torch.tensor(rewards), obs[1:], ends)
    return Episode(0, sum(rewards), count, obs[-1], steps)


def test_by_hand() -> None:
    config = Config(auto_alpha=False, alpha=0.5, gamma=0.9)
    agent = Agent(Policy(), Critic(), config)  # type: ignore[arg-type]
    # The value that follows the last step counts where the episode was cut off, only there.
    log_pi, q = [9.0, 2.0, -1.0, 3.0], [1.0, 2.0, 3.0, 4.0]
    for terminated, last in ((True, 0.0), (False, 4.0 - 0.5 * 3.0)):
        one = episode([1.0, 2.0, 3.0], log_pi, q, terminated)
        third = 3.0 + 0.9 * last
        second = 2.0 + 0.9 * (third + 0.5)
        first = 1.0 + 0.9 * (second - 1.0)
        expected = (1 + 2 + 3 - first - second - third) / 3
        assert q_bias(agent, [one]) == pytest.approx(expected, rel=1e-6)
        short = episode([5.0], [0.0, 0.0], [7.0, 0.0], terminated=True)
        assert q_bias(agent, [one, short]) == pytest.approx((3 * expected + 2) / 4, rel=1e-6)


def test_the_mean_that_the_targets_lack() -> None:
    config = Config(auto_alpha=False, alpha=0.5, gamma=0.9, subtract_entropy_mean=True)
    agent = Agent(Policy(), Critic(), config)  # type: ignore[arg-type]
    agent.entropy_mean.fill_(2.0)
    one = episode([0.0], [0.0, 2.0], [3.0, 0.0], terminated=False)  # log π is its mean
    assert q_bias(agent, [one]) == pytest.approx(3.0, rel=1e-6)


def test_episodes_have_to_hold_their_steps() -> None:
    agent = Agent(Policy(), Critic(), Config())  # type: ignore[arg-type]
    for episodes in ([], [Episode(0, 0.0, 1, torch.zeros(2))]):
        with pytest.raises(ValueError, match="expected episodes with transitions"):
            q_bias(agent, episodes)
