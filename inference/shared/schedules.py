# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Schedules over what of a run is done, whatever it is measured in."""

from __future__ import annotations

import math

__all__ = ["annealed", "cosine_decay"]


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
