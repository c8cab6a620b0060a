# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Trains an agent by soft actor-critic: ``python -m inference.sac PRESET [options]``.

Examples::

    python -m inference.sac halfcheetah-sac-ardae --seed 1
    python -m inference.sac multigoal-sac-ardae
    python -m inference.sac pendulum-sac --num-envs 4
    MUJOCO_GL=egl python -m inference.sac hopper-sac --record-video
    python -m inference.sac hopper-sac --resume runs/sac/hopper-sac-seed0

The algorithm is :class:`inference.agents.agent.Agent`, its options are in
``inference.agents.presets``. The columns of metrics.csv are those of ``COLUMNS``, one row for each
evaluation; docs/sac.md has their formulas.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pyro
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from inference import sac_plots
from inference.agents.agent import Agent
from inference.agents.build import build_critic, build_policy
from inference.agents.calibration import q_bias
from inference.agents.environments import make_envs
from inference.agents.options import MAY_DIFFER, MULTI_GOAL, Config, check
from inference.agents.presets import PRESETS
from inference.agents.replay import Replay
from inference.agents.rollout import Collector, Episode, evaluate, return_figures
from inference.agents.video import check_renders, record_episode
from inference.shared.errors import UserError, user_errors
from inference.shared.process import keep_freed_memory, mujoco_warns_once, use_threads
from inference.shared.randomness import load_rng_state, rng_state, seed_of
from inference.shared.run import RunFolder, read_metrics
from models.environments import MultiGoal

__all__ = ["COLUMNS", "Training", "main", "run"]

COLUMNS = (
    *("step", "seconds", "updates", "steps_per_second", "train_return", "train_episodes"),
    *("eval_return", "eval_return_std", "eval_length", "eval_return_no_noise"),
    *("eval_return_no_noise_std", "goal_0", "goal_1", "goal_2", "goal_3"),
    *("critic_loss", "q", "q_policy", "q_bias", "log_pi", "alpha", "max_z"),
    *("score_loss", "stein", "stein_se", "log_z", "width"),
)

_DESCRIPTION = """Trains an agent by soft actor-critic; each preset below.

Options follow the preset: python -m inference.sac PRESET --help lists them."""


