# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Options of :mod:`inference.energy`, one preset for each energy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from inference.shared.clock import Clock
from inference.shared.errors import check_options, check_unread, positive, some_seeds

__all__ = ["PRESETS", "Config", "Guide", "check"]

Guide = Literal["implicit", "flow", "gaussian"]


@dataclass(frozen=True)
class Config:
    """Options of a fit."""

    energy: tyro.conf.Suppress[Literal["u1", "u2", "u3", "u4"]]
    """The energy; fixed by the preset."""
    guide: Literal["implicit", "flow", "gaussian", "all"] = "all"
    """The guide, or all three for the same time each."""
    budget_seconds: float = 60.0
    """Time of training of each guide. The schedules run over it, whatever the machine's speed."""
    clock: Clock = "wall"
    """What the budget is measured in: wall-clock, or this process's CPU time, which on one thread
    is the wall-clock of an idle core."""
    steps: int = 1_000_000
    """Training steps at most; the schedules run over whichever limit comes first."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """Seeds; everything is done for each."""
    threads: int = 1
    """CPU threads of torch; networks of this size gain nothing by more."""
    out: Path | None = None
    """Folder of the results; runs/energy-PRESET if left out."""

    beta_start: float = 0.1
    """Inverse temperature at the first step, in (0, 1]; it rises to 1 geometrically, ..."""
    beta_share: float = 0.4
    """... over this share of the run."""
    decay_start: float = 0.5
    """Share of the run after which step sizes fall, along a cosine, to zero."""
    average_decay: float = 0.998
    """Decay of the Polyak average of the guide, which is what is evaluated."""
    spread: float = 2.0
    """Scale of the guides' draws before training."""

    learning_rate: float = 5e-4
    """Implicit guide: step size of Adam."""
    batch_size: int = 1024
    """Implicit guide: draws per step."""
    noise_dim: int = 10
    """Implicit guide: width of the noise."""
    width: float = 0.5
    """Implicit guide: scale of its Gaussian before training."""
    input_scale: float = 3.0
    """Implicit guide: factor on the noise before the first layer."""
    hidden_dims: tuple[int, ...] = (64, 64, 64)
    """Implicit guide: widths of the hidden layers."""
    activation: Literal["elu", "relu", "silu", "softplus", "tanh"] = "silu"
    """Implicit guide: activation of the hidden layers."""
    moves: int = 24
    """Implicit guide: Metropolis moves at its end, of three a jump and two Langevin steps."""
    langevin_step_size: float = 0.04
    """Implicit guide: size of a Langevin step; they go round in 0.25 to 2 times this."""
    jump_scale: float = 2.0
    """Implicit guide: standard deviation of a jump."""
    num_score_samples: int = 1024
    """Implicit guide: draws by which the score is learned in a step."""
    num_score_updates: int = 1
    """Implicit guide: updates of the score network per step."""
    score_hidden_dim: int = 64
    """Implicit guide: width of the score network."""
    score_folds: int = 4
    """Implicit guide: optimizer steps of the score network per update."""
    score_learning_rate: float = 8e-3
    """Implicit guide: step size of the score network."""
    score_depth: int = 4
    """Implicit guide: hidden layers of the score network."""
    score_delta: float = 0.1
    """Implicit guide: scale of the noise by which the score is learned, in units of the plane."""

    flow_learning_rate: float = 2e-3
    """Flow: step size of Adam."""
    flow_batch_size: int = 256
    """Flow: draws per step."""
    flow_transforms: int = 3
    """Flow: number of autoregressive spline transforms."""
    flow_hidden_dims: tuple[int, ...] = (64, 64)
    """Flow: widths of the hidden layers of each."""
    flow_bins: int = 8
    """Flow: pieces of each spline."""

    gaussian_learning_rate: float = 1e-2
    """Gaussian: step size of Adam."""
    gaussian_batch_size: int = 512
    """Gaussian: draws per step."""

    draws: int = 4_000_000
    """Draws of each guide for the evaluation."""


PRESETS: dict[str, tuple[str, Config]] = {
    "u1": ("Two modes on a ring.", Config(energy="u1")),
    "u2": ("A ridge along a sine.", Config(energy="u2")),
    "u3": ("Two ridges that part and meet again.", Config(energy="u3")),
    "u4": ("A ridge that forks.", Config(energy="u4")),
}


#: Options that one guide alone reads.
_READ_BY: dict[Guide, tuple[str, ...]] = {
    "implicit": (
        *("learning_rate", "batch_size", "noise_dim", "width", "input_scale", "hidden_dims"),
        *("activation", "moves", "langevin_step_size", "jump_scale"),
        *("num_score_samples", "num_score_updates"),
        *(field.name for field in fields(Config) if field.name.startswith("score_")),
    ),
    "flow": tuple(field.name for field in fields(Config) if field.name.startswith("flow_")),
    "gaussian": tuple(field.name for field in fields(Config) if field.name.startswith("gaussian_")),
}


def check(config: Config) -> None:
    """Refuses options out of range, and those that the guide would ignore.

    :raises UserError: naming the first of them.
    """
    conditions = (
        *positive(
            config,
            *("budget_seconds", "steps", "threads", "draws", "spread", "width", "input_scale"),
            *("learning_rate", "flow_learning_rate", "gaussian_learning_rate"),
            *("batch_size", "flow_batch_size", "gaussian_batch_size"),
            *("langevin_step_size", "jump_scale", "score_hidden_dim", "score_depth"),
            *("score_folds", "score_learning_rate", "flow_transforms"),
        ),
        *some_seeds(config),
        (0 < config.beta_start <= 1, "beta-start", "a value in (0, 1]"),
        (0 <= config.beta_share <= 1, "beta-share", "a share in [0, 1]"),
        (0 <= config.decay_start < 1, "decay-start", "a share in [0, 1)"),
        (0 <= config.average_decay < 1, "average-decay", "a decay in [0, 1)"),
        (config.noise_dim >= 2, "noise-dim", "at least 2"),
        (min(config.hidden_dims, default=0) > 0, "hidden-dims", "positive widths"),
        (min(config.flow_hidden_dims, default=0) > 0, "flow-hidden-dims", "positive widths"),
        (config.flow_bins > 1, "flow-bins", "at least 2"),
        (config.moves >= 0, "moves", "no negative number"),
        (
            config.num_score_samples >= max(2, config.score_folds),
            "num-score-samples",
            "--score-folds, 2 at least",
        ),
        (config.num_score_updates >= 0, "num-score-updates", "no negative number"),
        (0 < config.score_delta <= 1, "score-delta", "a scale in (0, 1]"),
    )
    check_options(config, conditions)
    if config.guide != "all":
        others = (
            name for guide, names in _READ_BY.items() if guide != config.guide for name in names
        )
        default = PRESETS[config.energy][1]
        check_unread(config, default, others, reader=f"the {config.guide} guide")
