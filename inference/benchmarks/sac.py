# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Times one soft actor-critic update of each agent against Stable-Baselines3's.

What ``python -m inference.bench sac`` runs: on the shapes of HalfCheetah (17 observations, 6
actions, batch 256), with transitions of noise, all in one process and taking turns, so that a slow
moment of the machine meets all of them. An update is drawing a batch, one step of each network,
and one of the targets. The agents have the options of their presets, and Stable-Baselines3 its
defaults, which are the same sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from inference.agents.agent import Agent
from inference.agents.build import build_critic, build_policy
from inference.agents.options import AgentName
from inference.agents.presets import PRESETS
from inference.agents.replay import Batch, Replay
from inference.shared.clock import Clock, clock_of, median_seconds
from inference.shared.errors import check_options, needs, one_seed

__all__ = ["Sac", "bench_sac", "describe_sac"]

OBS_DIM, ACTION_DIM, TRANSITIONS = 17, 6, 5000


@dataclass(frozen=True)
class Sac:
    """Times one soft actor-critic update of each agent and of Stable-Baselines3's."""

    updates: int = 200
    """Timed updates of each; they take turns."""
    warmup: int = 30
    """Updates of each before the clock runs."""
    clock: Clock = "wall"
    """What is measured: wall-clock time, or this process's CPU time, which on one thread is the
    wall-clock of an idle core."""
    threads: int = 1
    """CPU threads of torch."""
    batch_size: int = 256
    """Transitions of an update."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the agents' products between hidden layers; Stable-Baselines3 has fp32."""
    seed: int = 0
    """Seed of weights and data."""
    json: Path | None = None
    """Write the figures to this file too."""


def _transitions(count: int) -> Batch:
    return Batch(
        torch.randn(count, OBS_DIM),
        2 * torch.rand(count, ACTION_DIM) - 1,
        torch.randn(count),
        torch.randn(count, OBS_DIM),
        torch.zeros(count),
    )


def _build(name: AgentName, options: Sac) -> Callable[[], Any]:
    config = dataclasses.replace(
        PRESETS[f"halfcheetah-{name}"][1],
        batch_size=options.batch_size,
        precision=options.precision,
    )
    shape = config, OBS_DIM, ACTION_DIM
    agent = Agent(build_policy(*shape), build_critic(*shape), config)
    replay = Replay(TRANSITIONS, OBS_DIM, ACTION_DIM)
    replay.add(_transitions(TRANSITIONS))
    return lambda: agent.update(replay.sample(options.batch_size))


def _build_sb3(options: Sac) -> Callable[[], Any]:
    with needs("bench sac", "stable-baselines3", "rl,bench"):
        import gymnasium
        from stable_baselines3 import SAC
        from stable_baselines3.common.logger import configure

    class Shapes(gymnasium.Env[Any, Any]):
        """Spaces of HalfCheetah, without MuJoCo: nothing is stepped."""

        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    model = SAC(
        "MlpPolicy",
        Shapes(),
        batch_size=options.batch_size,
        buffer_size=TRANSITIONS,
        seed=options.seed,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    rows = _transitions(TRANSITIONS)
    for index in range(TRANSITIONS):
        obs, action, reward, next_obs, done = (part[index : index + 1].numpy() for part in rows)
        model.replay_buffer.add(obs, next_obs, action, reward, done, [{}])  # type: ignore[union-attr]
    return lambda: model.train(1, options.batch_size)


def bench_sac(options: Sac) -> dict[str, Any]:
    """Runs the benchmark; returns its figures: median milliseconds of an update, and ratios."""
    check_options(
        options,
        (
            (options.updates > 0, "updates", "a positive number"),
            (options.warmup >= 0, "warmup", "no negative number"),
            (options.batch_size > 1, "batch-size", "2 at least"),
            *one_seed(options),
        ),
    )
    torch.manual_seed(options.seed)
    jobs = {"sb3": _build_sb3(options)}
    jobs |= {name: _build(name, options) for name in get_args(AgentName)}
    median = median_seconds(
        jobs, turns=options.updates, warmup=options.warmup, clock=clock_of(options.clock)
    )
    return {
        "ms": {name: 1e3 * value for name, value in median.items()},
        "ratio_to_sb3": {
            name: value / median["sb3"] for name, value in median.items() if name != "sb3"
        },
        "updates": options.updates,
        "batch_size": options.batch_size,
        "clock": options.clock,
        "precision": options.precision,
        "threads": options.threads,
        "torch": torch.__version__,
    }


def describe_sac(figures: dict[str, Any]) -> str:
    """The figures in words, a line for each agent."""
    lines = []
    for name, ms in figures["ms"].items():
        ratio = figures["ratio_to_sb3"].get(name)
        shown = "" if ratio is None else f", {ratio:.2f} of Stable-Baselines3's"
        lines.append(f"{name}: {ms:.2f} ms an update{shown}")
    return "\n".join(lines)
