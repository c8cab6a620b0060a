# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The optimizer of the programs: one torch optimizer behind Pyro's interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

__all__ = ["TorchOptim"]


class TorchOptim(PyroOptim):
    """Steps all parameters of a module with one torch optimizer, for :class:`pyro.infer.SVI`.

    :class:`pyro.optim.Adam` builds one optimizer for each parameter. Of an 8 ms step that costs
    1 ms, and the norm of the whole gradient cannot be clipped.

    :param nn.Module module: its parameters are those that SVI trains, all that require a gradient.
    :param torch.optim.Optimizer optimizer: an optimizer of these parameters.
    :param float clip_norm: largest norm of the gradient; ``None`` does not clip.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float | None = None
    ) -> None:
        # PyroOptim.__init__ sets up the optimizers by parameter that this class replaces.
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self._checked = False

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        if not self._checked:
            if {id(p) for p in params} != {id(p) for p in self.parameters}:
                raise ValueError(
                    "expected SVI to train the parameters of the module, got others: was another "
                    "model of the same name trained before? Call pyro.clear_param_store() first."
                )
            self._checked = True
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        # None, not zeros: the next backward pass assigns instead of adding.
        self.optimizer.zero_grad(set_to_none=True)

    def get_state(self) -> dict[str, Any]:
        """The state of the optimizer."""
        return self.optimizer.state_dict()

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of the optimizer."""
        self.optimizer.load_state_dict(state_dict)
