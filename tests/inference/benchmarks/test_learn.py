# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from inference.agents import rollout
from inference.agents.options import Config
from inference.agents.presets import PRESETS
from inference.agents.rollout import Act, Episode
from inference.benchmarks import learn as bench_learn
from inference.benchmarks.learn import Learn, table
from inference.shared.run import read_metrics


def metrics(path: Path, *rows: tuple[float, float]) -> Path:
    """A run folder with returns of evaluations, with and without noise."""
    path.mkdir()
    lines = [f"{4 * (index + 1)},{a},{b}" for index, (a, b) in enumerate(rows)]
    text = "\n".join(["step,eval_return,eval_return_no_noise", *lines]) + "\n"
    (path / "metrics.csv").write_text(text)
    return path


def test_table_has_sample_mean_and_deviation_of_the_last_evaluations(tmp_path: Path) -> None:
    lasts = ((1.0, 10.0), (2.0, 30.0), (6.0, 20.0))
    runs = {
        ("hopper", "sac", seed): metrics(tmp_path / f"{seed}", (100.0, 200.0), last)
        for seed, last in enumerate(lasts)
    }
    runs["hopper", "sb3", 0] = metrics(tmp_path / "sb3", (7.0, 8.0))
    # Squared deviations 4 + 1 + 9 and 100 + 100 + 0, over 2; of one run there is none.
    assert table(runs).splitlines()[2:] == [
        "| hopper | sac | 3 | 8 | 3.0 ± 2.6 | 20.0 ± 10.0 |",
        "| hopper | sb3 | 1 | 4 | 7.0 | 8.0 |",
    ]


class FakeSAC:
    """In place of Stable-Baselines3's agent: keeps what it is told, and learns nothing."""

    told: ClassVar[tuple[str, Any, dict[str, Any]]]

    def __init__(self, policy: str, env: Any, **options: Any) -> None:
        FakeSAC.told = policy, env, options
        self.num_timesteps = 0

    def predict(self, obs: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
        action = np.full((len(obs), 2), 0.0 if deterministic else 0.5, np.float32)
        return action, None

    def learn(self, steps: int, callback: Any) -> None:
        for self.num_timesteps in range(1, steps + 1):
            callback.num_timesteps = self.num_timesteps
            assert callback._on_step()


def play(
    env_id: str, act: Act, *, episodes: int, seed: int, obs_limit: float | None
) -> list[Episode]:
    """In place of episodes: returns that are the first action."""
    obs = torch.zeros(1, 2)
    return [Episode(0, float(act(obs)[0, 0]), 1, obs[0])] * episodes


@pytest.mark.parametrize("auto_alpha", [False, True])
def test_stable_baselines3_gets_the_options_of_the_preset(
    auto_alpha: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None of these is Stable-Baselines3's default.
    config = Config(
        env="pyro_ardae/MultiGoal-v0",
        steps=8,
        eval_every=4,
        buffer_size=700,
        learning_starts=3,
        batch_size=5,
        tau=0.25,
        gamma=0.875,
        alpha=0.375,
        auto_alpha=auto_alpha,
        hidden_dims=(8, 9),
    )
    agent, callbacks = ModuleType("stable_baselines3"), ModuleType("callbacks")
    agent.SAC, callbacks.BaseCallback = FakeSAC, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stable_baselines3", agent)
    monkeypatch.setitem(sys.modules, "stable_baselines3.common", ModuleType("common"))
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.callbacks", callbacks)
    monkeypatch.setattr(rollout, "evaluate", play)
    monkeypatch.setitem(PRESETS, "multigoal-sac", ("", config))
    learn = Learn(tasks=("multigoal",), agents=("sb3",), seeds=(11,), out=tmp_path)
    bench_learn.bench_learn(learn)

    policy, env, options = FakeSAC.told
    assert policy == "MlpPolicy"
    assert env.spec.id == config.env
    assert options == {
        "buffer_size": 8,  # there are no more steps
        "learning_starts": 3,
        "batch_size": 5,
        "tau": 0.25,
        "gamma": 0.875,
        "ent_coef": "auto_0.375" if auto_alpha else 0.375,
        "policy_kwargs": {"net_arch": [8, 9]},
        "seed": 11,
        "device": "cpu",
    }
    found = read_metrics(tmp_path / "multigoal-sb3-seed11")
    assert found["step"] == [4, 8]
    assert (found["eval_return"], found["eval_return_no_noise"]) == ([0.5, 0.5], [0.0, 0.0])
