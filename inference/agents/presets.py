# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Presets of soft actor-critic: a task and an agent each."""

from __future__ import annotations

import dataclasses
from typing import get_args

from inference.agents.options import MULTI_GOAL, TASKS, AgentName, Config

__all__ = ["PRESETS"]

_DESCRIPTIONS = {
    "sac": "Gaussian policy",
    "sac-nf": "normalizing-flow policy",
    "sac-ardae": "implicit policy",
}


def _preset(env: str, agent: AgentName) -> Config:
    config = Config(env=env, agent=agent)
    if env.startswith("Humanoid"):
        config = dataclasses.replace(config, obs_limit=10.0)  # contact forces are in the thousands
    if env == "Pendulum-v1":
        config = dataclasses.replace(config, steps=10_000, learning_starts=500, eval_every=1000)
    if env == MULTI_GOAL:
        config = dataclasses.replace(
            config,
            steps=15_000,
            learning_starts=1000,
            eval_every=1000,
            checkpoint_every=5000,
            eval_episodes=200,
            buffer_size=100_000,
            hidden_dims=(128, 128),
            actor_learning_rate=1e-3,
            auto_alpha=False,
            alpha=0.3,  # at 0.5 a Gaussian's first step is wide enough for all four goals
        )
    return config


#: Description and options by name.
PRESETS: dict[str, tuple[str, Config]] = {
    config.preset: (f"{env}, {_DESCRIPTIONS[agent]}.", config)
    for env in TASKS
    for agent in get_args(AgentName)
    for config in [_preset(env, agent)]
}
