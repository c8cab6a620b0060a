# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Rows of the VAE benchmark, and milliseconds of their training steps, model and score apart."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
import tyro
from torch import Tensor

from inference.autoencoders.data import Dataset
from inference.autoencoders.presets import PRESETS, Config, check
from inference.autoencoders.training import Training
from inference.shared.clock import Clock, clock_of
from inference.shared.errors import UserError
from inference.shared.precision import process_precision
from pyro_ardae import TraceImplicit_ELBO

__all__ = [
    "FixedImages",
    "baseline",
    "bench_rows",
    "check_rows",
    "config_of",
    "describe_rows",
    "step_times",
    "turn",
]


def config_of(row: str) -> Config:
    """The options of a row: those of a preset, and what is changed of them.

    :param str row: as in ``"sbmnist-mlp-implicit --fantasy-share 0"``.
    :raises UserError: if it does not start with the name of an MNIST preset.
    :raises SystemExit: for an option that ``inference.vae`` does not have.
    """
    name, *changes = shlex.split(row) or [""]
    if name not in PRESETS or PRESETS[name][1].data == "25gaussians":
        raise UserError(
            "--rows: expected MNIST presets of inference.vae, each with options of it or none, "
            f"found {row!r}"
        )
    return tyro.cli(Config, args=changes, default=PRESETS[name][1], prog=f"--rows {name}")


def check_rows(rows: Sequence[str], *, set_here: Sequence[str]) -> None:
    """Refuses rows that are none, or change what the benchmark itself sets.

    :param rows: as for :func:`config_of`, one at least.
    :param set_here: options that are the benchmark's to set.
    :raises UserError: naming the first.
    """
    if not rows:
        raise UserError("--rows: expected one at least, found none")
    for row in rows:
        config = config_of(row)
        preset = PRESETS[config.preset][1]
        for name in set_here:
            if getattr(config, name) != getattr(preset, name):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"--rows: expected no {option} in a row, found it in {row!r}")


def baseline(row: str, rows: Iterable[str]) -> str | None:
    """Of some rows, the one to compare another with: with the Gaussian guide and the same data and
    networks. If there are several, with the same options too, or else the first.

    :returns: ``None`` where there is none, or it is the row itself.
    """

    def compared(name: str) -> tuple[object, ...]:
        config = config_of(name)
        return config.task, config.images, config.seen_share

    options = shlex.split(row)[1:]
    found = [
        other
        for other in rows
        if config_of(other).guide == "gaussian" and compared(other) == compared(row)
    ]
    found.sort(key=lambda other: shlex.split(other)[1:] != options)
    return found[0] if found and found[0] != row else None


