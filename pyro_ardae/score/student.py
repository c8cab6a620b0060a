# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What is known of a whitened draw before anything is learned: a Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import StudentT

__all__ = ["Student"]


class Student(NamedTuple):
    r"""Independent Student's t in each coordinate, or a Gaussian for infinite ``degrees``.

    If q is Gaussian and its moments come from n other draws, a whitened draw is a t with
    :math:`n - 1` degrees of freedom and squared scale :math:`1 + 1/n`: the predictive
    distribution. Its score is bounded, where a Gaussian's would push an outlier outwards in
    proportion to its distance, which lets the tails of a guide run away.
    """

    degrees: float
    """Degrees of freedom, > 0."""
    square_scale: float
    """Square of the scale, > 0."""

    @classmethod
    def predictive(cls, draws: float, dim: int = 1) -> Student:
        """That of a draw whitened with moments of ``draws`` others.

        :param draws: number of other draws, > ``dim``.
        :param dim: dimensions that are whitened jointly (1: each by its own scale).
        """
        degrees = max(1, draws - dim)
        return cls(degrees, (1 + 1 / draws) * max(1, draws - 1) / degrees)

    def score(self, w: Tensor, square_sigma: Tensor | float = 0.0) -> Tensor:
        r"""Score at w of the t widened by noise: exact for a Gaussian, or without noise.

        :param w: ``[..., D]``.
        :param square_sigma: variance of the noise, broadcasting against w.
        """
        if math.isinf(self.degrees):
            return w / -(self.square_scale + square_sigma)
        inverse = 1 / self.degrees
        return -(1 + inverse) * w / (w.square() * inverse + (self.square_scale + square_sigma))

    def log_prob(self, w: Tensor) -> Tensor:
        """``w [..., D]`` to ``[...]``."""
        if math.isinf(self.degrees):
            square = w.square().sum(-1) / self.square_scale
            return -0.5 * (square + w.shape[-1] * math.log(2 * math.pi * self.square_scale))
        return self._distribution(w).log_prob(w).sum(-1)

    def sample(self, shape: Size, like: Tensor) -> Tensor:
        """Draws of a shape, with the dtype and device of ``like``."""
        if math.isinf(self.degrees):
            draws = torch.randn(shape, dtype=like.dtype, device=like.device)
            return draws * math.sqrt(self.square_scale)
        return self._distribution(like).sample(shape)

    def _distribution(self, like: Tensor) -> StudentT:
        # new_full fills on the device, which new_tensor would be waited for by.
        degrees, scale = (
            like.new_full((), number) for number in (self.degrees, math.sqrt(self.square_scale))
        )
        return StudentT(degrees, torch.zeros_like(scale), scale, validate_args=False)
