# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What every score estimator is: learn from samples of q, answer with the score of q."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ScoreEstimator"]


class ScoreEstimator(nn.Module, ABC):
    r"""Estimator of the score :math:`\nabla_z \log q(z \mid c)` from samples of q.

    Samples come as ``[S, *batch, dim]`` with one context ``[*batch, C]`` per batch element, S draws
    each. An estimator owns its optimizer; nothing it does leaves a gradient on samples or context.

    :param dim: dimensions of z, >= 1.
    :param context_dim: dimensions C of the context; 0 for an unconditional q.
    :raises ValueError: if ``dim`` < 1 or ``context_dim`` < 0.
    """

    needs_center: bool = False
    """Whether ``center`` must be given (the paper's own setting)."""

    needs_samples: bool = True
    """Whether :meth:`forward` reads ``samples``; if not, their shape alone, and S may be 0."""

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        if dim < 1 or context_dim < 0:
            raise ValueError(
                f"{type(self).__name__}: expected dim >= 1 and context_dim >= 0, got {dim} and "
                f"{context_dim}."
            )
        self.dim = dim
        self.context_dim = context_dim

    @abstractmethod
    def update(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Tensor:
        """Learn from fresh draws of q(· | context).

        :param samples: ``[S, *batch, dim]``, independent along S.
        :param context: ``[*batch, C]``; ``None`` if ``context_dim`` is 0.
        :param center: ``[*batch, dim]``, the sampler's output for zero noise; read only by
            estimators that set ``needs_center``.
        :returns: the detached scalar loss (0 for estimators that learn nothing).
        """

    @abstractmethod
    def forward(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch dim"]:
        """The score at ``value``, detached.

        :param value: ``[N, *batch, dim]``, where the score is wanted.
        :param samples: ``[S, *batch, dim]``, draws of the same q, independent of ``value``.
        :param context: ``[*batch, C]``, as in :meth:`update`.
        :param center: as in :meth:`update`.
        """

    def log_prob(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch"]:
        """The normalized log density at ``value``, where the estimator has one.

        :raises NotImplementedError: if it estimates the score alone.
        """
        raise NotImplementedError(
            f"{type(self).__name__} estimates the score alone and has no log_prob(). Use "
            "ARDAE(…, parametrization='energy')."
        )

    def _rows(
        self, samples: Tensor, context: Tensor | None, *, least: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Check shapes; return detached samples ``[S, B, dim]`` and context ``[B, C]``.

        :param least: S at least.
        :raises ValueError: if they are not those that the estimator was built for.
        """
        name = type(self).__name__
        if samples.dim() < 2 or samples.shape[-1] != self.dim:
            raise ValueError(
                f"{name}: expected samples [S, *batch, {self.dim}], got {tuple(samples.shape)}."
            )
        if len(samples) < least:
            raise ValueError(
                f"{name}: expected at least {least} draws per context, got {len(samples)}. Raise "
                "num_score_samples."
            )
        width = 0 if context is None else context.shape[-1]
        if width != self.context_dim:
            raise ValueError(
                f"{name}: expected a context [*batch, {self.context_dim}], got "
                f"{'none' if context is None else tuple(context.shape)}. Build the estimator with "
                f"context_dim={width}, or pass the context that it was built for."
            )
        if context is not None and context.shape[:-1] != samples.shape[1:-1]:
            raise ValueError(
                f"{name}: expected a context of batch shape {tuple(samples.shape[1:-1])}, that of "
                f"the samples {tuple(samples.shape)}, got {tuple(context.shape)}."
            )
        count = samples.shape[1:-1].numel()  # there may be no samples
        rows = samples.detach().reshape(len(samples), count, self.dim)
        if context is None:
            return rows, rows.new_zeros(rows.shape[1], 0)
        return rows, context.detach().reshape(rows.shape[1], width)

    def _points(self, value: Tensor, samples: Tensor) -> Tensor:
        """Check shapes; return detached values ``[N, B, dim]``.

        :raises ValueError: if they are not those of the samples.
        """
        if value.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"{type(self).__name__}: expected value [N, *batch, dim] with the samples' batch "
                f"shape and dim {tuple(samples.shape[1:])}, got {tuple(value.shape)}."
            )
        rows = samples.shape[1:-1].numel()  # there may be no values
        return value.detach().reshape(len(value), rows, self.dim)

    def _in_range(self, name: str, value: float | None, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: expected {name} {expected}, got {value}.")
