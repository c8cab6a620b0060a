# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A bandit whose best policy is known: ``python -m inference.bandit [options]``.

Examples::

    python -m inference.bandit                                   # 1-D and 2-D, 60 s a run
    python -m inference.bandit --bandits 6d --agents sac-ardae --seeds 0 1 2

Four states, action values Q = α log p with a bimodal p. The policy is trained by the agent's own
steps with the exact Q as critic, so what is seen is the policy and the estimate of its entropy's
gradient. The best soft policy is p. Columns of results.csv, a row for each run and state:

- kl: KL(π‖p) in nats. The action's box is cut into cells, P their masses by quadrature, n of N
  draws in each, K cells hit: Σ (n/N) log(n/(N P)) - (K - 1) / (2 N);
- weight, weight_exact: mass of π and of p in the half-space of the first mode;
- log_prob_error: mean over draws of the policy of |estimated log q(z | s) - that of a histogram of
  --draws other draws of z|, of the implicit policy; log_prob_bias, the same without the magnitude;
- score_loss, stein, stein_se, log_z, width: as in docs/sac.md.

With a factorized bandit (6d) kl is the mean over coordinates, and smallest_mode and largest_mode
are the modes' weights relative to the exact ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from inference.agents.agent import Agent
from inference.agents.build import build_policy
from inference.agents.options import IMPLICIT, AgentName, Config, check
from inference.agents.policy import ImplicitPolicy
from inference.shared.clock import Clock, clock_of
from inference.shared.errors import (
    UserError,
    check_options,
    check_unread,
    positive,
    some_seeds,
    user_errors,
)
from inference.shared.grid import cell_divergence
from inference.shared.process import keep_freed_memory, use_threads
from inference.shared.rows import write_csv
from inference.shared.run import make_folder
from inference.shared.schedules import annealed, cosine_decay
from models.actors import log_tanh_slope
from models.environments import BANDITS, Bandit

__all__ = ["Options", "evaluate", "main", "train"]

#: Options of the agent that a bandit does not read.
_UNREAD = (
    *("env", "obs_limit", "steps", "num_envs", "seed", "device", "threads", "out", "resume"),
    *("eval_every", "eval_episodes", "checkpoint_every", "save_buffer", "record_video"),
    *("buffer_size", "learning_starts", "gamma", "tau", "learning_rate", "alpha"),
    *("target_entropy", "subtract_entropy_mean"),
)

#: Cells a side of the action's box, and quadrature points a side of each.
_CELLS = {1: 400, 2: 200}
_POINTS = {1: 16, 2: 4}


@dataclass(frozen=True)
class Options:
    """Options of the bandit."""

    bandits: tuple[Literal["1d", "2d", "6d"], ...] = ("1d", "2d")
    """Which bandits."""
    agents: tuple[AgentName, ...] = ("sac", "sac-ardae")
    """Which policies."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; everything is done for each."""
    seconds: float = 60.0
    """Time of training of each. The schedules run over it, whatever the machine's speed."""
    clock: Clock = "wall"
    """What the time is measured in: wall-clock, or this process's CPU time."""
    updates: int = 1_000_000
    """Updates at most; the schedules run over whichever limit comes first."""
    draws: int = 4_000_000
    """Draws of each state's policy for the evaluation."""
    threads: int = 1
    """CPU threads of torch."""
    out: Path = Path("runs/bandit")
    """Folder of results.csv."""
    alpha_start: float = 4.0
    """Factor on the temperature at first, falling to 1 geometrically, ..."""
    alpha_share: float = 0.7
    """... over this share of the time. From the final temperature on, a mode that is dropped once
    stays dropped."""
    decay_start: float = 0.5
    """Share of the time after which step sizes fall, along a cosine, to zero."""
    config: Config = dataclasses.field(
        default_factory=lambda: Config(
            auto_alpha=False, actor_learning_rate=1e-3, hidden_dims=(64, 64)
        )
    )
    """Options of the agent; those of environments and critics are not read."""


