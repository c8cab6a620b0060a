# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Small environments to test with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


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


@contextmanager
def registered() -> Iterator[None]:
    """Makes them known to gymnasium, as ``test/Count-v0`` and so on, for a while."""
    kinds = (Count, Noisy, Picture, Spaces)
    for kind in kinds:
        name = f"test/{kind.__name__}-v0"
        gymnasium.register(name, entry_point=kind, disable_env_checker=True)
    gymnasium.register("test/Broken-v0", Picture, disable_env_checker=True, kwargs={"broken": True})
    try:
        yield
    finally:
        for name in (*(kind.__name__ for kind in kinds), "Broken"):
            del gymnasium.registry[f"test/{name}-v0"]
