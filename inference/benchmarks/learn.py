# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Compares what agents learn, and Stable-Baselines3's SAC with them.

What ``python -m inference.bench learn`` runs: tasks, agents and seeds, one run after the other, in
folders ``TASK-AGENT-seedN``. Called again with the same options it leaves out what is done and
goes on with a run that has a checkpoint. Stable-Baselines3's SAC gets the options of the preset of
``sac`` but its own step size (3e-4 for all networks), sees the same wrapped environments, and is
evaluated by the same code with the same seeds.

``learning.csv`` has a row for each evaluation of each finished run of the folder, whichever call
made it; the table that is printed has, for each task and agent, mean and standard deviation over
seeds of the last evaluation's ``eval_return``, and of its ``eval_return_no_noise``.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from inference.agents.options import TASKS, AgentName, Config, check
from inference.agents.presets import PRESETS
from inference.shared.errors import UserError, check_options, needs, some_seeds
from inference.shared.randomness import seed_of
from inference.shared.rows import write_csv
from inference.shared.run import RunFolder, read_metrics

__all__ = ["Learn", "bench_learn", "table"]

COLUMNS = (
    *("step", "seconds", "eval_return", "eval_return_std"),
    *("eval_return_no_noise", "eval_return_no_noise_std"),
)

Learner = Literal["sac", "sac-ardae", "sac-nf", "sb3"]

#: Options on which the figures do not depend.
_MAY_DIFFER = ("device", "threads", "out", "resume", "record_video")


@dataclass(frozen=True)
class Learn:
    """Trains agents and Stable-Baselines3's on tasks, and compares their returns."""

    tasks: tuple[str, ...] = ("pendulum", "hopper", "halfcheetah")
    """Tasks, as in the names of presets."""
    agents: tuple[Learner, ...] = ("sac", "sac-ardae", "sb3")
    """Agents; sb3 is Stable-Baselines3's SAC."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; everything is done for each."""
    steps: int | None = None
    """Environment steps of a run; the preset's by default."""
    eval_every: int | None = None
    """Steps between evaluations; the preset's by default."""
    out: Path = Path("runs/learn")
    """Folder of the runs and of learning.csv."""


def bench_learn(options: Learn) -> Path:
    """Does the runs that are missing, and prints the table; returns learning.csv."""
    conditions = (
        *some_seeds(options),
        (bool(options.tasks), "tasks", "one at least"),
        (bool(options.agents), "agents", "one at least"),
    )
    check_options(options, conditions)
    unknown = {*options.tasks} - {*TASKS.values()}
    if unknown:
        raise UserError(f"--tasks: expected some of {', '.join(TASKS.values())}, found {unknown}")
    runs: dict[tuple[str, Learner, int], Config] = {}
    for seed in options.seeds:
        for task in options.tasks:
            for agent in options.agents:
                path = options.out / f"{task}-{agent}-seed{seed}"
                config = runs[task, agent, seed] = _config(options, task, agent, seed, path)
                check(config)
                if (path / "config.json").exists():
                    # The table would show a run of other options beside the others.
                    RunFolder.require(path, _options(config, agent), may_differ=_MAY_DIFFER)
    for (_, agent, _), config in runs.items():
        assert config.out is not None
        if not (config.out / "results.json").exists():
            _learn_sb3(config, config.out) if agent == "sb3" else _learn(config, config.out)
        _write(options.out)
    print(table({key: options.out / "{}-{}-seed{}".format(*key) for key in runs}))
    return options.out / "learning.csv"


def _config(options: Learn, task: str, agent: Learner, seed: int, path: Path) -> Config:
    name: AgentName = "sac" if agent == "sb3" else agent
    config = dataclasses.replace(PRESETS[f"{task}-{name}"][1], seed=seed, out=path)
    if options.steps is not None:
        config = dataclasses.replace(config, steps=options.steps)
    if options.eval_every is not None:
        config = dataclasses.replace(config, eval_every=options.eval_every)
    return config