def train(options: Options, bandit: Bandit, agent_name: AgentName, seed: int) -> Agent:
    """Trains a policy on the exact Q; returns its agent."""
    torch.manual_seed(seed)
    config = dataclasses.replace(options.config, agent=agent_name, alpha=bandit.alpha)
    policy = build_policy(config, Bandit.NUM_STATES, bandit.action_dim)
    agent = Agent(policy, bandit, config)
    clock = clock_of(options.clock)
    score_rate, base = config.score_learning_rate, agent.log_alpha.clone()
    states = bandit.states().repeat(config.batch_size // Bandit.NUM_STATES, 1)
    started = clock()
    while True:
        progress = max((clock() - started) / options.seconds, agent.updates / options.updates)
        if progress >= 1:
            return agent
        factor = annealed(progress, options.alpha_start, options.alpha_share)
        agent.log_alpha.copy_(base + math.log(factor))
        decay = cosine_decay(progress, options.decay_start)
        agent.actor_optimizer.param_groups[0]["lr"] = config.actor_learning_rate * decay
        if isinstance(policy, ImplicitPolicy):
            policy.estimator.learning_rate = score_rate * max(0.1, decay)
            policy.optimizer.param_groups[0]["lr"] = policy.learning_rate * max(0.1, decay)
        agent.update_actor(states, policy.fit(states))
        agent.updates += 1


@torch.no_grad()
def _cells(values: Tensor, low: float, high: float, size: int) -> Tensor:
    """Counts of ``values [n, D]`` in a grid of ``size`` cells a side, flat."""
    index = ((values - low) * (size / (high - low))).floor().long().clamp_(0, size - 1)
    flat = torch.zeros(len(values), dtype=torch.long)
    for column in index.unbind(-1):
        flat = flat * size + column
    return torch.bincount(flat, minlength=size ** values.shape[1]).double()


def _log_masses(bandit: Bandit, obs: Tensor, dims: int) -> Tensor:
    """Log-masses of p in the cells of the box, flat, by the midpoint rule."""
    cells, points = _CELLS[dims], _POINTS[dims]
    fine = cells * points
    axis = torch.linspace(-1, 1, 2 * fine + 1, dtype=torch.float64)[1::2]
    grid = axis.unsqueeze(-1) if dims == 1 else torch.cartesian_prod(axis, axis)
    density = bandit.log_prob(obs.double().expand(len(grid), -1), grid).exp() * (2 / fine) ** dims
    shape = (cells, points) * dims
    sums = density.reshape(shape).sum(tuple(range(1, 2 * dims, 2))).flatten()
    return (sums / sums.sum()).clamp_min(1e-300).log()


def _draws(agent: Agent, obs: Tensor, count: int) -> Tensor:
    """``count`` draws of z in one state ``[4]``, ``[count, D]``."""
    parts = []
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        parts.append(agent.policy.actor.draw(obs.unsqueeze(0), size)[:, 0])
    return torch.cat(parts)


@torch.no_grad()
def evaluate(options: Options, bandit: Bandit, agent: Agent) -> list[dict[str, Any]]:
    """The rows of results of a policy, one for each state."""
    dims, rows = bandit.action_dim, []
    for state, obs in enumerate(bandit.states()):
        z = _draws(agent, obs, options.draws)
        action = z.tanh()
        row: dict[str, Any] = {"state": state}
        if bandit.factorized:
            row |= _factorized(bandit, state, obs, action)
        else:
            counts = _cells(action, -1, 1, _CELLS[dims])
            row["kl"], _ = cell_divergence(counts, _log_masses(bandit, obs, dims))
            along = action @ bandit.centers[1, state]
            row |= {
                "weight": float((along < 0).double().mean()),
                "weight_exact": Bandit.WEIGHTS[state],
            }
        if isinstance(agent.policy, ImplicitPolicy):
            row |= _log_prob_error(agent, obs, z) if dims < 3 else {}
            several = obs.expand(agent.config.batch_size, -1)
            row |= agent.policy.diagnostics(several)
        rows.append(row)
    return rows


def _factorized(bandit: Bandit, state: int, obs: Tensor, action: Tensor) -> dict[str, float]:
    one = Bandit(1, alpha=bandit.alpha)
    log_masses = _log_masses(one, obs, 1)
    columns = action.unsqueeze(-1).unbind(1)
    kls = [cell_divergence(_cells(x, -1, 1, _CELLS[1]), log_masses)[0] for x in columns]
    first = torch.tensor(Bandit.WEIGHTS[state], dtype=torch.float64)
    counts = _cells(action, -1, 1, 2)
    exact = torch.ones(1, dtype=torch.float64)
    for _ in range(bandit.action_dim):
        exact = (exact.unsqueeze(-1) * torch.stack([first, 1 - first])).flatten()
    relative = counts / counts.sum() / exact
    return {
        "kl": sum(kls) / len(kls),
        "smallest_mode": float(relative.min()),
        "largest_mode": float(relative.max()),
    }


def _log_prob_error(agent: Agent, obs: Tensor, z: Tensor) -> dict[str, float]:
    """Mean absolute error of log q(z | s) against a histogram."""
    assert isinstance(agent.policy, ImplicitPolicy)
    low, high, size = -5.0, 5.0, 1000 if z.shape[1] == 1 else 400
    width = (high - low) / size
    density = _cells(z, low, high, size) / len(z) / width ** z.shape[1]
    several = obs.expand(2000, -1)
    values, log_pi = agent.policy.sample(several)
    estimate = log_pi + log_tanh_slope(values)
    index = ((values - low) / width).floor().long().clamp_(0, size - 1)
    flat = index[:, 0] if z.shape[1] == 1 else index[:, 0] * size + index[:, 1]
    exact = density[flat]
    seen = exact > 0
    error = estimate[seen] - exact[seen].log()
    return {"log_prob_error": float(error.abs().mean()), "log_prob_bias": float(error.mean())}


def main() -> None:
    """Trains policies on the bandits and compares them with the best ones."""
    options = tyro.cli(Options, prog="python -m inference.bandit", description=__doc__)
    keep_freed_memory()
    with user_errors():
        use_threads(options.threads)
        _run(options)


def _run(options: Options) -> None:
    check_options(
        options,
        (
            *positive(options, "seconds", "updates"),
            *some_seeds(options),
            (bool(options.bandits), "bandits", "one at least"),
            (bool(options.agents), "agents", "one at least"),
            (options.draws > 1, "draws", "2 at least"),
            (options.alpha_start > 0, "alpha-start", "a positive factor"),
            (0 <= options.alpha_share < 1, "alpha-share", "a share in [0, 1)"),
            (0 <= options.decay_start < 1, "decay-start", "a share in [0, 1)"),
        ),
    )
    least = 8 * Bandit.NUM_STATES  # so that each state has all that the batch's places do
    if options.config.batch_size < least:
        raise UserError(
            f"--config.batch-size: expected {least} at least, found {options.config.batch_size}"
        )
    config = dataclasses.replace(options.config, agent="sac-ardae")
    check(config)
    defaults = Options().config
    check_unread(config, defaults, (*_UNREAD, "auto_alpha"), reader="the bandit")
    if "sac-ardae" not in options.agents:
        check_unread(config, defaults, IMPLICIT, reader="a policy with a density")
    for agent_name in options.agents:
        for name in options.bandits:  # what cannot be built is refused before anything runs
            config = dataclasses.replace(options.config, agent=agent_name)
            build_policy(config, Bandit.NUM_STATES, BANDITS[name].action_dim)
    make_folder(options.out)
    results = options.out / "results.csv"
    if results.exists():
        raise UserError(f"{results}: expected none yet, found one; give another --out")
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.bandits:
            for agent_name in options.agents:
                agent = train(options, BANDITS[name], agent_name, seed)
                head = {"bandit": name, "agent": agent_name, "seed": seed, "updates": agent.updates}
                found = [head | row for row in evaluate(options, BANDITS[name], agent)]
                rows += found
                for row in found:
                    shown = (
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    )
                    print(", ".join(shown), flush=True)
                columns = list(dict.fromkeys(column for row in rows for column in row))
                lines = ([row.get(column, "") for column in columns] for row in rows)
                write_csv(results, columns, lines)


if __name__ == "__main__":
    main()
