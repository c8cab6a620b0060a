# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.autoencoders.binarized_mnist import (
    CACHE_NAME,
    SPLITS,
    Split,
    find_data_dir,
    load_binarized_mnist,
    make_sample,
    read_amat,
)
from inference.autoencoders.data import unpack
from inference.shared.errors import UserError


def write_amat(path: Path, pixels: np.ndarray) -> None:
    path.write_text("\n".join(" ".join(map(str, row)) for row in pixels) + "\n")


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, dict[str, Split], dict[str, np.ndarray]]:
    """A folder to download from, with three small text files, and what they must hold."""
    import hashlib

    random = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    splits, packed = {}, {}
    for name in SPLITS:
        pixels = random.integers(0, 2, size=(5, 784), dtype=np.uint8)
        write_amat(folder / f"binarized_mnist_{name}.amat", pixels)
        packed[name] = np.packbits(pixels, axis=1)
        digest = hashlib.sha256(packed[name].tobytes()).hexdigest()
        splits[name] = Split(5, digest, pixels.mean())
    return folder, splits, packed


def test_download_verify_cache(
    tmp_path: Path, source: tuple[Path, dict[str, Split], dict[str, np.ndarray]]
) -> None:
    folder, splits, packed = source
    data = tmp_path / "data"
    loaded = load_binarized_mnist(data, base_url=f"{folder.as_uri()}/", splits=splits)
    assert [path.name for path in data.iterdir()] == [CACHE_NAME]
    again = load_binarized_mnist(data, base_url="http://unused.invalid/", splits=splits)
    for name in splits:
        np.testing.assert_array_equal(loaded[name], packed[name])
        np.testing.assert_array_equal(again[name], packed[name])


def test_a_truncated_download_leaves_nothing(
    tmp_path: Path, source: tuple[Path, dict[str, Split], dict[str, np.ndarray]]
) -> None:
    folder, splits, _ = source
    text = folder / "binarized_mnist_valid.amat"
    text.write_text(text.read_text()[:5000])
    data = tmp_path / "data"
    message = r"binarized_mnist_valid.amat: expected 5 images of 784 pixels, found 3.18\d+ \(5000 b"
    with pytest.raises(UserError, match=message):
        load_binarized_mnist(data, base_url=f"{folder.as_uri()}/", splits=splits)
    assert list(data.iterdir()) == []


def test_another_file_of_the_right_size(
    tmp_path: Path, source: tuple[Path, dict[str, Split], dict[str, np.ndarray]]
) -> None:
    folder, splits, _ = source
    shutil.copy(folder / "binarized_mnist_train.amat", folder / "binarized_mnist_test.amat")
    message = r"test: expected SHA-256 \w{64} \(pixel mean 0.\d+\), found \w{64} \(pixel mean"
    with pytest.raises(UserError, match=message):
        load_binarized_mnist(tmp_path, base_url=f"{folder.as_uri()}/", splits=splits)


def test_missing_and_not_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not found, and .* cannot be downloaded .* --data-dir"):
        load_binarized_mnist(tmp_path, base_url=f"{(tmp_path / 'nowhere').as_uri()}/")
    assert list(tmp_path.iterdir()) == []


def test_other_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.amat"
    path.write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"a.amat: expected zeros and ones only, found '<'"):
        read_amat(path, 5)


def test_corrupt_cache(tmp_path: Path) -> None:
    (tmp_path / CACHE_NAME).write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"expected a readable npz file .* found 16 bytes"):
        load_binarized_mnist(tmp_path)


def test_a_cache_with_bytes_that_do_not_unpack(tmp_path: Path) -> None:
    path = make_sample(tmp_path)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("valid.npy").header_offset + 80
    content = bytearray(path.read_bytes())
    for at in range(start, start + 400, 40):
        content[at] ^= 0xFF
        path.write_bytes(bytes(content))
        with pytest.raises(UserError, match=r"expected a readable npz file"):
            load_binarized_mnist(tmp_path)


def test_wrong_shape_in_the_cache(tmp_path: Path) -> None:
    with (tmp_path / CACHE_NAME).open("wb") as file:
        np.savez(file, train=np.zeros((3, 98), np.uint8))
    with pytest.raises(UserError, match=r"train: .* \(50000, 98\), found uint8 \(3, 98\)"):
        load_binarized_mnist(tmp_path)


def test_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_ARDAE_DATA", raising=False)
    assert find_data_dir(None) == Path("data")
    monkeypatch.setenv("PYRO_ARDAE_DATA", str(tmp_path))
    assert find_data_dir(None) == tmp_path
    assert find_data_dir(Path("other")) == Path("other")


def test_the_real_data(mnist_dir: Path) -> None:
    loaded = load_binarized_mnist(mnist_dir)
    for name, split in SPLITS.items():
        mean = unpack(torch.from_numpy(loaded[name])).mean().item()
        assert mean == pytest.approx(split.pixel_mean, abs=1e-6)
