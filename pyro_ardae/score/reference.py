# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A known field in place of a Gaussian's, from which a network learns the difference."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Reference"]


class Reference:
    """The score of a density near q, where one is known: for a guide, that of the model.

    What is left for the network is the gradient of the log ratio of q and that density. It vanishes
    as a guide reaches the posterior, and so does the network's error, which is otherwise relative
    to the score itself: a small error of a steep score can hide for how much mass lies where.

    :param score: points ``[..., D]`` to the gradient of the log density there, of the same shape.
    """

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self._score = score

    def score(self, w: Tensor, square_sigma: Tensor | float = 0.0) -> Tensor:
        """Score at w, whatever the variance of the noise: a network that sees sigma corrects it."""
        return self._score(w).clone()  # the caller adds to it in place
