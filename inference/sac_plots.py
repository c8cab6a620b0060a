# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of soft actor-critic: ``python -m inference.sac_plots RUN... --out FILE``.

Draws the learning curves of run folders, or of a learning.csv of ``inference.bench learn``, one
line for each environment and agent, with the range over its seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from inference.agents.agent import Agent
from inference.agents.options import MAY_DIFFER, MULTI_GOAL, TASKS, Config
from inference.agents.replay import Replay
from inference.agents.rollout import evaluate
from inference.shared import plots
from inference.shared.errors import UserError, user_errors
from inference.shared.randomness import forked_rng, seed_of
from inference.shared.rows import read_rows
from inference.shared.run import RunFolder, make_folder, read_metrics
from models.environments import MultiGoal

__all__ = [
    "action_density",
    "draw_run",
    "learning_curves",
    "main",
    "multi_goal_paths",
    "plane_density",
    "trajectories",
]


#: Columns of a metrics.csv.
Metrics = dict[str, list[float]]


def learning_curves(
    axes: Axes, runs: Mapping[str, Sequence[Metrics]], *, title: str, order: Sequence[str] = ()
) -> Axes:
    """Draws evaluation return against steps: the mean over seeds, and their range.

    :param Axes axes: where to draw.
    :param runs: by label the metrics of each seed, see :func:`inference.shared.run.read_metrics`.
    :param str title: title.
    :param order: labels by which colours are given, for one agent's to be the same in all axes.
    """
    order = [*dict.fromkeys([*order, *runs])]
    for label, seeds in runs.items():
        curves = [dict(zip(one["step"], one["eval_return"], strict=True)) for one in seeds]
        steps = sorted(set.intersection(*({*curve} for curve in curves)))  # of all seeds
        if not steps:
            raise UserError(
                f"{label}: expected seeds that were evaluated after the same steps, found none in "
                "common; draw them apart"
            )
        values = np.array([[curve[step] for step in steps] for curve in curves])
        number = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
        color = f"C{order.index(label)}"
        axes.plot(steps, values.mean(0), label=f"{label} ({number})", color=color)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
    axes.set(title=title, xlabel="environment steps", ylabel="evaluation return")
    axes.legend(loc="best")
    return axes


@torch.no_grad()
def action_density(axes: Axes, agent: Agent, obs: Tensor, *, title: str) -> Axes:
    """Draws the density of the first coordinate of the action in chosen states, by 20,000 draws.

    :param Axes axes: where to draw.
    :param Agent agent: the agent.
    :param Tensor obs: ``[n, obs_dim]``.
    :param str title: title.
    """
    for index, one in enumerate(obs):
        actions = agent.act(one.expand(20_000, -1))[:, 0].cpu().numpy()
        label = f"state {index + 1}"
        axes.hist(actions, bins=80, range=(-1, 1), density=True, histtype="step", label=label)
    axes.set(title=title, xlabel="first coordinate of the action", ylabel="density")
    axes.legend(loc="best")
    return axes


def trajectories(axes: Axes, paths: Sequence[Tensor], *, title: str) -> Axes:
    """Draws trajectories of the multi-goal point over the distance term of its reward.

    :param Axes axes: where to draw.
    :param paths: positions ``[steps, 2]`` of each.
    :param str title: title.
    """
    limit = MultiGoal.LIMIT
    axis = np.linspace(-limit, limit, 141)
    points = np.stack(np.meshgrid(axis, axis), -1)
    distance = np.square(points[..., None, :] - MultiGoal.GOALS).sum(-1).min(-1)
    axes.contour(axis, axis, -distance, levels=12, cmap="Greys", linewidths=0.6)
    for index, path in enumerate(paths):
        axes.plot(*path.cpu().numpy().T, linewidth=0.8, alpha=0.7, color=f"C{index % 10}")
    for goal in MultiGoal.GOALS:
        axes.add_patch(Circle(goal, MultiGoal.RADIUS, color="k", alpha=0.3))
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set(xlabel="first coordinate of the position", ylabel="second")
    return axes


def plane_density(axes: Axes, agent: Agent, obs: Tensor, *, title: str) -> Axes:
    """Draws the density of two-dimensional actions in a state ``[obs_dim]``, by 100,000 draws."""
    actions = agent.act(obs.expand(100_000, -1)).cpu().numpy()
    axes.hist2d(*actions.T, bins=80, range=[[-1, 1], [-1, 1]], cmap="Blues")
    axes.set(title=title, xlabel="first coordinate of the action", ylabel="second", aspect="equal")
    return axes


