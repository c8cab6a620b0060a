# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The figures of ``inference.score``: rows of metrics.csv, and the table made from them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from inference.shared.rows import Row, read_rows, write_csv

__all__ = ["COLUMNS", "EXACT", "Key", "Rows", "final", "read", "table", "write"]

COLUMNS = (
    *("estimator", "target", "seed", "updates", "cpu_seconds", "draws", "error"),
    *("update_ms", "query_ms"),
)

#: The Gaussian score with the target's own mean and covariance, for comparison.
EXACT = "Gaussian, exact moments"

Key = tuple[str, str, int]
"""Estimator, target, seed."""

Rows = Mapping[Key, Sequence[Row]]
"""The evaluations of each run, in the order of time."""


def read(path: Path) -> dict[Key, list[Row]]:
    """The rows of metrics.csv, by run.

    :raises UserError: if it is no such file.
    """
    runs: dict[Key, list[Row]] = defaultdict(list)
    for key, row in read_rows(path, COLUMNS, key=3, remedy="give another --out"):
        runs[key].append(row)
    return dict(runs)


def write(path: Path, runs: Rows) -> None:
    """Write metrics.csv anew: a run is in it with all its rows, or not at all.

    :raises UserError: if it cannot be written.
    """
    lines = (
        [*key, *(f"{row[name]:.6g}" for name in row)] for key, rows in runs.items() for row in rows
    )
    write_csv(path, COLUMNS, lines)


def final(runs: Rows, estimator: str, target: str, column: str, draws: int) -> list[float]:
    """A column at the end of every seed's run."""
    ends: list[float] = []
    for key, rows in runs.items():
        if key[:2] == (estimator, target):
            ends += [row[column] for row in rows if row["draws"] == draws][-1:]
    return ends


def table(runs: Rows, reference: Mapping[str, float], heading: str, draws: Sequence[int]) -> str:
    """Markdown: errors at the end, median and worst over seeds, and what they cost.

    :param Mapping[str, float] reference: error of the Gaussian with the exact moments, by target.
    :param str heading: what was run.
    :param Sequence[int] draws: each number of draws per query has a table.
    """
    estimators = list(dict.fromkeys(key[0] for key in runs))
    lines = [heading, ""]

    def add(title: str, columns: Sequence[str], cell: Callable[[str, str], str]) -> None:
        lines.extend([f"## {title}", ""])
        lines.append("| target | " + " | ".join(columns) + " |")
        lines.append("|---" * (1 + len(columns)) + "|")
        for target in reference:
            lines.append(f"| {target} | " + " | ".join(cell(target, x) for x in columns) + " |")
        lines.append("")

    for count in draws:

        def error(target: str, estimator: str, count: int = count) -> str:
            if estimator == EXACT:
                return f"{reference[target]:.3g}"
            errors = final(runs, estimator, target, "error", count)
            errors = sorted(math.inf if math.isnan(error) else error for error in errors)
            if len(errors) < 2:
                return "".join(f"{error:.3g}" for error in errors)
            return f"{statistics.median(errors):.3g} ({errors[-1]:.3g})"

        title = f"Relative error, {count} draws with the query: median (worst) over seeds"
        add(title, [*estimators, EXACT], error)

    def cost(target: str, estimator: str) -> str:
        update, query = (
            final(runs, estimator, target, column, draws[0]) for column in ("update_ms", "query_ms")
        )
        return f"{statistics.mean(update):.3g} / {statistics.mean(query):.3g}" if update else ""

    add(f"CPU milliseconds of an update / of a query with {draws[0]} draws", estimators, cost)
    return "\n".join(lines)
