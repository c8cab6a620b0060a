# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.agents.environments import make_envs
from inference.agents.rollout import Collector, Episode, evaluate, return_figures
from inference.shared.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_environments")


@pytest.mark.parametrize("end", ["termination", "truncation"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_three_step_episode(end: str, num_envs: int) -> None:
    envs = make_envs("test/Count-v0", num_envs, end=end)
    collector = Collector(envs, seed=0, name="Count")
    batches = [collector.step(torch.zeros(num_envs, 1)) for _ in range(4)]
    for index in range(num_envs):
        before = [float(batch.obs[index, 0]) for batch in batches]
        after = [float(batch.next_obs[index, 0]) for batch in batches]
        # The third transition leads to the last observation, the fourth starts a new episode.
        assert before == [0, 1, 2, 0]
        assert after == [1, 2, 3, 1]
        assert [float(batch.reward[index]) for batch in batches] == [1, 2, 3, 1]
        terminated = [float(batch.terminated[index]) for batch in batches]
        assert terminated == [0, 0, float(end == "termination"), 0]
    finished = collector.take_finished()
    assert [(one.env, one.value, one.length) for one in finished] == [
        (index, 6.0, 3) for index in range(num_envs)
    ]
    assert all(float(one.last_obs[0]) == 3 for one in finished)
    assert collector.take_finished() == []
    assert collector.steps == 4 * num_envs


def test_observations_are_cut_off_at_a_limit() -> None:
    envs = make_envs("test/Count-v0", 2, obs_limit=1.5)
    assert float(np.abs(envs.single_observation_space.high).max()) == 1.5
    collector = Collector(envs, seed=0, name="Count")
    seen = [collector.step(torch.zeros(2, 1)).next_obs[0, 0] for _ in range(4)]
    assert [float(value) for value in seen] == [1, 1.5, 1.5, 1]  # the third is an episode's last
    (one,) = evaluate(
        "test/Count-v0", lambda obs: obs[:, :1] * 0, episodes=1, seed=0, obs_limit=1.5
    )
    assert float(one.last_obs[0]) == 1.5


def test_actions_are_mapped_to_the_bounds() -> None:
    collector = Collector(make_envs("test/Count-v0", 1), seed=0, name="Count")
    for action, expected in ((-1.0, -3.0), (0.0, -1.0), (1.0, 1.0)):
        batch = collector.step(torch.tensor([[action]]))
        assert float(batch.next_obs[0, 1]) == pytest.approx(expected)
        assert float(batch.action) == action


def test_endless_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.agents.rollout.ENDLESS", 2)
    with pytest.raises(UserError, match="expected episodes that end, found one of 2 steps"):
        evaluate("test/Count-v0", lambda obs: obs[:, :1], episodes=1, seed=0)


def test_seed_decides_everything() -> None:
    one = Collector(make_envs("Pendulum-v1", 2), seed=3, name="Pendulum")
    other = Collector(make_envs("Pendulum-v1", 2), seed=4, name="Pendulum")
    assert not torch.equal(one.obs, other.obs)
    other.reset(3)
    assert torch.equal(one.obs, other.obs)
    for _ in range(5):
        action = torch.rand(2, 1)
        assert torch.equal(one.step(action).next_obs, other.step(action).next_obs)


@pytest.mark.parametrize("bad", ["reward", "observation"])
def test_what_is_not_finite_is_refused(bad: str) -> None:
    collector = Collector(make_envs("test/Count-v0", 1, bad=bad), seed=0, name="Count-v0")
    collector.step(torch.zeros(1, 1))
    with pytest.raises(UserError, match=f"Count-v0.*in the {bad} of episode 0, step 2"):
        collector.step(torch.zeros(1, 1))


def test_a_policy_that_has_diverged_is_not_taken_for_a_bad_environment() -> None:
    collector = Collector(make_envs("test/Count-v0", 1), seed=0, name="Count-v0")
    with pytest.raises(UserError, match=r"Count-v0: expected finite actions.*the policy has div"):
        collector.step(torch.full((1, 1), torch.nan))
    assert collector.steps == 0


def test_evaluation_leaves_numpy_as_it_is() -> None:
    state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    values = [
        [one.value for one in evaluate("test/Noisy-v0", lambda obs: obs[:, :1] * 0, **options)]
        for options in ({"episodes": 4, "seed": seed} for seed in (1, 1, 2))
    ]
    assert values[0] == values[1] != values[2]
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]  # noqa: NPY002


def test_evaluation_counts_as_many_episodes_of_each_and_draws_from_its_own_seed() -> None:
    state = torch.get_rng_state()

    def act(obs: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(obs), 1)

    episodes = evaluate("test/Count-v0", act, episodes=20, seed=1, keep=True)
    assert [one.env for one in episodes].count(3) == 2
    assert len(episodes) == 20
    assert torch.equal(torch.get_rng_state(), state)
    again = evaluate("test/Count-v0", act, episodes=20, seed=1)
    assert all(torch.equal(a.last_obs, b.last_obs) for a, b in zip(episodes, again, strict=True))
    assert len(evaluate("test/Count-v0", act, episodes=1, seed=1)) == 1
    for one in episodes:
        steps = one.transitions
        assert steps is not None
        assert len(steps.reward) == one.length
        assert float(steps.reward.sum()) == pytest.approx(one.value)
        assert torch.equal(steps.obs[1:], steps.next_obs[:-1])
        assert torch.equal(steps.next_obs[-1], one.last_obs)


def test_return_figures_by_hand() -> None:
    noisy, still = (
        [Episode(0, value, 1, torch.zeros(1)) for value in values]
        for values in ((1.0, 3.0), (7.0, 7.0, 10.0))
    )
    assert return_figures(noisy, still) == pytest.approx(
        {
            "eval_return": 2.0,
            "eval_return_std": 1.0,
            "eval_return_no_noise": 8.0,
            "eval_return_no_noise_std": 2**0.5,
        }
    )
