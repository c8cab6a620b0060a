# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Tables as CSV files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.shared.errors import UserError

__all__ = ["Row", "write_csv", "write_rows"]

Row = dict[str, float]
"""The columns after those of the key."""


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table anew, atomically.

    :raises UserError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}")
    try:
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: expected a writable file, found: {error}") from None


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
