# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Affine maps by a triangular matrix, a batch of them at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Transform, constraints

__all__ = ["Below", "UnitLowerAffine"]


class _Product(torch.autograd.Function):
    """``(entries * (w @ columns)) @ rows``; by autograd it takes half as long again."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, w: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        factors = w @ columns
        ctx.save_for_backward(entries, factors, columns, rows)
        return (entries * factors) @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        entries, factors, columns, rows = ctx.saved_tensors
        of_terms = grad @ rows.mT
        return of_terms * factors, (of_terms * entries) @ columns.mT, None, None


class Below(nn.Module):
    """The entries below the diagonal of a square matrix, row by row, and what they multiply.

    For one w to a matrix, ``(entries * (w @ columns)) @ rows`` is the strictly lower triangular
    matrix times w: two small products with matrices of zeros and ones, cheaper than writing the
    entries into matrices. For many, these are written out.

    :param int dim: D, rows of the matrix.
    """

    rows: Tensor
    columns: Tensor
    index: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        row, column = torch.tril_indices(dim, dim, -1)
        eye = torch.eye(dim)
        self.register_buffer("rows", eye[row], persistent=False)
        self.register_buffer("columns", eye[:, column].contiguous(), persistent=False)
        self.register_buffer("index", row * dim + column, persistent=False)

    @property
    def count(self) -> int:
        """Number of entries, D (D - 1) / 2."""
        return len(self.index)

    def forward(self, entries: Tensor, w: Tensor) -> Tensor:
        """Entries ``[B, count]`` and ``w [*sample, B, D]`` to L w, shaped like w."""
        if w.dim() > entries.dim():
            return torch.einsum("bij,...bj->...bi", self.dense(entries), w)
        found: Tensor = _Product.apply(entries, w, self.columns, self.rows)
        return found

    def dense(self, entries: Tensor) -> Tensor:
        """L itself, ``[B, D, D]``."""
        zeros = entries.new_zeros(*entries.shape[:-1], self.dim * self.dim)
        return zeros.index_copy(-1, self.index, entries).unflatten(-1, (self.dim, self.dim))


class UnitLowerAffine(Transform):
    r""":math:`z = \mu + \sigma \odot (I + L)\, w` with L strictly lower triangular.

    Pyro's ``LowerCholeskyAffine`` has one matrix for the whole batch.

    :param Tensor loc: :math:`\mu`, ``[B, D]``.
    :param Tensor scale: :math:`\sigma`, ``[B, D]``, positive.
    :param Tensor entries: those of L below the diagonal, ``[B, D (D - 1) / 2]``.
    :param Below below: where they belong.
    :param int cache_size: 1 to keep the last w with its z, so that its inverse is no work.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self, loc: Tensor, scale: Tensor, entries: Tensor, below: Below, *, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.loc, self.scale, self.entries, self.below = loc, scale, entries, below

    def with_cache(self, cache_size: int = 1) -> UnitLowerAffine:
        """The same map with another size of the cache."""
        if cache_size == self._cache_size:
            return self
        return UnitLowerAffine(
            self.loc, self.scale, self.entries, self.below, cache_size=cache_size
        )

    def _call(self, w: Tensor) -> Tensor:
        return torch.addcmul(self.loc, self.scale, w + self.below(self.entries, w))

    def _inverse(self, z: Tensor) -> Tensor:
        column = ((z - self.loc) / self.scale).unsqueeze(-1)
        lower = self.below.dense(self.entries)
        solve = torch.linalg.solve_triangular
        return solve(lower, column, upper=False, unitriangular=True).squeeze(-1)

    def log_abs_det_jacobian(self, w: Tensor, z: Tensor) -> Tensor:
        """The log of the product of the scales, ``[*sample, B]``."""
        return self.scale.log().sum(-1).expand(w.shape[:-1])
