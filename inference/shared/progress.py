# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A bar that shows seconds."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

__all__ = ["advance"]


def advance(progress: tqdm[Any], to: float) -> None:
    """Moves a bar of seconds on, but never beyond its end: the last step of a run may take it a
    little past its time, and tqdm warns of a sum that is above the total by as much as a rounding.

    :param tqdm progress: a bar with a total.
    :param float to: seconds, of all.
    """
    end = progress.total * (1 - 1e-9)
    progress.update(max(0.0, min(to, end) - progress.n))
