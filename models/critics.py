# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Critics: the twin action-value networks of soft actor-critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.stack import ReLUStack

__all__ = ["TwinCritic"]


class TwinCritic(nn.Module):
    """Two action-value networks with weights of their own.

    Both are trained by one loss and one optimizer step, and the smaller value is used (clipped
    double Q-learning, Fujimoto et al. 2018, `arXiv 1802.09477 <https://arxiv.org/abs/1802.09477>`_).

    :param int obs_dim: width of an observation, >= 1.
    :param int action_dim: width of an action, >= 1.
    :param Sequence[int] hidden_dims: widths of the hidden layers, one at least.
    :param torch.dtype compute_dtype: as in :class:`~models.stack.ReLUStack`.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden_dims: Sequence[int] = (256, 256),
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (obs_dim + action_dim, *hidden_dims, 1)
        self.stack = ReLUStack(2, sizes, compute_dtype=compute_dtype)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """``obs [B, obs_dim]`` and ``action [B, D]`` in ``(-1, 1)`` to values ``[2, B]``."""
        values: Tensor = self.stack(torch.cat([obs, action], -1))
        return values.squeeze(-1)
