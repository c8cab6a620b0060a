# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Schedules over what of a run is done, whatever it is measured in."""

from __future__ import annotations

import math
from typing import Any

from pyro_ardae import TraceImplicit_ELBO

__all__ = ["annealed", "cosine_decay", "decay_score"]


def annealed(progress: float, start: float, end: float) -> float:
    """From ``start`` to 1, geometrically, until ``end``.

    :param float progress: what of the run is done, >= 0: a share, or steps.
    :param float start: value at the first step, > 0.
    :param float end: in the same unit, >= 0; 0: it is 1 throughout.
    """
    return float(start ** max(0.0, 1 - progress / end)) if end else 1.0


def cosine_decay(progress: float, start: float) -> float:
    """1 until the share ``start`` of the run, then half a cosine to 0 at its end.

    :param float progress: share of the run that is done, in [0, 1].
    :param float start: in [0, 1).
    """
    past = max(0.0, (progress - start) / (1 - start))
    return 0.5 + 0.5 * math.cos(math.pi * past)


def decay_score(loss: Any, rate: float, decay: float) -> None:
    """Sets the step sizes of a loss's score estimators, if it has any, for the next step.

    :param loss: the loss of the training.
    :param float rate: their step size at first.
    :param float decay: factor on the guide's; with smaller steps of it there is less to follow, but
        the score's goes no lower than a tenth.
    """
    if isinstance(loss, TraceImplicit_ELBO):
        for estimator in loss.estimators.values():
            estimator.learning_rate = rate * max(0.1, decay)