class Training:
    """All that a training run changes, and one step of it.

    :param Config config: options.
    :raises UserError: if the environment is not one that the agents can act in.
    """

    def __init__(self, config: Config) -> None:
        self.config, limit = config, config.obs_limit
        if config.env == MULTI_GOAL and limit is not None and limit < MultiGoal.LIMIT:
            raise UserError(
                f"--obs-limit: expected {MultiGoal.LIMIT:g} at least, for the goals to be seen, "
                f"found {limit:g}"
            )
        envs = make_envs(config.env, config.num_envs, obs_limit=limit)
        first = seed_of(config.seed, "episodes", 0)
        self.collector = Collector(envs, seed=first, name=config.env)
        obs_dim, action_dim = self.collector.obs_dim, self.collector.action_dim
        policy = build_policy(config, obs_dim, action_dim)
        self.agent = Agent(policy, build_critic(config, obs_dim, action_dim), config)
        self.replay = Replay(config.buffer_size, obs_dim, action_dim, device=config.device)
        self.seconds = 0.0
        self.metrics: dict[str, list[Tensor]] = {}
        """Of the updates since the last evaluation."""
        self.returns: list[float] = []
        """Of the episodes that ended since."""
        self.logged = 0, 0.0
        """Steps and seconds then."""

    @property
    def steps_done(self) -> int:
        """Environment steps that were taken."""
        return self.collector.steps

    def step(self) -> None:
        """Takes a step of each environment, then as many updates; notes their metrics."""
        config, replay = self.config, self.replay
        ready = replay.added >= config.learning_starts
        if ready or self.agent.updates:
            action = self.agent.act(self.collector.obs.to(config.device)).cpu()
        else:
            action = 2 * torch.rand(config.num_envs, self.collector.action_dim) - 1
        replay.add(self.collector.step(action))
        for _ in range(config.num_envs if ready else 0):
            for name, value in self.agent.update(replay.sample(config.batch_size)).items():
                self.metrics.setdefault(name, []).append(value)
        self.returns += [episode.value for episode in self.collector.take_finished()]

    def row(self) -> dict[str, float]:
        """A row of metrics.csv, by an evaluation and what was noted since the last one.

        :raises UserError: if training has diverged.
        """
        taken, elapsed = (now - then for now, then in zip(self._now(), self.logged, strict=True))
        row = {
            "step": self.steps_done,
            "updates": self.agent.updates,
            "steps_per_second": taken / max(1e-9, elapsed),
            "alpha": self.agent.alpha,
            "train_episodes": len(self.returns),
            **self.evaluate(),
        }
        for name, values in self.metrics.items():
            several = torch.stack(values)
            row[name] = float(several.max() if name == "max_z" else several.mean())
            if not math.isfinite(row[name]):
                raise UserError(
                    f"{self.config.env}: expected finite numbers, found {row[name]} as {name}: "
                    "training has diverged; lower the step sizes, --learning-rate first"
                )
        if self.returns:
            row["train_return"] = sum(self.returns) / len(self.returns)
        return row

    def forget(self) -> None:
        """Begins to note anew."""
        self.metrics, self.returns, self.logged = {}, [], self._now()

    def _now(self) -> tuple[int, float]:
        return self.steps_done, self.seconds

    def cut_episodes(self) -> None:
        """Begins new episodes with a seed of their own: where a resumed run can go on exactly,
        whatever an environment remembers.
        """
        self.collector.reset(seed_of(self.config.seed, "episodes", self.steps_done))

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict() if self.config.save_buffer else None,
            "collector": self.collector.state_dict(),
            "rng": rng_state(),
            "seconds": self.seconds,
            "metrics": {name: torch.stack(values) for name, values in self.metrics.items()},
            "returns": self.returns,
            "logged": self.logged,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self.agent.load_state_dict(state["agent"])
        if state["replay"] is not None:
            self.replay.load_state_dict(state["replay"])
        self.collector.load_state_dict(state["collector"])
        load_rng_state(state["rng"])
        self.cut_episodes()  # in the order of a run that goes on
        self.seconds, self.returns = state["seconds"], state["returns"]
        self.metrics = {name: [*values.unbind()] for name, values in state["metrics"].items()}
        self.logged = state["logged"]

    def evaluate(self) -> dict[str, float]:
        """Plays episodes apart from training, with and without noise; part of a row."""
        noisy = self.play(noise=True)
        row = return_figures(noisy, self.play(noise=False))
        row["eval_length"] = sum(episode.length for episode in noisy) / len(noisy)
        if self.config.env == MULTI_GOAL:
            reached = [MultiGoal.reached(episode.last_obs.numpy()) for episode in noisy]
            row |= {f"goal_{i}": reached.count(i) / len(reached) for i in range(4)}
        with torch.random.fork_rng():
            row["q_bias"] = q_bias(self.agent, noisy)
            if len(self.replay):
                obs = self.replay.sample(self.config.batch_size).obs
                row |= self.agent.policy.diagnostics(obs)
        return row

    def play(self, *, noise: bool) -> list[Episode]:
        """Evaluation episodes, others at each step: their seed follows from it and the run's, so
        agents of one seed meet the same.
        """
        config = self.config
        return evaluate(
            config.env,
            lambda obs: self.agent.act(obs, noise=noise),
            episodes=config.eval_episodes,
            seed=seed_of(config.seed, "evaluation", self.steps_done),
            device=config.device,
            obs_limit=config.obs_limit,
            keep=noise,  # q_bias reads them
        )


