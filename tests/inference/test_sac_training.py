# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluations in a run of inference.sac: what they report, and that they change nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.agents.presets import PRESETS
from inference.agents.rollout import Episode
from inference.sac import Training
from inference.shared.errors import UserError
from tests.conftest import assert_equal
from tests.inference.conftest import Program

#: Options that make a run tiny.
SMALL: dict[str, Any] = {
    "hidden_dims": (16,),
    "batch_size": 8,
    "learning_starts": 4,
    "buffer_size": 200,
    "eval_episodes": 4,
}


def training(preset: str, **options: Any) -> Training:
    return Training(dataclasses.replace(PRESETS[preset][1], **SMALL | options))


def test_evaluations_leave_training_as_it_is(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.sac_plots.draw_run", lambda *arguments: [])
    options = [
        part
        for name, value in SMALL.items()
        for part in (f"--{name.replace('_', '-')}", *(value if name == "hidden_dims" else [value]))
    ]
    states = []
    for every in (8, 16):
        run = tmp_path / str(every)
        program(
            *("sac", "multigoal-sac-ardae", *options),
            *("--steps", 16, "--eval-every", every, "--out", run),
        )
        state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
        states.append({part: state[part] for part in ("agent", "replay", "rng", "collector")})
    assert states[0]["agent"]["updates"] > 8
    assert_equal(*states)


@pytest.mark.parametrize("agent", ["sac", "sac-ardae"])
def test_with_and_without_noise(agent: str) -> None:
    """Multi-goal has no chance of its own: without noise all of its episodes are the same."""
    row = training(f"multigoal-{agent}").evaluate()
    assert row["eval_return_no_noise_std"] == pytest.approx(0.0, abs=1e-4)
    assert row["eval_return_std"] > 0.1


def test_shares_of_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those where an episode has ended, not those that it has come near to."""
    run = training("multigoal-sac")
    ends = [(4.9, 0.0), (5.0, 0.9), (3.9, 0.0), (0.1, -5.0)]
    found = [Episode(0, 0.0, 1, torch.tensor(end)) for end in ends]
    monkeypatch.setattr(run, "play", lambda *, noise: found)
    monkeypatch.setattr("inference.sac.q_bias", lambda agent, episodes: 0.0)
    row = run.evaluate()
    assert [row[f"goal_{index}"] for index in range(4)] == [0.5, 0.0, 0.0, 0.25]


def test_metrics_are_of_all_updates() -> None:
    run = training("pendulum-sac", num_envs=3)
    for _ in range(5):
        run.step()
    assert run.agent.updates == len(run.metrics["q"]) == 9


def test_divergence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training("pendulum-sac")
    monkeypatch.setattr(run, "evaluate", dict)
    run.metrics = {"q": [torch.tensor(1.0), torch.tensor(torch.nan)]}
    with pytest.raises(UserError, match="Pendulum-v1: expected finite numbers, found nan as q"):
        run.row()


def test_numpy_goes_on_from_a_checkpoint() -> None:
    """Environments of others may draw from its global generator, at the start of episodes too."""
    run = training("pendulum-sac")
    reset = run.collector.envs.reset
    run.collector.envs.reset = lambda **options: (  # type: ignore[method-assign]
        reset(seed=np.random.randint(1000))  # noqa: NPY002
    )
    state = run.state()
    run.cut_episodes()
    first, obs = np.random.randn(), run.collector.obs.clone()  # noqa: NPY002
    run.load_state(state)
    assert torch.equal(run.collector.obs, obs)
    assert np.random.randn() == first  # noqa: NPY002


def test_a_row_has_means_and_the_largest_z(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training("pendulum-sac")
    monkeypatch.setattr(run, "evaluate", dict)
    run.metrics = {name: [torch.tensor(1.0), torch.tensor(3.0)] for name in ("max_z", "q")}
    row = run.row()
    assert (row["max_z"], row["q"]) == (3.0, 2.0)


def test_evaluations_play_other_episodes_each_time() -> None:
    """Which ones follows from the run's seed and the step alone."""

    def end(seed: int, step: int, *, noise: bool = True) -> torch.Tensor:
        run = training("pendulum-sac", seed=seed, eval_episodes=1)
        run.collector.steps = step
        run.agent.act = lambda obs, noise: 0 * obs[:, :1]  # type: ignore[method-assign]
        (episode,) = run.play(noise=noise)
        return episode.last_obs  # of a pendulum that swings freely

    first = end(0, 10)
    assert torch.equal(first, end(0, 10, noise=False))
    assert not torch.equal(first, end(0, 20))
    assert not torch.equal(first, end(1, 10))
