# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference.autoencoders.binarized_mnist import load_binarized_mnist
from inference.autoencoders.data import BinarizedMNIST
from inference.autoencoders.dynamic_mnist import DynamicMNIST, load_images
from inference.shared.errors import UserError
from tests.inference.conftest import write_idx


@pytest.fixture
def images(idx_dir: Path) -> dict[str, torch.Tensor]:
    return load_images(idx_dir)


def test_splits(images: dict[str, torch.Tensor]) -> None:
    """The last sixth of the training file validates."""
    assert {name: tuple(rows.shape) for name, rows in images.items()} == {
        "train": (200, 784),
        "valid": (40, 784),
        "test": (48, 784),
    }


def test_training_images_are_drawn_anew_at_every_epoch(images: dict[str, torch.Tensor]) -> None:
    data, again = (DynamicMNIST(images, batch_size=200, seed=3) for _ in range(2))
    first, second = data.minibatch(0), data.minibatch(1)
    assert torch.equal(again.minibatch(1), second)  # a function of the step
    assert set(first.unique().tolist()) == {0.0, 1.0}
    order = [data.order.indices(step).argsort() for step in (0, 1)]
    assert not torch.equal(first[order[0]], second[order[1]])
    assert not torch.equal(DynamicMNIST(images, 200, seed=4).minibatch(0), first)


def test_pixels_are_white_as_often_as_they_are_bright(images: dict[str, torch.Tensor]) -> None:
    data = DynamicMNIST(images, batch_size=200, seed=0)
    grey = images["train"].float() / 255
    torch.testing.assert_close(data.mean, grey.mean(0))
    total = torch.zeros(200, 784)
    for step in range(50):
        total[data.order.indices(step)] += data.minibatch(step)
    # 4.4 standard errors of a mean over all pixels, whose variances are p (1 - p) / 50.
    error = (grey * (1 - grey)).sum().sqrt() / (50**0.5 * grey.numel())
    assert (total.div(50) - grey).mean().abs() < 4.4 * error
    assert bool((total[grey == 0] == 0).all())
    assert bool((total[grey == 1] == 50).all())


def test_validation_and_test_images_are_the_same_for_all_runs(
    images: dict[str, torch.Tensor],
) -> None:
    data, other = (DynamicMNIST(images, batch_size=16, seed=seed) for seed in (0, 1))
    for split in ("valid", "test"):
        whole = data.subset(split, None, seed=0)
        assert torch.equal(whole, other.subset(split, None, seed=5))
        part = data.subset(split, 10, seed=5)
        assert part.shape == (10, 784)
        assert torch.equal(part, other.subset(split, 10, seed=5))
        assert not torch.equal(part, whole[:10])


def test_training_with_the_validation_images(
    images: dict[str, torch.Tensor], sample_dir: Path
) -> None:
    dynamic = DynamicMNIST(images, batch_size=16, seed=0, with_valid=True)
    assert len(dynamic.splits["train"]) == 240
    static = BinarizedMNIST(load_binarized_mnist(sample_dir), 16, 0, with_valid=True)
    assert len(static.splits["train"]) == 512
    assert len(static.splits["valid"]) == 256


def test_fashion_has_a_folder_of_its_own(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw")
    assert len(load_images(tmp_path, "fashion-mnist")["test"]) == 48


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MNIST/raw: expected train-images.*add --download"):
        load_images(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw)
    for damaged in (
        b"\0\0\x08\x03" + b"\0" * 3,
        b"\0\0\x0a\x03" + b"\0" * 16,  # of no type
        b"\0\0\x0d\x01" + b"\0\0\0\x01" + b"\0" * 4,  # one floating-point number
    ):
        (raw / "train-images-idx3-ubyte").write_bytes(damaged)
        with pytest.raises(UserError, match="MNIST/raw: expected train-images"):
            load_images(tmp_path)
    write_idx(raw, side=27)
    with pytest.raises(UserError, match=r"expected images of 28 by 28, found \(240, 27, 27\)"):
        load_images(tmp_path)
