# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The figures of ``inference.posterior``: rows of its CSV files, and the table made from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.shared.rows import Row, read_rows

__all__ = ["COLUMNS", "FLOOR", "MOMENTS", "Key", "read", "table"]

COLUMNS = (
    *("posterior", "guide", "seed", "sliced_wasserstein", "ks", "ks_worst", "c2st"),
    *("mean_error", "mean_error_worst", "std_error", "std_error_worst", "modes"),
    *("steps", "seconds"),
)
MOMENTS = (
    *("posterior", "guide", "seed", "coordinate"),
    *("mean", "std", "reference_mean", "reference_std"),
)

#: Name of the "guide" that is one half of the reference, compared with the other.
FLOOR = "floor"

Key = tuple[str, str, int]
"""Posterior, guide, seed."""


def read(path: Path, columns: Sequence[str]) -> dict[Any, Row]:
    """The rows of a file by key: posterior, guide, seed, and the coordinate where it has one.

    :raises UserError: if it is no such file.
    """
    width = 4 if "coordinate" in columns else 3
    return dict(read_rows(path, columns, key=width, remedy="give another --out"))


def table(rows: Mapping[Key, Row], moments: Mapping[Any, Row], seconds: float, clock: str) -> str:
    """Markdown: a table of the distance by posterior and guide, and all figures of each posterior.

    :param rows: rows of results.csv.
    :param moments: rows of moments.csv.
    :param float seconds: time of training of each guide.
    :param str clock: what it was measured by.
    """
    posteriors = list(dict.fromkeys(key[0] for key in rows))
    guides = list(dict.fromkeys(key[1] for key in rows if key[1] != FLOOR))
    seeds = sorted({key[2] for key in rows if key[1] != FLOOR})
    lines = [
        f"{seconds:g} s ({clock} clock) for each guide; mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}. The nearest guide is bold.",
        "",
        "## Sliced Wasserstein distance, in posterior standard deviations",
        "",
        "| posterior | " + " | ".join(guides) + " | floor |",
        "|---" * (len(guides) + 2) + "|",
    ]
    for posterior in posteriors:
        means = {guide: _column(rows, posterior, guide, "sliced_wasserstein") for guide in guides}
        nearest = min((statistics.mean(v) for v in means.values() if v), default=math.nan)
        cells = []
        for values in means.values():
            cell = _spread(values)
            cells.append(f"**{cell}**" if values and statistics.mean(values) == nearest else cell)
        floor = _spread(_column(rows, posterior, FLOOR, "sliced_wasserstein"))
        lines.append(f"| {posterior} | " + " | ".join(cells) + f" | {floor} |")
    shown = ("sliced_wasserstein", "ks", "ks_worst", "c2st", "mean_error", "std_error", "modes")
    for posterior in posteriors:
        lines += ["", f"## {posterior}", "", f"| guide | {' | '.join(shown)} | steps |"]
        lines.append("|---" * (len(shown) + 2) + "|")
        for guide in [*guides, FLOOR]:
            cells = [_spread(_column(rows, posterior, guide, name)) for name in (*shown, "steps")]
            if any(cells):
                lines.append(f"| {guide} | " + " | ".join(cells) + " |")
        lines += _moments(moments, posterior, guides)
    return "\n".join(lines) + "\n"


def _moments(moments: Mapping[Any, Row], posterior: str, guides: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(key[3] for key in moments if key[0] == posterior))
    if not names:
        return []
    lines = ["", f"| mean, std | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for guide in guides:
        cells = []
        for name in names:
            found = [
                row
                for key, row in moments.items()
                if (key[0], key[1], key[3]) == (posterior, guide, name)
            ]
            mean, std = ([row[column] for row in found] for column in ("mean", "std"))
            cells.append(f"{_spread(mean)}, {_spread(std)}")
        lines.append(f"| {guide} | " + " | ".join(cells) + " |")
    cells = []
    for name in names:
        row = next(row for key, row in moments.items() if (key[0], key[3]) == (posterior, name))
        cells.append(f"{row['reference_mean']:.3g}, {row['reference_std']:.3g}")
    return [*lines, "| reference | " + " | ".join(cells) + " |"]


def _column(rows: Mapping[Key, Row], posterior: str, guide: str, name: str) -> list[float]:
    values = [row[name] for key, row in rows.items() if key[:2] == (posterior, guide)]
    return [value for value in values if not math.isnan(value)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    digits = f"{mean:.3f}" if abs(mean) < 100 else f"{mean:,.0f}"
    if len(values) < 2:
        return digits
    spread = statistics.stdev(values)
    return f"{digits} ± {spread:.3f}" if abs(mean) < 100 else digits
