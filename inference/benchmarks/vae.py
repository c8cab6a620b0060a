# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Trains VAE presets for the same time each and compares them: ``python -m inference.bench vae``.

For each row, a preset of ``inference.vae`` with options of it or none, it first measures the
milliseconds of a training step, model and score estimator apart, all rows taking turns in one
process. The number of steps of a run is what the budget holds at that rate, with a tenth kept back
for validations, and the preset's schedule is stretched to it. With a clock on the wall the run also
ends with the budget; CPU time is only what steps are timed in. Each is evaluated by importance
sampling on the test images and by annealed importance sampling on a random subset
(:mod:`inference.autoencoders.tight`).

The folder holds a run folder for each row and seed, ``config.json`` with what they have in common,
``steps.csv``, ``results.csv`` and ``table.md`` (:mod:`inference.benchmarks.vae_table`). The same
command goes on where it was stopped: finished runs and evaluations are skipped, a run that was
interrupted is resumed from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pyro
import tyro

from inference.autoencoders.evaluation import describe_tight, evaluate_tight, restore
from inference.autoencoders.presets import Config, build_data, check
from inference.autoencoders.tight import Tight, check_tight
from inference.benchmarks.rows import check_rows, config_of, step_times
from inference.benchmarks.vae_table import (
    STEP_COLUMNS,
    collect,
    folder_name,
    read_steps,
    table,
    write_results,
)
from inference.shared.clock import Clock
from inference.shared.errors import UserError, check_device, check_options, positive, some_seeds
from inference.shared.files import write_text
from inference.shared.rows import Row, write_rows
from inference.shared.run import RunFolder, make_folder
from inference.vae import run

__all__ = ["Vae", "bench_vae"]

#: Share of the budget that training steps may take; the rest is for validations.
STEP_SHARE = 0.9


@dataclass(frozen=True)
class Vae:
    """Trains VAE presets for the same time each and compares them."""

    rows: tuple[str, ...] = ("sbmnist-mlp-gaussian", "sbmnist-mlp-implicit")
    """Presets of inference.vae, each with options of it or none:
    "sbmnist-mlp-implicit --fantasy-share 0"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each."""
    budget_seconds: float = 3600.0
    """Time of each training run, validations included, by --clock."""
    steps: int | None = None
    """Steps of each run in place of those that the budget holds; with --clock wall the budget still
    ends it."""
    threads: int = 1
    """CPU threads of torch."""
    device: str = "cpu"
    """Torch device."""
    out: Path = Path("runs/bench-vae")
    """Folder of runs and results."""
    data_dir: Path | None = None
    """Folder of binarized_mnist.npz; PYRO_ARDAE_DATA or ./data by default."""
    timed_steps: int = 50
    """Timed training steps of each row."""
    warmup: int = 10
    """Steps of each before the clock runs."""
    clock: Clock = "wall"
    """What times the steps: wall-clock time, or this process's CPU time, which on one thread is the
    wall-clock of an idle core. With "cpu" a run takes its number of steps however long they last,
    so that runs on a busy machine can be compared."""
    test_points: int | None = None
    """Test images of the importance-sampled figure; all by default."""
    test_samples: int = 1000
    """Importance samples for each of them."""
    tight: Annotated[Tight, tyro.conf.arg(name="")] = field(default_factory=Tight)
    """Options of annealed importance sampling."""


def _step_times(rows: Iterable[str], options: Vae) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of each row: all, in the score estimators, the rest."""
    changes = {"device": options.device, "data_dir": options.data_dir}
    times = step_times(
        {row: dataclasses.replace(config_of(row), **changes) for row in rows},
        build_data,
        steps=options.timed_steps,
        warmup=options.warmup,
        clock=options.clock,
        seed=0,
    )
    return {
        row: {"step_ms": step, "model_ms": step - score, "score_ms": score}
        for row, (step, score) in times.items()
    }


def bench_vae(options: Vae) -> Path:
    """Runs what the folder lacks, then writes the table; returns the folder."""
    check_rows(options.rows, set_here=_SET_HERE)
    if len({folder_name(row) for row in options.rows}) < len(options.rows):
        found = ", ".join(map(repr, options.rows))
        raise UserError(f"--rows: expected different ones, found {found}")
    check_device(options.device)
    conditions = positive(options, "steps", "budget_seconds", "timed_steps")
    check_options(options, [*conditions, *some_seeds(options)])
    for row in options.rows:
        config = _config(row, options.seeds[0], options)
        check(config)
        check_tight(options.tight, config)
    make_folder(options.out)
    _settle(options)
    path = options.out / "steps.csv"
    steps = read_steps(path)
    missing = tuple(row for row in options.rows if row not in steps)
    if missing:
        known = [row for row in steps if row in options.rows] or [*steps][:1]
        steps |= _at_pace(_step_times([*known, *missing], options), steps)
        write_rows(path, {(row,): figures for row, figures in steps.items()}, STEP_COLUMNS)
    for row in options.rows:
        print("{}: {step_ms:.2f} ms a step, {score_ms:.2f} of it score".format(row, **steps[row]))
    runs = [(row, seed) for seed in options.seeds for row in options.rows]
    for row, seed in runs:
        path = _folder(options, row, seed)
        if not _finished(path):
            _train(path, row, seed, steps[row]["step_ms"], options)
        if not _evaluated(path, options.tight):
            config, vae = restore(path, data_dir=options.data_dir, device=options.device)
            figures = evaluate_tight(path, config, vae, options.tight)
            print(f"{path.name}: " + describe_tight(config, options.tight, figures))
        # After each run, so that a stopped benchmark has its table too.
        results = collect(options.out, _done(options, steps), steps)
        write_results(options.out / "results.csv", results)
        text = table(options.out, results, budget=_budget(options))
        write_text(options.out / "table.md", text)
    print(f"\n{text}")
    return options.out


def _at_pace(measured: Mapping[str, Row], known: Mapping[str, Row]) -> dict[str, Row]:
    """The times of the rows that are new, at the machine's pace of when the others were timed."""
    again = [row for row in measured if row in known]
    ratios = [known[row]["step_ms"] / measured[row]["step_ms"] for row in again]
    pace = statistics.fmean(ratios) if ratios else 1.0
    return {
        row: {name: pace * value for name, value in figures.items()}
        for row, figures in measured.items()
        if row not in known
    }


