# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Results of ``inference.bench vae``: rows of its CSV files, and the table made from them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.autoencoders.options import BOUNDED
from inference.autoencoders.tight import load, paired
from inference.benchmarks.rows import baseline, config_of
from inference.shared.rows import Row, read_rows, write_rows
from inference.shared.run import read_metrics

__all__ = [
    "COLUMNS",
    "STEP_COLUMNS",
    "collect",
    "folder_name",
    "read_steps",
    "table",
    "write_results",
]

STEP_COLUMNS = ("row", "step_ms", "model_ms", "score_ms")
COLUMNS = (
    *("row", "seed", "steps", "seconds", "step_ms", "model_ms", "score_ms"),
    *("valid_log_px", "log_px", "log_px_se", "test_points", "test_samples"),
    *("ais_log_px", "ais_log_px_se", "ais_points", "ais_chain_error", "ais_bias"),
    *("elbo", "gap", "gap_se", "elbo_bound", "gap_bound", "density"),
    *("against_gaussian", "against_gaussian_se"),
)

Key = tuple[str, int]
"""Row and seed."""

_MARKS = {
    "*": "\\* Without a density: the ELBO is a lower bound, the gap an upper one, by log q given a "
    "part of the guide's noise or by the bound that the guide is trained with.",
    "†": "† Without a density or a bound on it: the ELBO is too high, the gap too small, by the "
    "misfit of the entropy.",
}


def read_steps(path: Path) -> dict[str, dict[str, float]]:
    """The measured times of a step by row; empty where there is no such file yet.

    :raises UserError: if the file holds anything else.
    """
    if not path.exists():
        return {}
    rows = read_rows(path, STEP_COLUMNS, key=1, remedy="delete it to measure again")
    return {name: figures for (name,), figures in rows}


def folder_name(row: str, seed: int | None = None) -> str:
    """Name of the run folder: the row's own, with a hyphen for all that is no part of a word."""
    name = re.sub(r"[^\w.]+", "-", row)
    return name if seed is None else f"{name}-seed{seed}"


def collect(out: Path, runs: Sequence[Key], steps: Mapping[str, Row]) -> dict[Key, Row]:
    """The figures of finished and evaluated runs."""
    result: dict[Key, Row] = {}
    for row, seed in runs:
        run, config = out / folder_name(row, seed), config_of(row)
        found: dict[str, Any] = json.loads((run / "results.json").read_text())
        arrays = load(run)
        valid = [value for value in read_metrics(run)["valid_log_px"] if not math.isnan(value)]
        figures = {name: found.get(name, math.nan) for name in COLUMNS[2:]} | steps[row]
        figures |= {
            "valid_log_px": max(valid, default=math.nan),
            "elbo": found["ais_elbo"],
            "gap": found["ais_gap"],
            "gap_se": found["ais_gap_se"],
            "elbo_bound": found.get("ais_elbo_bound", math.nan),
            "gap_bound": found.get("ais_gap_bound", math.nan),
            "density": float(config.explicit and config.guide not in BOUNDED),
        }
        if config.explicit:  # the ELBO itself, with or without a density: it is no estimate
            figures |= {"elbo_bound": found["ais_elbo"], "gap_bound": found["ais_gap"]}
        other = baseline(row, [name for name, number in runs if number == seed])
        if other is not None:
            mean, error = paired(arrays, load(out / folder_name(other, seed)))
            figures |= {"against_gaussian": mean, "against_gaussian_se": error}
        result[(row, seed)] = figures
    return result


def write_results(path: Path, results: Mapping[Key, Row]) -> None:
    """Writes ``results.csv`` anew, atomically."""
    write_rows(path, results, COLUMNS)


def table(out: Path, results: Mapping[Key, Row], *, budget: str) -> str:
    """Markdown: one line a row, mean ± standard deviation over its seeds.

    ``budget`` says what each run had, "3600 s".

    The difference to the Gaussian guide is taken image by image and averaged over the seeds that
    both have; its ± is the standard error over images of that average. Its spread over seeds
    follows in brackets.
    """
    if not results:
        return ""
    first = next(iter(results.values()))
    points = "all" if math.isnan(first["test_points"]) else f"{first['test_points']:,.0f}"
    lines = [
        f"Training of each run: {budget}. Mean ± standard deviation over seeds, nats. AIS: "
        "annealed importance sampling on "
        f"{first['ais_points']:,.0f} random test images, the same for all rows of the same data; "
        f"the standard error over images, common to these, is {first['ais_log_px_se']:.2f}. IS: "
        f"importance sampling with a Gaussian fitted to the guide, {points} test images, "
        f"{first['test_samples']:g} samples. Gap: AIS log p(x) less the guide's ELBO. Difference "
        "to the Gaussian guide: AIS, paired by image, ± its standard error over images (in "
        "brackets the standard deviation over seeds).",
        "",
        "| row | seeds | steps | seconds | ms a step | of it score | valid log p(x) | test, IS | "
        "test, AIS | ELBO | gap | against Gaussian |",
        "|---" * 12 + "|",
    ]
    marks = set()
    for row in dict.fromkeys(key[0] for key in results):
        ones = {seed: figures for (name, seed), figures in results.items() if name == row}
        columns = {
            name: [figures[name] for figures in ones.values()] for name in next(iter(ones.values()))
        }
        bounded = not math.isnan(sum(columns["gap_bound"]))
        mark = ("" if all(columns["density"]) else "*") if bounded else "†"
        marks.add(mark)
        limits = ("elbo_bound", "gap_bound") if bounded else ("elbo", "gap")
        cells = [
            row,
            ", ".join(map(str, ones)),
            _range(columns["steps"]),
            _range(columns["seconds"]),
            f"{columns['step_ms'][0]:.2f}",
            f"{columns['score_ms'][0]:.2f}",
            *(_spread(columns[name]) for name in ("valid_log_px", "log_px", "ais_log_px")),
            *(_spread(columns[name]) + mark for name in limits),
            _difference(out, row, [*ones], results),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for mark, text in _MARKS.items():
        if mark in marks:
            lines += ["", text]
    return "\n".join(lines) + "\n"


def _difference(out: Path, row: str, seeds: Sequence[int], results: Mapping[Key, Row]) -> str:
    other = baseline(row, [key[0] for key in results])
    shared = [seed for seed in seeds if (other, seed) in results]
    if other is None or not shared:
        return ""
    differences = np.stack(
        [
            load(out / folder_name(row, seed))["log_px"]
            - load(out / folder_name(other, seed))["log_px"]
            for seed in shared
        ]
    )
    each = differences.mean(0)
    error = each.std(ddof=1) / math.sqrt(len(each))
    spread = f" ({differences.mean(1).std(ddof=1):.2f})" if len(shared) > 1 else ""
    return f"{each.mean():+.2f} ± {error:.2f}{spread}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f}–{high:,.0f}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
