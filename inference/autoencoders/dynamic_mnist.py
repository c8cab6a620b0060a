# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Dynamically binarized MNIST, and other sets of images in its format (IDX).

A pixel is white with a probability equal to its grey value. Training draws anew whenever an image
is seen, so no two epochs are alike; validation and test images are drawn once, with one seed for
all runs, so that figures of different runs are of the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from inference.autoencoders.batches import Order, chosen, generator
from inference.autoencoders.binarized_mnist import find_data_dir
from inference.shared.errors import UserError

__all__ = ["DynamicMNIST", "load_images"]

#: torchvision's class, which names the folder, by the value of the option.
_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}

#: Seed of the validation and test images.
_FIXED = 28


class DynamicMNIST:
    """Images kept as grey values, binarized minibatch by minibatch.

    :param dict splits: grey values ``uint8 [n, 784]`` of ``"train"``, ``"valid"`` and ``"test"``.
    :param int batch_size: images of a minibatch.
    :param int seed: seed of the order of the training images, and of their binarization.
    :param bool with_valid: train on the validation images too.
    :param torch.device device: where the images are kept.
    """

    def __init__(
        self,
        splits: Mapping[str, Tensor],
        batch_size: int,
        seed: int,
        *,
        with_valid: bool = False,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        self.splits = {name: rows.to(device) for name, rows in splits.items()}
        if with_valid:
            self.splits["train"] = torch.cat([self.splits["train"], self.splits["valid"]])
        train = self.splits["train"]
        self.seed = seed
        self.order = Order(len(train), batch_size, seed, device=device)
        sums = [part.sum(0, dtype=torch.float32) for part in train.split(5000)]
        self.mean = torch.stack(sums).sum(0) / (255 * len(train))
        self._fixed: dict[str, Tensor] = {}

    def minibatch(self, step: int) -> Tensor:
        grey = self.splits["train"][self.order.indices(step)]
        return _binarize(grey, generator(self.seed, 2, step, device=grey.device))

    def subset(self, split: str, num_points: int | None, seed: int) -> Tensor:
        if split not in self._fixed:
            grey = self.splits[split].cpu()  # the same draw on every device
            source = generator(_FIXED, {"valid": 1, "test": 2}[split])
            drawn = [_binarize(part, source).bool() for part in grey.split(5000)]
            self._fixed[split] = torch.cat(drawn).to(self.mean.device)
        rows = self._fixed[split]
        return rows[chosen(len(rows), num_points, seed).to(rows.device)].float()


def _binarize(grey: Tensor, source: torch.Generator) -> Tensor:
    """Grey values ``uint8`` to zeros and ones, ``float32``."""
    threshold = torch.rand(grey.shape, generator=source, device=grey.device)
    return (255 * threshold < grey).float()


def load_images(
    data_dir: Path | None = None, name: str = "mnist", *, download: bool = False
) -> dict[str, Tensor]:
    """Loads grey images by torchvision.

    :param Path data_dir: see :func:`inference.autoencoders.binarized_mnist.find_data_dir`.
    :param str name: ``"mnist"`` or ``"fashion-mnist"``.
    :param bool download: whether to download files that are not there.
    :returns: ``uint8 [n, 784]`` by name of the split. Validation images are the last sixth of the
        training file: 50,000, 10,000 and 10,000 images.
    :raises UserError: if the files are missing, damaged, or cannot be fetched.
    """
    from torchvision import datasets  # takes a second to import

    kind = getattr(datasets, _CLASSES[name])
    directory = find_data_dir(data_dir)
    raw = directory / _CLASSES[name] / "raw"
    try:
        train, test = (
            kind(str(directory), train=train, download=download).data for train in (True, False)
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(
            f"{raw}: expected train-images-idx3-ubyte, train-labels-idx1-ubyte and the two "
            f"t10k files of {_CLASSES[name]}, found: {error}; name the folder that holds "
            f"{_CLASSES[name]}/raw by --data-dir or PYRO_ARDAE_DATA, or add --download"
        ) from None
    for images in (train, test):
        if images.shape[1:] != (28, 28) or len(images) < 6:
            raise UserError(f"{raw}: expected images of 28 by 28, found {tuple(images.shape)}")
    train, test = train.flatten(1), test.flatten(1)
    cut = len(train) - len(train) // 6
    return {"train": train[:cut], "valid": train[cut:], "test": test}
