# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from inference.autoencoders.binarized_mnist import load_binarized_mnist
from inference.autoencoders.data import BinarizedMNIST, ToyData, unpack
from inference.autoencoders.missing import MissingPixels


def test_unpack_is_numpys() -> None:
    rows = np.random.default_rng(0).integers(0, 256, size=(9, 98), dtype=np.uint8)
    expected = torch.from_numpy(np.unpackbits(rows, axis=1)).float()
    assert torch.equal(unpack(torch.from_numpy(rows)), expected)


def test_minibatches_are_a_function_of_the_step(sample_dir: Path) -> None:
    splits = load_binarized_mnist(sample_dir)
    data, again = (BinarizedMNIST(splits, batch_size=100, seed=3) for _ in range(2))
    steps = [data.minibatch(step) for step in range(6)]
    assert torch.equal(again.minibatch(5), steps[5])
    # Two steps an epoch: the images of an epoch differ, the order of the next is another.
    seen = torch.cat(steps[:2]).unique(dim=0)
    assert len(seen) == len(torch.cat(steps[:2]))
    assert not torch.equal(steps[0], steps[2])
    toy = ToyData(8, seed=3)
    assert torch.equal(toy.minibatch(4), ToyData(8, seed=3).minibatch(4))
    assert not torch.equal(toy.minibatch(4), toy.minibatch(5))


def test_subsets_are_random_and_seeded(sample_dir: Path) -> None:
    data = BinarizedMNIST(load_binarized_mnist(sample_dir), batch_size=10, seed=0)
    whole = data.subset("test", None, seed=1)
    part = data.subset("test", 20, seed=1)
    assert (whole.shape, part.shape) == ((256, 784), (20, 784))
    assert torch.equal(part, data.subset("test", 20, seed=1))
    assert not torch.equal(part, whole[:20])


def test_missing_pixels_are_a_function_of_seed_and_step(sample_dir: Path) -> None:
    whole = BinarizedMNIST(load_binarized_mnist(sample_dir), 32, seed=3)
    data, again = (MissingPixels(whole, 0.3, seed=3) for _ in range(2))
    for x, full in (
        (data.minibatch(5), whole.minibatch(5)),
        (data.subset("test", 40, 1), whole.subset("test", 40, 1)),
    ):
        seen = ~x.isnan()
        assert torch.equal(x[seen], full[seen])
        # Five standard deviations of the share of pixels seen.
        assert abs(seen.float().mean() - 0.3) < 5 * (0.21 / seen.numel()) ** 0.5
    masks = [data.minibatch(step).isnan() for step in (5, 6)]
    masks.append(MissingPixels(whole, 0.3, seed=4).minibatch(5).isnan())
    masks += [
        data.subset(split, 32, seed).isnan() for split in ("valid", "test") for seed in (1, 2)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(masks[0], again.minibatch(5).isnan())
    assert torch.equal(masks[-1], again.subset("test", 32, 2).isnan())
