# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Options of soft actor-critic, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from inference.shared.errors import (
    check_device,
    check_options,
    check_unread,
    one_seed,
    positive,
)
from inference.shared.precision import training_dtype

__all__ = ["IMPLICIT", "MAY_DIFFER", "MULTI_GOAL", "TASKS", "AgentName", "Config", "check"]

AgentName = Literal["sac", "sac-nf", "sac-ardae"]

#: Id of :class:`models.environments.MultiGoal`.
MULTI_GOAL = "pyro_ardae/MultiGoal-v0"

#: Names of the tasks in presets, by environment.
TASKS = {
    "Pendulum-v1": "pendulum",
    "Hopper-v5": "hopper",
    "HalfCheetah-v5": "halfcheetah",
    "Walker2d-v5": "walker2d",
    "Ant-v5": "ant",
    "Humanoid-v5": "humanoid",
    "HumanoidStandup-v5": "humanoidstandup",
    MULTI_GOAL: "multigoal",
}


@dataclass(frozen=True)
class Config:
    """Options of a soft actor-critic run; each preset sets its own defaults."""

    env: str = "Pendulum-v1"
    """Environment by its gymnasium id: Box observations, bounded Box actions."""
    agent: tyro.conf.Suppress[AgentName] = "sac"
    """Gaussian, normalizing flow or implicit policy; fixed by the preset."""

    obs_limit: float | None = None
    """Magnitude at which observations are cut off; by default they are not."""
    steps: int = 100_000
    """Environment steps."""
    num_envs: int = 1
    """Environments that are stepped together; there is one update for each of their steps."""
    seed: int = 0
    """Seed of everything."""
    device: str = "cpu"
    """Torch device."""
    threads: int = 1
    """CPU threads of torch; networks of this size gain little by more."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the products between hidden layers of actor and critics. By default bf16 where
    the processor multiplies in it."""
    out: Path | None = None
    """Run folder; runs/sac/PRESET-seedN by default."""
    resume: Path | None = None
    """Run folder to go on with, given with the options of that run."""
    eval_every: int = 10_000
    """Environment steps between evaluations."""
    eval_episodes: int = 10
    """Episodes of an evaluation, with noise and as many without."""
    checkpoint_every: int = 10_000
    """Steps of each environment between checkpoints. Episodes are cut off there, as by a time
    limit: a small number leaves no whole ones."""
    save_buffer: bool = True
    """Whether checkpoints hold the replay buffer. Without it a resumed run fills a new one."""
    record_video: bool = False
    """Whether to record an episode of the trained agent, figures/episode.gif."""

    buffer_size: int = 1_000_000
    """Transitions that are kept."""
    learning_starts: int = 5_000
    """Environment steps with uniformly random actions before the first update."""
    batch_size: int = 256
    """Transitions of an update."""
    gamma: float = 0.99
    """Discount factor, in [0, 1)."""
    tau: float = 0.005
    """Share of the new weights in an update of the target critics, in (0, 1]."""
    learning_rate: float = 1e-3
    """Step size of Adam for critics and temperature."""
    actor_learning_rate: float = 3e-4
    """Step size of Adam for the actor."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of critics and actor."""

    alpha: float = 0.2
    """Temperature; at first, if it is tuned."""
    auto_alpha: bool = True
    """Whether the temperature is tuned such that the entropy meets a target."""
    target_entropy: float | None = None
    """That target in nats; minus the number of action dimensions by default."""
    subtract_entropy_mean: bool = False
    """Whether the running mean of log π is subtracted from it in the target of the critics."""

    noise_dim: int | None = None
    """sac-ardae: width of the actor's noise; by default 10, or the action's width."""
    noise_hidden_dims: tuple[int, ...] = (64, 64)
    """sac-ardae: widths of the actor's layers that see the noise."""
    noise_scale: float = 1.0
    """sac-ardae: factor on the noise before the actor's first layer."""
    spread: float = 1.0
    """sac-ardae: scale of the policy before the tanh, before training."""
    part_scale: float = 0.85
    """sac-ardae: how far apart the actor's parts are, before training."""
    part_bits: int | None = None
    """sac-ardae: the actor has 2 ** this parts; by default two more than it has actions, at most
    6."""
    even_share: float = 0.5
    """sac-ardae: share of an update's states in which the parts are drawn evenly."""
    min_scale: float = 0.3
    """sac-ardae: least scale of the noise that the actor's last layer adds."""
    bound: float = 4.0
    """sac-ardae: magnitude before the tanh from which on a draw is penalized."""
    jacobian_clamp: float = 0.0
    """sac-ardae: squared stretch of the noise below which is penalized; 0: none."""
    jacobian_exponent: float = 1.1
    """sac-ardae: the weight of that penalty is min(1 + update ** exponent / 1000, 1e5)."""
    score_draws: int = 1
    """sac-ardae: draws per state by which the score is learned in an update."""
    score_steps: int = 1
    """sac-ardae: optimizer steps of an update, each on one part of the draws."""
    score_hidden_dim: int = 64
    """sac-ardae: width of the score network."""
    score_depth: int = 2
    """sac-ardae: hidden layers of the score network."""
    score_learning_rate: float = 4e-3
    """sac-ardae: step size of the score network."""
    score_delta: float = 0.1
    """sac-ardae: scale of the noise by which the score is learned, in the policy's scales."""
    score_ratio_weight: float = 30.0
    """sac-ardae: weight of telling its draws from a Gaussian's in the training of the score."""
    score_normalizer_draws: int = 0
    """sac-ardae: draws for the normalizing constant of log π; 0: it is learned by the ratio."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of the products between hidden layers; the parameters' own for ``None``."""
        return training_dtype(self.precision, self.device)

    @property
    def preset(self) -> str:
        """Name of the preset that the environment and the agent belong to."""
        return f"{TASKS.get(self.env, self.env.replace('/', '-'))}-{self.agent}"


