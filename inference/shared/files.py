# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Files that are written whole or not at all, and read whole or not at all."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from inference.shared.errors import UserError

__all__ = ["read_arrays", "replacing", "write_arrays", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` once that is done.

    :raises UserError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: expected a writable file, found: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file.

    :raises UserError: if it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes an npz file.

    :raises UserError: if it cannot be written.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads an npz file.

    :raises OSError: if it cannot be opened.
    :raises ValueError: if it is damaged.
    """
    try:
        # Opened here: NumPy leaves a damaged archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (EOFError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{error}") from error