def _done(options: Vae, rows: Iterable[str]) -> list[tuple[str, int]]:
    """The runs of the folder that are finished and evaluated, of this call or another, by seed."""
    found = []
    for row in rows:
        name = folder_name(row)
        for path in options.out.glob(f"{name}-seed*"):
            seed = path.name.removeprefix(f"{name}-seed")
            if seed.isdigit() and _evaluated(path, options.tight):
                found.append((row, int(seed)))
    return sorted(found, key=lambda run: run[1])  # stable: rows stay in their order


def _budget(options: Vae) -> str:
    """What each run has, in words."""
    wall = f"{options.budget_seconds:g} s"
    if options.clock == "wall":
        return wall if options.steps is None else f"{options.steps:,} steps, {wall} at most"
    if options.steps is not None:
        return f"{options.steps:,} steps"
    return f"as many steps as {STEP_SHARE * options.budget_seconds:g} s of CPU time hold"


def _settle(options: Vae) -> None:
    """Writes down what all runs of the folder have in common, or refuses another choice."""
    names = (
        *("budget_seconds", "clock", "steps", "threads", "device"),
        *("test_points", "test_samples"),
    )
    settled = {name: getattr(options, name) for name in names}
    settled["tight"] = dataclasses.asdict(options.tight)
    if (options.out / "config.json").exists():
        RunFolder.require(options.out, settled, may_differ=())
    else:
        RunFolder(options.out, ()).write_json("config.json", settled)


def _folder(options: Vae, row: str, seed: int) -> Path:
    return options.out / folder_name(row, seed)


def _train(path: Path, row: str, seed: int, step_ms: float, options: Vae) -> None:
    """Trains and evaluates a run, or goes on with it."""
    if (path / "config.json").exists() and not (path / "checkpoints" / "latest.pt").exists():
        shutil.rmtree(path)  # stopped before its first checkpoint
    started = (path / "config.json").exists()
    if started:
        recorded = RunFolder.read_config(path)
        schedule = {name: recorded[name] for name in _SCHEDULE}
    else:
        fitting = int(STEP_SHARE * 1e3 * options.budget_seconds / step_ms)
        schedule = _stretched(config_of(row), max(1, options.steps or fitting))
    place = {"resume" if started else "out": path}
    pyro.clear_param_store()
    run(dataclasses.replace(_config(row, seed, options), **schedule, **place))


def _config(row: str, seed: int, options: Vae) -> Config:
    """The options of a run, but for its schedule and folder."""
    return dataclasses.replace(
        config_of(row),
        seed=seed,
        budget_seconds=options.budget_seconds if options.clock == "wall" else None,
        threads=options.threads,
        device=options.device,
        data_dir=options.data_dir,
        test_points=options.test_points,
        test_samples=options.test_samples,
    )


#: Options of a run that are the benchmark's to set.
_SET_HERE = (
    *("seed", "steps", "budget_seconds", "threads", "device", "data_dir", "out", "resume"),
    *("schedule", "valid_every", "checkpoint_every", "test_points", "test_samples"),
)

#: Options that are counted in steps, and stretched with their number.
_SCHEDULE = ("steps", "beta_steps", "decay_start", "decay_steps", "valid_every", "checkpoint_every")


def _stretched(config: Config, steps: int) -> dict[str, int]:
    factor = steps / config.steps
    schedule = {name: round(getattr(config, name) * factor) for name in _SCHEDULE}
    # 20 validations, whatever the preset's number, so that curves are alike and cost a tenth at
    # most.
    every = math.ceil(steps / 20)
    return schedule | {"steps": steps, "valid_every": every, "checkpoint_every": every}


def _finished(path: Path) -> bool:
    """Whether a run was trained to its end: an evaluation of one that was not has no steps."""
    return "steps" in RunFolder(path, ()).read_json("results.json")


def _evaluated(path: Path, tight: Tight) -> bool:
    """Whether it also has the figures of annealed importance sampling, with these options."""
    recorded = RunFolder(path, ()).read_json("results.json")
    return _finished(path) and recorded.get("ais_options") == dataclasses.asdict(tight)