class _Stopwatch:
    """Wall-clock time so far, or this process's CPU time; a GPU is waited for."""

    def __init__(self, device: str, clock: Clock) -> None:
        self.device = device
        self.clock = clock_of(clock)

    def __call__(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return self.clock()


def turn(training: Training) -> int:
    """Takes as many steps as it takes until the score has been learned; their number."""
    for _ in range(training.config.score_interval):
        training.step()
    return training.config.score_interval


class FixedImages:
    """One minibatch, with pixels as dark as MNIST's: the arithmetic is the same for any."""

    def __init__(self, batch_size: int, device: str) -> None:
        self.mean = torch.full((784,), 0.13, device=device)
        self.batch = torch.bernoulli(self.mean.expand(batch_size, -1))

    def minibatch(self, step: int) -> Tensor:
        return self.batch

    def subset(self, split: str, num_points: int | None, seed: int) -> Tensor:
        return self.batch


class _Row:
    """A preset in training, and the time that its score estimators took."""

    def __init__(self, name: str, config: Config, data: Dataset, clock: _Stopwatch) -> None:
        self.config, self.clock, self.score_seconds = config, clock, 0.0
        self._enter()
        self.training = Training(config, data, name=name)
        self.training.step()  # builds the estimators
        loss = self.training.loss
        if isinstance(loss, TraceImplicit_ELBO):
            for estimator in loss.estimators.values():
                estimator.update = self._timed(estimator.update)
                estimator.forward = self._timed(estimator.forward)

    def _timed(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            start = self.clock()
            result = method(*args, **kwargs)
            self.score_seconds += self.clock() - start
            return result

        return call

    def _enter(self) -> None:
        """Sets what is global in the process as it is in the row's own run."""
        process_precision(self.config.device, tf32=self.config.tf32)

    def step(self) -> tuple[float, float]:
        """Takes as many steps as it takes until the score has been learned; seconds of one in all,
        and of them in the score estimators.
        """
        self._enter()
        self.score_seconds, start = 0.0, self.clock()
        count = turn(self.training)
        return (self.clock() - start) / count, self.score_seconds / count


def step_times(
    configs: Mapping[str, Config],
    data_of: Callable[[Config], Dataset],
    *,
    steps: int,
    warmup: int,
    clock: Clock,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Milliseconds of a training step of runs that take turns in one process: medians over turns,
    each of as many steps as it takes until the score has been learned.

    What counts as the score is the estimators' own work, their updates and queries; draws that the
    guide makes for them count as the model's. On a GPU the clock waits for both ends of each, which
    makes a step a little longer than in training.

    :param configs: options by name; all of one device.
    :param data_of: the data of a run.
    :param int steps: timed turns of each.
    :param int warmup: turns of each before the clock runs.
    :param str clock: ``"wall"``, or ``"cpu"`` for this process's CPU time.
    :param int seed: seed of weights, data and noise.
    :returns: by name all of a step, and what the score estimators take of it.
    """
    rows: dict[str, _Row] = {}
    for name, given in configs.items():
        # A step with fantasies takes longer, and most steps of a long run have them.
        config = dataclasses.replace(given, fantasy_start=0)
        pyro.set_rng_seed(seed)
        rows[name] = _Row(name, config, data_of(config), _Stopwatch(config.device, clock))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for index in range(warmup + steps):
        for name, row in rows.items():
            taken = row.step()
            if index >= warmup:
                times[name].append(taken)
    return {
        name: (1e3 * statistics.median(whole), 1e3 * statistics.median(score))
        for name, (whole, score) in ((n, zip(*taken, strict=True)) for n, taken in times.items())
    }


#: Options of a run that say nothing of a step.
_NOT_TIMED = (
    *("schedule", "steps", "budget_seconds", "threads", "data_dir", "download", "out", "resume"),
    *("decoder", "train_on_valid", "checkpoint_every", "valid_every", "valid_points"),
    *("valid_samples", "test_points", "test_samples", "guide_samples", "prior_weight"),
)


def bench_rows(
    rows: tuple[str, ...],
    *,
    steps: int,
    warmup: int,
    batch_size: int,
    precision: Literal["auto", "fp32", "tf32", "bf16"],
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Times training steps of presets that take turns in one process.

    :param tuple[str, ...] rows: as for :func:`config_of`.
    :param int steps: timed steps of each.
    :param int warmup: steps of each before the clock runs.
    :param int batch_size: images of a minibatch.
    :param str precision: precision of the matrix products.
    :param str device: torch device.
    :param int seed: seed of weights, data and noise.
    :returns: for each row ``ms`` a step, ``score_ms`` of it in the score estimators, medians, and
        ``ratio`` to the row of the Gaussian guide and the same networks, where that is among them.
    :raises UserError: for a row that is none, cannot run, or has one of these options itself.
    """
    options = {"batch_size": batch_size, "precision": precision, "device": device, "seed": seed}
    check_rows(rows, set_here=(*options, *_NOT_TIMED))
    configs = {name: dataclasses.replace(config_of(name), **options) for name in rows}
    for config in configs.values():
        check(config)
    times = step_times(
        configs,
        lambda config: FixedImages(config.batch_size, config.device),
        steps=steps,
        warmup=warmup,
        # On a CPU, others compete for it.
        clock="wall" if device.startswith("cuda") else "cpu",
        seed=seed,
    )
    figures: dict[str, Any] = {"rows": {}, "batch_size": batch_size, "precision": precision}
    for name, (total, score) in times.items():
        figures["rows"][name] = {"ms": total, "score_ms": score}
    for name, of_row in figures["rows"].items():
        other = baseline(name, rows)
        if other is not None:
            of_row["ratio"] = of_row["ms"] / figures["rows"][other]["ms"]
    return {**figures, "steps": steps, "device": device, "torch": torch.__version__}


def describe_rows(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{'row':36} {'ms a step':>10} {'model':>8} {'score':>8} {'ratio':>6}"]
    for name, of_row in figures["rows"].items():
        total, score = of_row["ms"], of_row["score_ms"]
        ratio = f"{of_row['ratio']:6.2f}" if "ratio" in of_row else ""
        lines.append(f"{name:36} {total:10.2f} {total - score:8.2f} {score:8.2f} {ratio}")
    return "\n".join(lines)
