# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What time is measured in: wall-clock, or this process's CPU time.

On one thread, CPU time is the wall-clock of an idle core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["Clock", "clock_of", "median_seconds"]

Clock = Literal["wall", "cpu"]


def clock_of(kind: Clock) -> Callable[[], float]:
    """The seconds so far, from some time on."""
    return time.perf_counter if kind == "wall" else time.process_time


def median_seconds(
    jobs: Mapping[str, Callable[[], Any]], *, turns: int, warmup: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median time of each job. They take turns, so that a slow moment of the machine meets all.

    :param jobs: by name.
    :param turns: timed calls of each.
    :param warmup: calls of each before.
    :param clock: seconds so far.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + turns):
        for name, job in jobs.items():
            start = clock()
            job()
            if turn >= warmup:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}