def train(training: Training, folder: RunFolder) -> None:
    """The training loop: steps, evaluations, checkpoints."""
    config = training.config
    started = time.perf_counter() - training.seconds
    progress = tqdm(total=config.steps, initial=training.steps_done, unit="step", mininterval=1.0)
    with progress:
        while training.steps_done < config.steps:
            before = training.steps_done
            training.step()
            training.seconds = time.perf_counter() - started
            progress.update(training.steps_done - before)
            last = training.steps_done >= config.steps
            if last or _passes(before, training.steps_done, config.eval_every):
                row = training.row()
                training.seconds = time.perf_counter() - started
                folder.log(row | {"seconds": training.seconds})
                training.forget()
                value = row["eval_return"]
                progress.set_postfix(eval_return=f"{value:.1f}")
                progress.write(
                    f"step {row['step']}: return {value:.1f} ± {row['eval_return_std']:.1f}, "
                    f"without noise {row['eval_return_no_noise']:.1f}, "
                    f"{row['steps_per_second']:.0f} steps/s"
                )
            of_each = before // config.num_envs, training.steps_done // config.num_envs
            regular = _passes(*of_each, config.checkpoint_every)
            if last or regular:
                # An end between checkpoints cuts episodes that a longer run does not.
                folder.save("latest", training.state() | {"may_go_on": regular})
                training.cut_episodes()


def _passes(before: int, after: int, every: int) -> bool:
    return before // every < after // every


def run(config: Config) -> Path:
    """Trains, evaluates, draws; returns the run folder."""
    check(config)
    pyro.set_rng_seed(config.seed)
    training = Training(config)
    if config.record_video:
        check_renders(config.env)
    options = dataclasses.asdict(config)
    if config.resume is None:
        path = config.out or Path("runs") / "sac" / f"{config.preset}-seed{config.seed}"
        folder = RunFolder.create(path, options, COLUMNS)
    else:
        path = config.resume
        if config.out not in (None, path):
            raise UserError(
                f"--out: a resumed run stays in its folder, expected it to be left out, found "
                f"{config.out}"
            )
        folder = RunFolder.open(path, options, COLUMNS, may_differ=MAY_DIFFER)
        state = folder.load("latest", config.device)
        done = state["collector"]["steps"]
        wanted = -(-config.steps // config.num_envs) * config.num_envs
        if wanted < done or (wanted == done and not read_metrics(path)):
            raise UserError(
                f"--steps: expected more than the {done} that this run has done, found "
                f"{config.steps}"
            )
        if wanted > done and not state["may_go_on"]:
            raise UserError(
                f"--steps: expected {done}, where this run has ended between two checkpoints, "
                f"found {config.steps}; going on from there would not be the longer run. Start "
                "one with --out, or let runs end at a checkpoint"
            )
        training.load_state(state)
        folder.record(options)
        folder.drop_rows_after(training.steps_done)
    folder.prepare()
    train(training, folder)
    folder.close()

    rows = read_metrics(path)
    tail = rows["eval_return"][-5:]
    results = {
        "steps": training.steps_done,
        "seconds": training.seconds,
        "eval_return": rows["eval_return"][-1],
        "eval_return_no_noise": rows["eval_return_no_noise"][-1],
        "eval_return_last_five": sum(tail) / len(tail),
    }
    if config.env == MULTI_GOAL:
        lasts = [rows[f"goal_{index}"][-5:] for index in range(4)]
        results["goal_shares_last_five"] = [sum(last) / len(last) for last in lasts]
    folder.write_json("results.json", results)
    figures = sac_plots.draw_run(path, training.agent, training.replay, config)
    if config.record_video:
        act = training.agent.act
        video = path / "figures" / "episode.gif"
        seed = seed_of(config.seed, "video", 0)
        where = {"device": config.device, "obs_limit": config.obs_limit}
        figures.append(record_episode(config.env, act, video, seed=seed, **where))
    print(f"run folder {path}, figures {', '.join(str(figure) for figure in figures)}")
    return path


def main() -> None:
    """Trains an agent by soft actor-critic."""
    config = tyro.extras.overridable_config_cli(
        PRESETS, prog="python -m inference.sac", description=_DESCRIPTION
    )
    keep_freed_memory()
    mujoco_warns_once()
    with user_errors():
        use_threads(config.threads)
        run(config)


if __name__ == "__main__":
    main()
