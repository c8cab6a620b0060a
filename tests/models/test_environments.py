# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from models.environments import BANDITS, Bandit, MultiGoal


@pytest.mark.filterwarnings("ignore:.*render:UserWarning")
def test_gymnasium_finds_nothing_wrong() -> None:
    check_env(gymnasium.make("pyro_ardae/MultiGoal-v0").unwrapped, skip_render_check=True)


def test_multi_goal_reward_by_hand() -> None:
    env = MultiGoal(reward_scale=0.1)
    start, _ = env.reset(seed=0)
    obs, reward, terminated, truncated, _ = env.step(np.array([0.5, -0.2]))
    assert np.allclose(obs - start, [0.5, -0.2])
    nearest = min(np.square(obs - goal).sum() for goal in ((5, 0), (-5, 0), (0, 5), (0, -5)))
    assert reward == pytest.approx(0.1 * (-nearest - 30 * (0.5**2 + 0.2**2)))
    assert not terminated
    assert not truncated


def test_multi_goal_starts_at_or_around_the_origin() -> None:
    assert np.array_equal(MultiGoal().reset(seed=0)[0], np.zeros(2))
    around = MultiGoal(start_scale=0.1)
    starts = np.stack([around.reset(seed=seed)[0] for seed in range(400)])
    assert np.allclose(starts.std(0), 0.1, rtol=0.15)


def test_multi_goal_ends_at_a_goal_and_at_its_time_limit() -> None:
    env = gymnasium.make("pyro_ardae/MultiGoal-v0")
    env.reset(seed=0)
    for _ in range(5):
        obs, reward, terminated, _, info = env.step(np.array([0.0, -0.95]))
    assert terminated
    assert info["goal"] == 3
    distance = float(np.square(obs - [0, -5]).sum())
    assert reward == pytest.approx(0.1 * (10 - distance - 30 * 0.95**2), abs=1e-5)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(30)]
    assert ends[-1] == (False, True)
    assert not any(terminated or truncated for terminated, truncated in ends[:-1])


def test_multi_goal_is_the_same_for_all_goals() -> None:
    # A turn by 90 degrees maps goals to goals: rewards along turned paths are equal.
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    rewards = []
    for power in range(4):
        env = MultiGoal()
        env.reset(seed=0)
        env._position = np.linalg.matrix_power(turn, power) @ np.array([0.3, 0.1])
        action = np.linalg.matrix_power(turn, power) @ np.array([0.7, 0.2])
        rewards.append(env.step(action)[1])
    assert np.allclose(rewards, rewards[0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["1d", "2d"])
def test_bandit_density_integrates_to_one(name: str) -> None:
    bandit = BANDITS[name]
    n = 1000
    axis = torch.linspace(-1, 1, 2 * n + 1)[1::2]
    grid = torch.cartesian_prod(*[axis] * bandit.action_dim).view(-1, bandit.action_dim)
    for state, obs in enumerate(bandit.states()):
        density = bandit.log_prob(obs.expand(len(grid), -1), grid).exp()
        cell = (2 / n) ** bandit.action_dim
        assert float(density.sum() * cell) == pytest.approx(1, abs=1e-4)
        first = grid @ bandit.centers[1, state].double() < 0
        weight = float(density[first].sum() * cell)
        assert weight == pytest.approx(Bandit.WEIGHTS[state], abs=2e-3)


def test_bandit_of_factors_is_the_product() -> None:
    bandit, one = BANDITS["6d"], BANDITS["1d"]
    obs, action = bandit.states(), 2 * torch.rand(4, 6) - 1
    product = sum(one.log_prob(obs, action[:, i : i + 1]) for i in range(6))
    assert torch.allclose(bandit.log_prob(obs, action), product, atol=1e-4)
    assert torch.allclose(bandit(obs, action), 0.2 * product, atol=1e-4)
