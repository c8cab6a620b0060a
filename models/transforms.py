# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Affine maps by a triangular matrix, a batch of them at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["UnitLowerAffine"]


class UnitLowerAffine(Transform):
    r""":math:`z = \mu + \sigma \odot (I + L)\, w` with L strictly lower triangular.

    Pyro's ``LowerCholeskyAffine`` has one matrix for the whole batch; here the determinant is the
    product of the scales, so the matrix need not be multiplied out.

    :param Tensor loc: :math:`\mu`, ``[*batch, D]``.
    :param Tensor scale: :math:`\sigma`, ``[*batch, D]``, positive.
    :param Tensor lower: L, ``[*batch, D, D]``; what is not below the diagonal has to be zero.
    :param int cache_size: 1 to keep the last w with its z, so that its inverse is no work.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale: Tensor, lower: Tensor, *, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.loc, self.scale, self.lower = loc, scale, lower

    def with_cache(self, cache_size: int = 1) -> UnitLowerAffine:
        """The same map with another size of the cache."""
        if cache_size == self._cache_size:
            return self
        return UnitLowerAffine(self.loc, self.scale, self.lower, cache_size=cache_size)

    def _call(self, w: Tensor) -> Tensor:
        mixed = w + torch.matmul(self.lower, w.unsqueeze(-1)).squeeze(-1)
        return torch.addcmul(self.loc, self.scale, mixed)

    def _inverse(self, z: Tensor) -> Tensor:
        column = ((z - self.loc) / self.scale).unsqueeze(-1)
        solve = torch.linalg.solve_triangular
        return solve(self.lower, column, upper=False, unitriangular=True).squeeze(-1)

    def log_abs_det_jacobian(self, w: Tensor, z: Tensor) -> Tensor:
        """The log of the product of the scales, ``[*sample, *batch]``."""
        return self.scale.log().sum(-1).expand(w.shape[:-1])