def draw_run(path: Path, agent: Agent, replay: Replay, config: Config) -> list[Path]:
    """Writes the figures of a run: learning curve, action densities, multi-goal trajectories."""
    known = len(replay) > 0  # not in a run that was resumed without it
    figure, axes = plots.subplots(1, 1 + known, width=5.5, height=4.5)
    learning_curves(axes[0], {config.agent: [read_metrics(path)]}, title=config.env)
    with forked_rng(config.seed):
        if known:
            obs = replay.sample(4).obs
            action_density(axes[1], agent, obs, title="policy in four states of the buffer")
        written = [plots.save(figure, path / "figures" / "run.png")]
        if config.env == MULTI_GOAL:
            figure, axes = plots.subplots(1, 2, width=5.5, height=4.5)
            paths = multi_goal_paths(agent, config)
            trajectories(axes[0], paths, title=f"{config.agent}: {len(paths)} episodes")
            start = torch.zeros(2, device=config.device)
            plane_density(axes[1], agent, start, title="the first action")
            written.append(plots.save(figure, path / "figures" / "trajectories.png"))
    return written


def multi_goal_paths(agent: Agent, config: Config, count: int = 40) -> list[Tensor]:
    """Trajectories from the start."""
    seed = seed_of(config.seed, "paths", 0)
    options = {"device": config.device, "obs_limit": config.obs_limit}
    episodes = evaluate(config.env, agent.act, episodes=count, seed=seed, keep=True, **options)
    steps = [episode.transitions for episode in episodes]
    return [torch.cat([one.obs, one.next_obs[-1:]]) for one in steps if one is not None]


@dataclass(frozen=True)
class Options:
    """Learning curves of run folders or tables."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders, or a learning.csv; those of one environment and agent are its seeds, with the
    same options."""
    out: Path = Path("runs/learning.png")
    """The figure."""


def _read(path: Path) -> list[tuple[str, str, int, Metrics]]:
    """Environment, agent, seed and metrics of a run, or of each one of a table."""
    if path.suffix == ".csv":
        return _read_table(path)
    config, metrics = RunFolder.read_config(path), read_metrics(path)
    if not (config.keys() >= {"env", "agent", "seed"} and metrics.get("eval_return")):
        raise UserError(f"{path}: expected a run of inference.sac with an evaluation, found none")
    return [(config["env"], config["agent"], config["seed"], metrics)]


def _read_table(path: Path) -> list[tuple[str, str, int, Metrics]]:
    envs = {task: env for env, task in TASKS.items()}
    found: dict[tuple[str, str, int], Metrics] = defaultdict(lambda: defaultdict(list))
    columns = ("task", "agent", "seed", "step", "eval_return")
    remedy = "give a learning.csv of inference.bench learn"
    for (task, agent, seed), row in read_rows(path, columns, key=3, remedy=remedy):
        if task not in envs:
            raise UserError(f"{path}: expected tasks of {', '.join(envs)}, found {task}; {remedy}")
        for name, value in row.items():
            found[envs[task], agent, seed][name].append(value)
    if not found:
        raise UserError(f"{path}: expected runs, found none; {remedy}")
    return [(*key, metrics) for key, metrics in found.items()]


def _refuse_others(path: Path, first: Path) -> None:
    """Runs whose mean is drawn differ in the seed alone."""
    recorded, expected = RunFolder.read_config(path), RunFolder.read_config(first)
    for name in sorted({*recorded, *expected} - {"seed", *MAY_DIFFER}):
        values = expected.get(name), recorded.get(name)
        if values[0] != values[1]:
            raise UserError(
                f"{path}: expected {name} {values[0]!r}, as in {first}, found {values[1]!r}; draw "
                "runs of other options apart"
            )


def main() -> None:
    """Draws the learning curves of run folders or tables."""
    options = tyro.cli(Options, prog="python -m inference.sac_plots", description=__doc__)
    with user_errors():
        if not options.runs:
            raise UserError("expected run folders, found none; give some, like runs/sac/*")
        found: dict[str, dict[str, list[Metrics]]] = defaultdict(lambda: defaultdict(list))
        seen, firsts = set(), {}
        for path in options.runs:
            for env, agent, seed, metrics in _read(path):
                if (env, agent, seed) in seen:
                    raise UserError(
                        f"{path}: expected one run of each environment, agent and seed, found "
                        f"another of {env}, {agent}, seed {seed}; draw them apart"
                    )
                seen.add((env, agent, seed))
                if path.suffix != ".csv":
                    first = firsts.setdefault((env, agent), path)
                    _refuse_others(path, first)
                found[env][agent].append(metrics)
        figure, axes = plots.subplots(1, len(found), width=5.5, height=4.5)
        order = [agent for agents in found.values() for agent in agents]
        for one, (env, agents) in zip(axes, found.items(), strict=True):
            learning_curves(one, agents, title=env, order=order)
        make_folder(options.out.parent)
        print(plots.save(figure, options.out))


if __name__ == "__main__":
    main()
