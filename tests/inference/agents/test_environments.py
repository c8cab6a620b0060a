# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from inference.agents.environments import make_envs, wrap
from inference.shared.errors import UserError
from tests.inference.agents.toy_environments import Count

pytestmark = pytest.mark.usefixtures("toy_environments")


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
