# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Tables as CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.shared.errors import UserError
from inference.shared.files import replacing

__all__ = ["Row", "read_rows", "write_csv", "write_rows"]

Row = dict[str, float]
"""The columns after those of the key."""


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table anew, atomically.

    :raises UserError: if it cannot be written.
    """
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def read_rows(
    path: Path, columns: Sequence[str], *, key: int, remedy: str
) -> list[tuple[tuple[Any, ...], Row]]:
    """Key and figures of each row, nan for empty cells.

    :param columns: those that are read.
    :param key: the first so many are the key; ``seed`` is a number in it.
    :param remedy: what to do about a file that has not got them.
    :raises UserError: if it is no such file.
    """

    def parsed(name: str, text: str) -> Any:
        return int(text) if name == "seed" else text

    try:
        with path.open(newline="") as file:
            return [
                (
                    tuple(parsed(name, row[name]) for name in columns[:key]),
                    {name: float(row[name] or "nan") for name in columns[key:]},
                )
                for row in csv.DictReader(file, strict=True)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: expected rows of {', '.join(columns)}, found: {error!r}; {remedy}"
        ) from None


def write_rows(path: Path, rows: Mapping[Any, Row], columns: Sequence[str]) -> None:
    """Writes rows by key anew, atomically; empty cells for nan.

    :param rows: by the values of the first columns, the others by name.
    :param columns: all of them.

    :raises UserError: if it cannot be written.
    """

    def line(key: Any, row: Row) -> list[Any]:
        values = (row[name] for name in columns[len(key) :])
        return [*key, *("" if math.isnan(v) else f"{v:.6g}" for v in values)]

    write_csv(path, columns, (line(key, row) for key, row in rows.items()))
