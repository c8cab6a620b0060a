# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The loss of a reparameterized guide without reading a number back from the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_ardae import TraceImplicit_ELBO

__all__ = ["surrogate_loss"]


def surrogate_loss(
    elbo: Trace_ELBO, model: Callable[..., Any], guide: Callable[..., Any], *args: Any
) -> Tensor:
    r""":math:`E_q[\log q(z \mid x) - \log p(x, z)]`, to be differentiated.

    Score estimators are trained on the way.

    For a guide that is reparameterized throughout this is the value and the gradient of
    ``elbo.loss_and_grads``, which returns a Python float: on a GPU it waits for every
    site of every step, this does not. Pyro's validation of the traces, which waits too, is off, and
    so is the check of the draws. A score network reads a number back every few of its updates.

    :param Trace_ELBO elbo: the loss, with or without implicit sites.
    :param callable model: a Pyro model.
    :param callable guide: a guide of it without sites that need a score function.
    :param args: arguments of both.
    """
    implicit = isinstance(elbo, TraceImplicit_ELBO)
    learning = elbo._learn(checked=False) if implicit else nullcontext()
    total: Any = 0.0
    with learning, pyro.validation_enabled(False):
        for model_trace, guide_trace in elbo._get_traces(model, guide, args, {}):
            total = total + guide_trace.log_prob_sum() - model_trace.log_prob_sum()
    return total / elbo.num_particles
