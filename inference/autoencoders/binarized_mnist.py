# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The files of statically binarized MNIST: downloaded once, verified, and cached.

It is the split of Larochelle & Murray (AISTATS 2011), three public text files; the cache is one
file ``binarized_mnist.npz`` of packed rows.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.shared.errors import UserError
from inference.shared.files import read_arrays, write_arrays
from inference.shared.run import make_folder

__all__ = [
    "BASE_URL",
    "CACHE_NAME",
    "SPLITS",
    "Split",
    "find_data_dir",
    "load_binarized_mnist",
    "make_sample",
    "read_amat",
]

BASE_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
CACHE_NAME = "binarized_mnist.npz"
NUM_PIXELS = 784
ROW_BYTES = NUM_PIXELS // 8


@dataclass(frozen=True)
class Split:
    """What a split must be: number of images, SHA-256 of its packed rows, mean of its pixels."""

    rows: int
    sha256: str
    pixel_mean: float


SPLITS: Mapping[str, Split] = {
    "train": Split(
        50_000, "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906", 0.130562
    ),
    "valid": Split(
        10_000, "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d", 0.131127
    ),
    "test": Split(
        10_000, "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2", 0.132512
    ),
}


def find_data_dir(data_dir: Path | None) -> Path:
    """The data directory: the argument, else ``PYRO_ARDAE_DATA``, else ``data``."""
    return data_dir or Path(os.environ.get("PYRO_ARDAE_DATA") or "data")


def load_binarized_mnist(
    data_dir: Path | None = None, *, base_url: str = BASE_URL, splits: Mapping[str, Split] = SPLITS
) -> dict[str, np.ndarray]:
    """Loads the packed splits, downloading and caching them when they are not there.

    :param Path data_dir: see :func:`find_data_dir`.
    :param str base_url: where the three text files are.
    :param dict splits: what the splits must be.
    :returns: ``uint8 [n, 98]`` by name of the split.
    :raises UserError: if a file is missing and cannot be fetched, or is not what it must be.
    """
    directory = find_data_dir(data_dir)
    cache = directory / CACHE_NAME
    if not cache.exists():
        _fetch(directory, base_url, splits)
    try:
        found = read_arrays(cache)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{cache}: expected a readable npz file of packed binarized MNIST, found "
            f"{cache.stat().st_size} bytes that are not ({error}); delete it to download it again"
        ) from None
    made = "made" in found
    for name, split in splits.items():
        _verify(cache, name, found.get(name), None if made else split)
    if made:
        print(f"note: {cache} holds a small made sample, not MNIST: figures mean nothing")
    return {name: found[name] for name in splits}


def _verify(path: Path, name: str, rows: np.ndarray | None, split: Split | None) -> None:
    remedy = "delete it to download it again"
    if rows is None:
        raise UserError(f"{path}: expected a split {name!r}, found none; {remedy}")
    count = len(rows) if split is None and rows.ndim == 2 else (split.rows if split else 0)
    if rows.shape != (count, ROW_BYTES) or rows.dtype != np.uint8:
        raise UserError(
            f"{path}: {name}: expected uint8 rows of shape ({count}, {ROW_BYTES}), found "
            f"{rows.dtype} {rows.shape}; {remedy}"
        )
    if split is None:
        return
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    if digest != split.sha256:
        mean = np.unpackbits(rows, axis=1).mean()
        raise UserError(
            f"{path}: {name}: expected SHA-256 {split.sha256} (pixel mean {split.pixel_mean:.6f}), "
            f"found {digest} (pixel mean {mean:.6f}); {remedy}"
        )


def _fetch(directory: Path, base_url: str, splits: Mapping[str, Split]) -> None:
    """Downloads the text files (or takes them from ``directory``) and writes the cache at once."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            packed = {}
            for name, split in splits.items():
                file_name = f"binarized_mnist_{name}.amat"
                path = directory / file_name
                if not path.exists():
                    path = Path(temporary) / file_name
                    _download(base_url + file_name, path, directory)
                packed[name] = read_amat(path, split.rows)
                _verify(path, name, packed[name], split)
            write_arrays(directory / CACHE_NAME, **packed)
    except OSError as error:
        raise UserError(
            f"{directory}: expected a directory to write {CACHE_NAME} to, found: {error}"
        ) from None


def _download(url: str, path: Path, directory: Path) -> None:
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
    except (OSError, urllib.error.URLError) as error:
        raise UserError(
            f"{directory / CACHE_NAME}: not found, and {url} cannot be downloaded ({error}); put "
            "either file there, or name a folder that holds one: --data-dir or PYRO_ARDAE_DATA"
        ) from None


def read_amat(path: Path, num_rows: int) -> np.ndarray:
    """Reads a text file of zeros and ones, 784 a line.

    :returns: packed rows, ``uint8 [num_rows, 98]``.
    :raises UserError: if the file holds anything else, or another number of images.
    """
    characters = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    digits = characters[characters > ord(" ")]
    wrong = digits[(digits != ord("0")) & (digits != ord("1"))]
    if len(wrong):
        raise UserError(f"{path.name}: expected zeros and ones only, found {chr(wrong[0])!r}")
    if len(digits) != num_rows * NUM_PIXELS:
        raise UserError(
            f"{path.name}: expected {num_rows} images of {NUM_PIXELS} pixels, found "
            f"{len(digits) / NUM_PIXELS:g} ({len(characters)} bytes): truncated or another file"
        )
    return np.packbits((digits - ord("0")).reshape(num_rows, NUM_PIXELS), axis=1)


def make_sample(directory: Path, *, rows: int = 256, seed: int = 0) -> Path:
    """Writes a small made data set in the format of the cache, for tests without the real one.

    :param Path directory: where to write it.
    :param int rows: images of each split.
    :param int seed: seed of the images: one blob each, at a random place.
    """
    random = np.random.default_rng(seed)
    grid = np.arange(28)
    made: dict[str, np.ndarray] = {"made": np.ones(1, dtype=np.uint8)}
    for name in SPLITS:
        row, column = random.uniform(8, 20, size=(2, rows, 1, 1))
        distance = (grid[:, None] - row) ** 2 + (grid - column) ** 2
        pixels = random.uniform(size=distance.shape) < np.exp(-distance / 18)
        made[name] = np.packbits(pixels.reshape(rows, NUM_PIXELS), axis=1)
    make_folder(directory)
    path = directory / CACHE_NAME
    write_arrays(path, **made)
    return path