def _options(config: Config, agent: Learner) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"agent": agent}


def _learn(config: Config, path: Path) -> None:
    from inference import sac

    if (path / "checkpoints" / "latest.pt").exists():
        config = dataclasses.replace(config, out=None, resume=path)
    else:
        _discard(path)  # stopped before its first checkpoint
    sac.run(config)


def _discard(path: Path) -> None:
    """Removes what a stopped run has left, nothing else."""
    if (path / "config.json").exists():
        shutil.rmtree(path)


def _learn_sb3(config: Config, path: Path) -> None:
    """Trains Stable-Baselines3's SAC; it cannot be resumed, so a stopped run begins anew."""
    # Not before: other benchmarks do without gymnasium.
    with needs("bench learn", "stable-baselines3", "rl,bench"):
        import gymnasium
        from stable_baselines3 import SAC
        from stable_baselines3.common.callbacks import BaseCallback
    from inference.agents.environments import wrap
    from inference.agents.rollout import Episode, evaluate, return_figures

    _discard(path)
    folder = RunFolder.create(path, _options(config, "sb3"), COLUMNS)
    model = SAC(
        "MlpPolicy",
        wrap(gymnasium.make(config.env), obs_limit=config.obs_limit),
        buffer_size=min(config.buffer_size, config.steps),
        learning_starts=config.learning_starts,
        batch_size=config.batch_size,
        tau=config.tau,
        gamma=config.gamma,
        ent_coef=f"auto_{config.alpha}" if config.auto_alpha else config.alpha,
        policy_kwargs={"net_arch": [*config.hidden_dims]},
        seed=config.seed,
        device=config.device,
    )
    started = time.perf_counter()

    def play(noise: bool) -> list[Episode]:
        def act(obs: Tensor) -> Tensor:
            return torch.from_numpy(model.predict(obs.numpy(), deterministic=not noise)[0])

        seed = seed_of(config.seed, "evaluation", model.num_timesteps)
        return evaluate(
            config.env,
            act,
            episodes=config.eval_episodes,
            seed=seed,
            obs_limit=config.obs_limit,
        )

    class Evaluations(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % config.eval_every and self.num_timesteps < config.steps:
                return True
            row = return_figures(play(noise=True), play(noise=False))
            row |= {"step": self.num_timesteps, "seconds": time.perf_counter() - started}
            folder.log(row)
            print(f"sb3 step {row['step']}: return {row['eval_return']:.1f}", flush=True)
            return True

    model.learn(config.steps, callback=Evaluations())
    folder.close()
    folder.write_json("results.json", {"steps": model.num_timesteps})


def _write(folder: Path) -> None:
    finished = {}
    for results in folder.glob("*-*-seed*/results.json"):
        name, seed = results.parent.name.rsplit("-seed", 1)
        if seed.isdigit():  # else a folder of another name, say a copy that was put aside
            finished[(*name.split("-", 1), int(seed))] = read_metrics(results.parent)
    rows: list[list[object]] = []
    for key, metrics in sorted(finished.items()):
        for step, *values in zip(*(metrics[column] for column in COLUMNS), strict=True):
            rows.append([*key, int(step), *values])
    write_csv(folder / "learning.csv", ("task", "agent", "seed", *COLUMNS), rows)


def table(runs: dict[tuple[str, str, int], Path]) -> str:
    """A Markdown table of the last evaluations."""
    lines = [
        "| task | agent | seeds | steps | return | without noise |",
        "|---|---|---|---|---|---|",
    ]
    for task, agent in dict.fromkeys(key[:2] for key in runs):
        found = [read_metrics(runs[k]) for k in runs if k[:2] == (task, agent)]
        shown = []
        for name in ("eval_return", "eval_return_no_noise"):
            values = [metrics[name][-1] for metrics in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.1f}{spread}")
        steps = int(found[0]["step"][-1])
        lines.append(f"| {task} | {agent} | {len(found)} | {steps} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)
