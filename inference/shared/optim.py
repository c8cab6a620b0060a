# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The optimizer of the programs: one torch optimizer behind Pyro's interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_ardae.score.clipping import clip_factor

__all__ = ["TorchOptim"]


class TorchOptim(PyroOptim):
    """Steps all parameters of a module with one torch optimizer, for :class:`pyro.infer.SVI`.

    :class:`pyro.optim.Adam` builds one optimizer for each parameter. Of an 8 ms step that costs
    1 ms, and the norm of the whole gradient cannot be clipped.

    :param nn.Module module: its parameters are those that SVI trains, all that require a gradient.
    :param torch.optim.Optimizer optimizer: an optimizer of these parameters.
    :param float clip: bound on the norm of the whole gradient, in units of its running mean; with
        ``None`` there is none. An absolute bound that is right for one model, batch or time of a
        training is loose or in the way for another. A step whose gradient is not finite is left
        out, for which the optimizer has to be a fused one.
    :raises ValueError: for a bound with an optimizer that is not fused.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float | None = None
    ) -> None:
        if clip is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"clip: expected a fused optimizer, got {type(optimizer).__name__}: pass fused=True"
            )
        # PyroOptim.__init__ sets up the optimizers by parameter that this class replaces.
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.clip = clip
        self._mean_norm: Tensor | None = None
        self._checked = False

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        if not self._checked:
            if {id(p) for p in params} != {id(p) for p in self.parameters}:
                raise ValueError(
                    "expected SVI to train the parameters of the module, got others: was another "
                    "model of the same name trained before? Call pyro.clear_param_store() first."
                )
            self._checked = True
        if self.clip is not None:
            self._bound_gradient(self.clip)
        self.optimizer.step()
        # None, not zeros: the next backward pass assigns instead of adding.
        self.optimizer.zero_grad(set_to_none=True)

    def _bound_gradient(self, clip: float) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self._mean_norm is None:
            self._mean_norm = torch.zeros_like(norm)
        torch._foreach_mul_(gradients, clip_factor(norm, self._mean_norm, clip))
        # Fused optimizers leave out a step that a GradScaler finds to be none: no factor mends inf.
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]

    def get_state(self) -> dict[str, Any]:
        """The state of the optimizer, and what gradients are clipped by."""
        return {"optimizer": self.optimizer.state_dict(), "mean_norm": self._mean_norm}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`get_state` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        mean = state_dict["mean_norm"]
        self._mean_norm = None if mean is None else mean.clone()  # it is changed in place
