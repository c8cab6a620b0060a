# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of soft actor-critic: ``python -m inference.sac_plots RUN... --out FILE``.

Draws the learning curves of run folders, one line for each environment and agent, with the range
over its seeds.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from inference import plots
from inference.errors import UserError, user_errors
from inference.replay import Replay
from inference.rollout import evaluate
from inference.run import RunFolder, read_metrics
from inference.sac_agent import Agent
from inference.sac_presets import Config
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


def learning_curves(
    axes: Axes, runs: Mapping[str, Sequence[Mapping[str, list[float]]]], *, title: str
) -> Axes:
    """Draws evaluation return against steps: the mean over seeds, and their range.

    :param Axes axes: where to draw.
    :param runs: by label the metrics of each seed, see :func:`inference.run.read_metrics`.
    :param str title: title.
    """
    for label, seeds in runs.items():
        count = min(len(metrics["step"]) for metrics in seeds)
        steps = seeds[0]["step"][:count]
        values = np.array([metrics["eval_return"][:count] for metrics in seeds])
        (line,) = axes.plot(steps, values.mean(0), label=f"{label} ({len(seeds)} seeds)")
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    axes.set(title=title, xlabel="environment steps", ylabel="evaluation return")
    axes.legend(loc="upper left")
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
        axes.hist(actions, bins=200, range=(-1, 1), density=True, histtype="step", label=f"{index}")
    axes.set(title=title, xlabel="first coordinate of the action", ylabel="density")
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
    axes.scatter(*MultiGoal.GOALS.T, color="k", zorder=3)
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return axes


def plane_density(axes: Axes, agent: Agent, obs: Tensor, *, title: str) -> Axes:
    """Draws the density of two-dimensional actions in a state ``[obs_dim]``, by 100,000 draws."""
    actions = agent.act(obs.expand(100_000, -1)).cpu().numpy()
    axes.hist2d(*actions.T, bins=80, range=[[-1, 1], [-1, 1]], cmap="Blues")
    axes.set(title=title, xlabel="first coordinate of the action", ylabel="second", aspect="equal")
    return axes


def draw_run(path: Path, agent: Agent, replay: Replay, config: Config) -> list[Path]:
    """Writes the figures of a run: learning curve, action densities, multi-goal trajectories."""
    figure, axes = _figure(2)
    learning_curves(axes[0], {config.agent: [read_metrics(path)]}, title=config.env)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if len(replay):  # not in a run that was resumed without it
            obs = replay.sample(4).obs
            action_density(axes[1], agent, obs, title="policy in four states of the buffer")
        written = [plots.save(figure, path / "figures" / "run.png")]
        if config.env == "pyro_ardae/MultiGoal-v0":
            figure, axes = _figure(2)
            paths = multi_goal_paths(agent, config)
            trajectories(axes[0], paths, title=f"{config.agent}: {len(paths)} episodes")
            start = torch.zeros(2, device=config.device)
            plane_density(axes[1], agent, start, title="the first action")
            written.append(plots.save(figure, path / "figures" / "trajectories.png"))
    return written


def multi_goal_paths(agent: Agent, config: Config, count: int = 40) -> list[Tensor]:
    """Trajectories from the start, by following episodes, played side by side and in turn."""
    seen: list[Tensor] = []

    def act(obs: Tensor) -> Tensor:
        seen.append(obs.cpu())
        return agent.act(obs)

    episodes = evaluate(
        config.env, act, episodes=count, seed=config.seed + 20_000, device=config.device
    )
    paths: list[Tensor] = []
    stacked, played = torch.stack(seen), defaultdict[int, int](int)
    for one in episodes:
        first = played[one.env]
        played[one.env] += one.length
        followed = stacked[first : first + one.length, one.env]
        paths.append(torch.cat([followed, one.last_obs.unsqueeze(0)]))
    return paths


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    # Without pyplot: no global state, no display needed.
    figure = Figure(figsize=(5.5 * columns, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(1, columns)))


@dataclass(frozen=True)
class Options:
    """Learning curves of run folders."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; those of one environment and agent are its seeds."""
    out: Path = Path("learning.png")
    """The figure."""


def main() -> None:
    """Draws the learning curves of run folders."""
    options = tyro.cli(Options, prog="python -m inference.sac_plots", description=__doc__)
    with user_errors():
        if not options.runs:
            raise UserError("expected run folders, found none; give some, like runs/sac/*")
        found: dict[str, dict[str, list[dict[str, list[float]]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for path in options.runs:
            config, metrics = RunFolder.read_config(path), read_metrics(path)
            if not (config.keys() >= {"env", "agent"} and metrics.get("eval_return")):
                raise UserError(
                    f"{path}: expected a run of inference.sac with an evaluation, found none"
                )
            found[config["env"]][config["agent"]].append(metrics)
        figure, axes = _figure(len(found))
        for one, (env, agents) in zip(axes, found.items(), strict=True):
            learning_curves(one, agents, title=env)
        print(plots.save(figure, options.out))


if __name__ == "__main__":
    main()
