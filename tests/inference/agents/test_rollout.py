# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from PIL import Image

from inference.agents.rollout import (
    Collector,
    Episode,
    check_renders,
    evaluate,
    make_envs,
    record_episode,
    return_figures,
    wrap,
)
from inference.shared.errors import UserError
from inference.shared.randomness import forked_rng, load_rng_state, rng_state


class Count(gymnasium.Env[Any, Any]):
    """Observes the number of the step; ends after the third by termination, or by truncation."""

    def __init__(self, *, end: str = "termination", bad: str = "", length: int = 3) -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Box(np.float32(-3), np.float32(1), (1,), np.float32)
        self.end, self.bad, self.length, self.number = end, bad, length, 0
        self.last_action = np.zeros(1)

    def _obs(self) -> Any:
        broken = self.bad == "observation" and self.number == 2
        return np.array([np.nan if broken else self.number, self.last_action[0]])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.number, self.last_action = 0, np.zeros(1)
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.number, self.last_action = self.number + 1, action
        over = self.number == self.length
        reward = np.inf if self.bad == "reward" and self.number == 2 else float(self.number)
        return self._obs(), reward, over and self.end == "termination", over, {}


class Noisy(Count):
    """Its rewards come from NumPy's global generator."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, float(np.random.randn()), *rest  # type: ignore[return-value]  # noqa: NPY002


class Picture(Count):
    """Renders, or says why it cannot."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, *, render_mode: str | None = None, broken: bool = False) -> None:
        super().__init__()
        self.render_mode, self.broken = render_mode, broken

    def render(self) -> Any:
        if self.broken:
            raise RuntimeError("no display")
        return np.full((300, 400, 3), self.number, np.uint8)


class Spaces(Count):
    """With spaces that the agents cannot work in."""

    def __init__(self, *, kind: str) -> None:
        super().__init__()
        if kind == "discrete":
            self.action_space = Discrete(3)
        elif kind == "integer":
            self.action_space = Box(0, 5, (1,), np.int32)
        elif kind == "unbounded":
            self.action_space = Box(-np.inf, np.inf, (1,))
        else:
            self.observation_space = Dict({"a": Box(0, 1)})


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    kinds = [Count, Noisy, Picture, Spaces]
    for kind in kinds:
        name = f"test/{kind.__name__}-v0"
        gymnasium.register(name, entry_point=kind, disable_env_checker=True)
    gymnasium.register(
        *("test/Broken-v0", Picture), disable_env_checker=True, kwargs={"broken": True}
    )
    yield
    for name in ("Count", "Noisy", "Picture", "Spaces", "Broken"):
        del gymnasium.registry[f"test/{name}-v0"]


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


def test_integers_are_cut_off_as_real_numbers() -> None:
    class Bytes(Count):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = Box(0, 255, (2,), np.uint8)

        def _obs(self) -> Any:
            return np.array([self.number, 200], np.uint8)

    env = wrap(Bytes(), obs_limit=1.5)
    env.reset(seed=0)
    obs, *_ = env.step(np.zeros(1, np.float32))
    assert obs.tolist() == [1, 1.5]
    assert env.observation_space.contains(obs)


def test_actions_are_mapped_to_the_bounds() -> None:
    collector = Collector(make_envs("test/Count-v0", 1), seed=0, name="Count")
    for action, expected in ((-1.0, -3.0), (0.0, -1.0), (1.0, 1.0)):
        batch = collector.step(torch.tensor([[action]]))
        assert float(batch.next_obs[0, 1]) == pytest.approx(expected)
        assert float(batch.action) == action


def test_actions_stay_in_the_box() -> None:
    """Whatever the bounds and their rounding, also where both are the same."""
    low = np.float32([[-0.3, 0.1], [2.0, -7.7]])
    high = np.float32([[0.9, 0.7], [2.0, 3.3]])

    class Bounds(Count):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = Box(low, high)

        def _obs(self) -> Any:
            return np.zeros(2)

    env = wrap(Bounds())
    env.reset(seed=0)
    ones = np.ones(4, np.float32)
    for action in (ones, -ones, 0 * ones, torch.full((4,), 12.0).tanh().numpy()):
        env.step(action)
        reached = env.unwrapped.last_action  # type: ignore[attr-defined]
        assert env.unwrapped.action_space.contains(reached)
    assert np.array_equal(reached, high)


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


def test_seeds_of_a_moment_leave_all_generators_as_they_are() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seen = []
    for _ in range(2):
        with forked_rng(7):
            seen.append(draw())
    before = rng_state()
    with forked_rng(7):
        seen.append(draw())
    after = draw()
    load_rng_state(before)
    assert seen[0] == seen[1] == seen[2] != after == draw()


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


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("test/Spaces-v0", {"kind": "discrete"}, "expected actions in a Box, found Discrete"),
        ("test/Spaces-v0", {"kind": "unbounded"}, "expected bounded actions"),
        ("test/Spaces-v0", {"kind": "integer"}, "expected real actions, found Box"),
        ("test/Spaces-v0", {"kind": "dict"}, "expected observations in a Box, found Dict"),
        ("HalfCheetah-v77", {}, "expected the id of a registered environment"),
        ("NoSuchThing-v0", {}, "expected the id of a registered environment"),
        ("not an id", {}, "expected the id of a registered environment"),
        ("no_module_of_mine:Some-v0", {}, "No module named.*put its folder on PYTHONPATH"),
    ],
)
def test_bad_environments(env_id: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_envs(env_id, 1, **options)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gymnasium, "make_vec", missing)
    with pytest.raises(UserError, match=r'MuJoCo is not installed; pip install "pyro-ardae\[rl\]"'):
        make_envs("HalfCheetah-v5", 1)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("test/Count-v0", "an environment that renders pictures, found test/Count-v0; leave"),
        ("test/Broken-v0", "to render without a display, found: no display; set MUJOCO_GL=egl"),
    ],
)
def test_recording_what_cannot_be_rendered(env_id: str, message: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=message):
        check_renders(env_id)
    with pytest.raises(UserError, match=message):
        record_episode(env_id, lambda obs: obs[:, :1] * 0, tmp_path / "x.gif", seed=0)


def test_recording(tmp_path: Any) -> None:
    check_renders("test/Picture-v0")
    path = tmp_path / "x.gif"
    record_episode("test/Picture-v0", lambda obs: obs[:, :1] * 0, path, seed=0)
    with Image.open(path) as image:
        assert image.size == (240, 180)