#: Options that a resumed run may change: none of them changes a step.
MAY_DIFFER = (
    *("steps", "device", "threads", "out", "resume", "eval_every", "eval_episodes"),
    *("record_video",),
)

#: Options that only an implicit policy has.
IMPLICIT = (
    *("noise_dim", "noise_hidden_dims", "noise_scale", "spread", "part_scale", "part_bits"),
    *("even_share", "min_scale", "bound", "jacobian_clamp", "jacobian_exponent"),
    *("score_draws", "score_steps", "score_hidden_dim", "score_depth", "score_learning_rate"),
    *("score_delta", "score_ratio_weight", "score_normalizer_draws"),
)


def check(config: Config) -> None:
    """Refuses options out of range, and those of an implicit policy for another.

    :raises UserError: naming the first of them.
    """
    conditions = (
        *one_seed(config),
        *positive(
            config,
            *("steps", "num_envs", "eval_every", "eval_episodes", "checkpoint_every", "threads"),
            *("learning_rate", "actor_learning_rate", "noise_dim", "obs_limit"),
            *("score_depth", "score_learning_rate", "score_steps"),
        ),
        (config.learning_starts >= 0, "learning-starts", "no negative number"),
        (min(config.hidden_dims, default=0) > 0, "hidden-dims", "positive widths"),
        (config.buffer_size >= config.num_envs, "buffer-size", "--num-envs at least"),
        (config.batch_size > 1, "batch-size", "at least 2"),
        (0 <= config.gamma < 1, "gamma", "a discount in [0, 1)"),
        (0 < config.tau <= 1, "tau", "a share in (0, 1]"),
        (config.alpha > 0, "alpha", "a positive temperature"),
        (min(config.noise_hidden_dims, default=0) > 0, "noise-hidden-dims", "positive widths"),
        (config.noise_scale > 0, "noise-scale", "a positive factor"),
        (config.spread > 0, "spread", "a positive scale"),
        (0 <= config.part_scale <= 0.9, "part-scale", "a scale in [0, 0.9]"),
        (config.part_bits is None or 0 < config.part_bits < 11, "part-bits", "1 to 10"),
        (0 <= config.even_share < 1, "even-share", "a share in [0, 1)"),
        (config.min_scale > 0, "min-scale", "a positive scale"),
        (config.bound > 0, "bound", "a positive magnitude"),
        (config.jacobian_clamp >= 0, "jacobian-clamp", "no negative number"),
        (config.score_hidden_dim > 0, "score-hidden-dim", "a positive width"),
        (0 < config.score_delta <= 1, "score-delta", "a scale in (0, 1]"),
        (config.score_ratio_weight >= 0, "score-ratio-weight", "no negative number"),
        (
            config.score_normalizer_draws >= (0 if config.score_ratio_weight else 1),
            "score-normalizer-draws",
            "a positive number, or 0 with a --score-ratio-weight",
        ),
        (config.score_draws >= config.score_steps, "score-draws", "--score-steps at least"),
    )
    check_options(config, conditions)
    check_device(config.device)
    if not config.auto_alpha:
        reader = "a fixed temperature (--no-auto-alpha)"
        check_unread(config, Config(), ("target_entropy",), reader=reader)
    if not config.jacobian_clamp:
        reader = "a run without --jacobian-clamp"
        check_unread(config, Config(), ("jacobian_exponent",), reader=reader)
    if config.agent != "sac-ardae":
        check_unread(config, Config(), IMPLICIT, reader=config.agent)
