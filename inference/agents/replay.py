# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The replay buffer of off-policy reinforcement learning: one preallocated tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "Replay"]


class Batch(NamedTuple):
    """Transitions, along the first dimension."""

    obs: Tensor
    """``[B, obs_dim]``"""
    action: Tensor
    """``[B, action_dim]``, in [-1, 1]."""
    reward: Tensor
    """``[B]``"""
    next_obs: Tensor
    """``[B, obs_dim]``: at the end of an episode its last observation, not the next one's first."""
    terminated: Tensor
    """``[B]``: 1 where the episode ended and nothing follows, 0 where it goes on or was cut off."""


class Replay:
    """The last ``capacity`` transitions, one row each; drawing B of them takes O(B).

    :param int capacity: transitions that are kept, >= 1.
    :param int obs_dim: width of an observation.
    :param int action_dim: width of an action.
    :param device: where the rows are kept.
    :raises ValueError: if the capacity is not positive.
    """

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, *, device: str | torch.device = "cpu"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"Replay: expected a capacity >= 1, got {capacity}.")
        self.capacity = capacity
        self._widths = [obs_dim, action_dim, 1, obs_dim, 1]
        # Memory that is not written to yet is not taken from the machine either.
        self.rows = torch.empty(capacity, sum(self._widths), device=device)
        self.added = 0

    def __len__(self) -> int:
        """Transitions that are held."""
        return min(self.added, self.capacity)

    def add(self, batch: Batch) -> None:
        """Appends transitions, at most ``capacity`` of them, over the oldest ones.

        :raises ValueError: for shapes that do not fit, or more transitions than fit.
        """
        obs, action, reward, next_obs, terminated = batch
        parts = [obs, action, reward.unsqueeze(-1), next_obs, terminated.unsqueeze(-1)]
        widths = [part.shape[-1] for part in parts]
        if widths != self._widths or len(obs) > self.capacity:
            raise ValueError(
                f"Replay: expected at most {self.capacity} transitions of widths {self._widths} "
                f"(obs, action, reward, next obs, terminated), got {len(obs)} of {widths}."
            )
        rows = torch.cat([part.to(self.rows) for part in parts], -1)
        first = self.added % self.capacity
        at_end = min(len(rows), self.capacity - first)
        self.rows[first : first + at_end] = rows[:at_end]
        self.rows[: len(rows) - at_end] = rows[at_end:]
        self.added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """Draws transitions uniformly, with replacement.

        :raises ValueError: if there are none.
        """
        if not len(self):
            raise ValueError("Replay: expected transitions to draw from, got none; add() them.")
        index = torch.randint(len(self), (batch_size,), device=self.rows.device)
        obs, action, reward, next_obs, terminated = self.rows[index].split(self._widths, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def state_dict(self) -> dict[str, Any]:
        """The rows that are held, and how many were ever added."""
        return {"rows": self.rows[: len(self)].clone(), "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, into a buffer of the same capacity.

        :raises ValueError: if the rows are not those of such a buffer.
        """
        held = min(state["added"], self.capacity), self.rows.shape[1]
        if tuple(state["rows"].shape) != held:
            raise ValueError(
                f"Replay: expected rows {held} of a buffer of capacity {self.capacity}, got "
                f"{tuple(state['rows'].shape)}."
            )
        self.added = state["added"]
        self.rows[: len(self)] = state["rows"]
