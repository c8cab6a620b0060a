# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import csv
import importlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest

from inference.autoencoders.binarized_mnist import CACHE_NAME, make_sample

ROOT = Path(__file__).parents[2]

#: Options that make a run tiny.
TINY = (
    *("--batch-size", "16", "--valid-points", "8", "--valid-samples", "4", "--test-points", "8"),
    *("--test-samples", "4", "--guide-samples", "128", "--threads", "1", "--precision", "fp32"),
)

Program = Callable[..., None]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Runs a program in this process: ``program("vae", "25gaussians-implicit", ...)``."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        pyro.clear_param_store()
        importlib.import_module(f"inference.{name}").main()

    return run


@pytest.fixture
def help_of(program: Program, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What ``--help`` of a program shows, which names the program and ends well."""

    def show(name: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            program(name, "--help")
        assert stopped.value.code == 0
        shown: str = capsys.readouterr().out
        assert f"python -m inference.{name}" in shown
        return shown

    return show


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a small made sample in place of MNIST."""
    return make_sample(tmp_path_factory.mktemp("data")).parent


def write_idx(raw: Path, *, side: int = 28) -> None:
    """Writes a few images in the files of MNIST."""
    raw.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 240), ("t10k", 48)):
        images = random.integers(0, 256, (count, side, side), dtype=np.uint8)
        images[:, : side // 3], images[:, -2:] = 0, 255
        for kind, values in (("images", images), ("labels", np.zeros(count, np.uint8))):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            path = raw / f"{name}-{kind}-idx{values.ndim}-ubyte"
            path.write_bytes(head + values.tobytes())


@pytest.fixture(scope="session")
def idx_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a few made images in place of MNIST's."""
    directory = tmp_path_factory.mktemp("idx")
    write_idx(directory / "MNIST" / "raw")
    return directory


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The directory of the real data; skips where there is none."""
    for directory in (os.environ.get("PYRO_ARDAE_DATA"), ROOT.parent / "shared" / "data"):
        if directory and (Path(directory) / CACHE_NAME).exists():
            return Path(directory)
    pytest.skip(f"no {CACHE_NAME}: set PYRO_ARDAE_DATA to test with the real data")
