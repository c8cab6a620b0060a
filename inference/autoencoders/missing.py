# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Images of which only some pixels are seen."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.autoencoders.batches import generator
from inference.autoencoders.data import Dataset

__all__ = ["MissingPixels"]

_TRAIN, _SUBSET = 3, 4


class MissingPixels:
    """A data set whose pixels are missing at random, NaN in place of what is not seen.

    Which ones is drawn afresh in each minibatch; in a subset they follow from its seed, on every
    device alike.

    :param Dataset data: whole images.
    :param float seen_share: probability that a pixel is seen, in (0, 1).
    :param int seed: seed of the training images' missing pixels.
    """

    def __init__(self, data: Dataset, seen_share: float, seed: int) -> None:
        self.data, self.seen_share, self.seed = data, seen_share, seed
        self.mean = data.mean

    def minibatch(self, step: int) -> Tensor:
        images = self.data.minibatch(step)
        return self._hide(images, images.device, _TRAIN, self.seed, step)

    def subset(self, split: str, num_points: int | None, seed: int) -> Tensor:
        images = self.data.subset(split, num_points, seed)
        key = seed, {"valid": 1, "test": 2}[split]
        return self._hide(images, torch.device("cpu"), _SUBSET, *key)

    def _hide(self, images: Tensor, device: torch.device, *key: int) -> Tensor:
        """Images without some of their pixels, which are drawn on ``device``."""
        source = generator(*key, device=device)
        seen = torch.rand(images.shape, generator=source, device=device) < self.seen_share
        return images.masked_fill(~seen.to(images.device), torch.nan)
