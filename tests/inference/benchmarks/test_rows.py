# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from pathlib import Path

import pytest

from inference.benchmarks.rows import baseline, check_rows
from inference.benchmarks.vae import _at_pace
from inference.benchmarks.vae_table import COLUMNS, table
from inference.shared.errors import UserError

GAUSSIAN = "sbmnist-mlp-gaussian"


@pytest.mark.parametrize(
    ("row", "rows", "expected"),
    [
        ("sbmnist-mlp-implicit", (GAUSSIAN,), GAUSSIAN),
        ("sbmnist-mlp-implicit --gain 0.5", (GAUSSIAN,), GAUSSIAN),
        ("sbmnist-conv-implicit", (GAUSSIAN,), None),
        (GAUSSIAN, (GAUSSIAN,), None),
        # Images and pixels that are others are compared with their own.
        ("sbmnist-mlp-implicit --seen-share 0.5", (GAUSSIAN,), None),
        (
            "dbmnist-mlp-flow --images fashion-mnist",
            ("dbmnist-mlp-gaussian", "dbmnist-mlp-gaussian --images fashion-mnist"),
            "dbmnist-mlp-gaussian --images fashion-mnist",
        ),
        # Of several, that with the same options.
        (
            "sbmnist-mlp-flow --activation relu",
            (GAUSSIAN, f"{GAUSSIAN} --activation relu"),
            f"{GAUSSIAN} --activation relu",
        ),
    ],
)
def test_baseline(row: str, rows: tuple[str, ...], expected: str | None) -> None:
    assert baseline(row, (row, *rows)) == expected


def test_a_schedule_is_no_option_of_a_row() -> None:
    with pytest.raises(UserError, match="expected no --schedule in a row"):
        check_rows(["sbmnist-mlp-gaussian --schedule paper"], set_here=("schedule",))


def test_new_rows_are_timed_at_the_pace_of_the_others() -> None:
    """The machine is half as fast as it was, and the new row takes as long as both others."""
    known = {"a": {"step_ms": 1.0}, "b": {"step_ms": 3.0}}
    measured = {name: {"step_ms": ms} for name, ms in (("a", 2.0), ("b", 6.0), ("c", 8.0))}
    assert _at_pace(measured, known) == {"c": {"step_ms": 4.0}}
    assert _at_pace(measured, {}) == measured


@pytest.mark.parametrize(
    ("density", "bound", "shown", "note"),
    [
        (1.0, 5.0, "| -91.00 | 5.00 |", None),
        (0.0, 4.0, "| -91.00* | 4.00* |", "a lower bound"),
        (0.0, math.nan, "| -90.00† | 3.00† |", "too high"),
    ],
)
def test_table_says_what_the_gap_is(
    density: float, bound: float, shown: str, note: str | None
) -> None:
    figures = dict.fromkeys(COLUMNS[2:], 0.0)
    figures |= {"elbo": -90.0, "gap": 3.0, "gap_bound": bound, "density": density}
    figures["elbo_bound"] = bound if math.isnan(bound) else -91.0
    text = table(Path(), {("sbmnist-mlp-implicit", 0): figures}, budget="1 s")
    assert shown in text
    assert all((mark in text) == (mark == note) for mark in ("a lower bound", "too high"))
