# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The run folder: what a training program leaves behind, and how it resumes.

==================  ================================================================================
``config.json``     all options of the run
``command.txt``     the command, one line for each start or resumption
``versions.json``   versions of Python and the packages, the machine
``metrics.csv``     one row for each validation
``tensorboard/``    the same as TensorBoard events
``checkpoints/``    ``latest.pt`` to resume from, ``best.pt`` with the best weights
``figures/``        pictures
``results.json``    the final evaluation
==================  ================================================================================
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from inference.shared.errors import UserError
from inference.shared.files import replacing, write_text
from inference.shared.rows import write_csv

__all__ = [
    "RunFolder",
    "make_folder",
    "read_metrics",
]

PACKAGES = (
    *("torch", "pyro-ppl", "numpy", "matplotlib", "tyro"),
    *("zuko", "gymnasium", "mujoco", "stable-baselines3"),  # if they are installed
)


class RunFolder:
    """A run folder that exists.

    :param Path path: the folder.
    :param Sequence[str] columns: columns of ``metrics.csv``, ``step`` first; none for no such file.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self._writer: Any = None

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        columns: Sequence[str],
        *,
        resumable: bool = True,
    ) -> RunFolder:
        """Makes a new run folder.

        :param bool resumable: whether its program has a ``--resume``, as advice.
        :raises UserError: if it cannot be written, or holds a run already.
        """
        folder = cls(path, columns)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / "config.json").exists():
                advice = ""
                if resumable and folder.checkpoint("latest").exists():
                    advice = f", or --resume {path} to go on with it"
                elif resumable:
                    advice = ", or delete it: it has no checkpoint to go on from"
                raise UserError(
                    f"{path}: expected a new run folder, found a run; give another --out{advice}"
                )
            (path / "figures").mkdir(exist_ok=True)
            folder.write_json("config.json", config)
            folder.write_json("versions.json", _versions())
            if columns:
                write_csv(path / "metrics.csv", columns, ())
            folder._note_command()
        except OSError as error:
            raise UserError(f"{path}: expected a writable folder, found: {error}") from None
        return folder

    @classmethod
    def open_or_create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        columns: Sequence[str],
        *,
        may_differ: Sequence[str] = (),
    ) -> RunFolder:
        """Goes on with the run that the folder holds, or makes a new one.

        :raises UserError: as :meth:`open` and :meth:`create`.
        """
        if (path / "config.json").exists():
            folder = cls.open(path, config, columns, may_differ=may_differ)
            folder.record(config)
            return folder
        return cls.create(path, config, columns)

    @classmethod
    def open(
        cls,
        path: Path,
        config: Mapping[str, Any],
        columns: Sequence[str],
        *,
        may_differ: Sequence[str],
    ) -> RunFolder:
        """Opens a run folder to resume it; :meth:`record` has to follow once that is sure.

        :param Sequence[str] may_differ: options that need not be those of the run.
        :raises UserError: if there is no run, or its options differ.
        """
        cls.require(path, config, may_differ=may_differ)
        return cls(path, columns)

    def record(self, config: Mapping[str, Any]) -> None:
        """Notes that the run goes on: ``config.json`` then holds the options of this call.

        :raises UserError: if it cannot be written.
        """
        recorded = self.read_config(self.path)
        kept = {key: recorded.get(key) for key in ("out", "resume")}
        try:
            self.write_json("config.json", {**recorded, **config, **kept})
            self._note_command()
        except OSError as error:
            raise UserError(f"{self.path}: expected a writable folder, found: {error}") from None

    @classmethod
    def require(cls, path: Path, config: Mapping[str, Any], *, may_differ: Sequence[str]) -> None:
        """Refuses a folder whose run has other options.

        :param Sequence[str] may_differ: options that need not be those of the run.
        :raises UserError: if there is no run, or its options differ.
        """
        recorded = cls.read_config(path)
        wanted = json.loads(json.dumps(config, default=str))
        differing = [
            f"{key} is {recorded.get(key)!r} in the run, {wanted.get(key)!r} here"
            for key in sorted({*recorded, *wanted} - {*may_differ})
            if recorded.get(key) != wanted.get(key)
        ]
        if differing:
            raise UserError(f"{path}: expected the run's options, found: " + "; ".join(differing))

    @staticmethod
    def read_config(path: Path) -> dict[str, Any]:
        """The options of a run.

        :raises UserError: if there is no run.
        """
        try:
            config: dict[str, Any] = json.loads((path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: expected a run folder, found none ({error})") from None
        return config

    def _note_command(self) -> None:
        with (self.path / "command.txt").open("a") as file:
            file.write(shlex.join(["python", *sys.orig_argv[1:]]) + "\n")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file atomically."""
        write_text(self.path / name, json.dumps(value, indent=2, default=str) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty where there is none yet."""
        path = self.path / name
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @staticmethod
    def prepare() -> None:
        """Imports TensorBoard. It takes a second, which a clock of training should not count; and
        not every use of a run folder logs.
        """
        import torch.utils.tensorboard  # noqa: F401

    def log(self, row: Mapping[str, float]) -> None:
        """Appends a row of metrics to ``metrics.csv`` and to TensorBoard."""
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self.path / "tensorboard"), purge_step=int(row["step"])
            )
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()

    def drop_rows_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run will do again."""
        path = self.path / "metrics.csv"
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        # A row cut short by the kill is dropped too.
        kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
        write_csv(path, header, kept)

    def checkpoint(self, name: str) -> Path:
        """The path of a checkpoint."""
        return self.path / "checkpoints" / f"{name}.pt"

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint atomically."""
        path = self.checkpoint(name)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            torch.save(dict(state), partial)

    def load(self, name: str, device: str = "cpu") -> dict[str, Any]:
        """Reads a checkpoint: tensors and plain values only.

        :raises UserError: if it is missing or damaged.
        """
        path = self.checkpoint(name)
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except FileNotFoundError:
            raise UserError(
                f"{path}: expected a checkpoint, found none: the run has ended before its first; "
                "delete it and start anew"
            ) from None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: expected a checkpoint, found: {reason}") from None
        return state


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv; nan where a row has nothing.

    :raises UserError: if there is none.
    """
    try:
        with (path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: expected a run folder, found: {error}") from None
    columns = rows[0] if rows else {}
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in columns}


def make_folder(path: Path) -> None:
    """Makes a folder where there is none.

    :raises UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: expected a writable folder, found: {error}") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package))},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(),
    }
