# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What estimators with a network share: an optimizer of their own, and a state that resumes."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch

from pyro_ardae.score.estimator import ScoreEstimator

__all__ = ["TrainedEstimator"]


class TrainedEstimator(ScoreEstimator):
    """Score estimator whose parameters are learned by gradient steps.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        self.updates = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_state: dict[str, Any] | None = None
        """Loaded, of an optimizer that has not been used yet."""

    def _check_network(self, hidden_dim: int, depth: int) -> None:
        self._in_range("hidden_dim", hidden_dim, hidden_dim >= 1, ">= 1")
        self._in_range("depth", depth, depth >= 1, ">= 1")

    @abstractmethod
    def _build_optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Built at its first use, when device and dtype are known."""
        if self._optimizer is None:
            self._optimizer = self._build_optimizer()
            if self._optimizer_state is not None:
                self._optimizer.load_state_dict(self._optimizer_state)
                self._optimizer_state = None
        return self._optimizer

    def get_extra_state(self) -> dict[str, Any]:
        """Counter and optimizer, so that a resumed run continues bit for bit."""
        return {"updates": self.updates, "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` gave."""
        self.updates = state["updates"]
        # Anew, since the parameters may be other tensors now; copied, since it is changed in place.
        self._optimizer, self._optimizer_state = None, copy.deepcopy(state["optimizer"])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._optimizer is not None:  # its state follows the parameters to their device
            for parameter, state in self._optimizer.state.items():
                for key, entry in state.items():  # the counter keeps its dtype
                    state[key] = fn(entry) if key != "step" else entry.to(parameter.device)
        return self
