# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import pytest

from inference.benchmarks import sac as bench_sac
from inference.benchmarks.sac import Sac
from inference.shared import clock as clock_module

AGENTS = ("sac", "sac-nf", "sac-ardae")


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_times_are_medians_of_one_update(
    clock: Literal["wall", "cpu"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only updates move: those of warm-up and the last one take a minute."""
    now, done = {"wall": 0.0, "cpu": 0.0}, dict.fromkeys(("sb3", *AGENTS), 0)

    def job(name: str, milliseconds: float) -> Callable[[], None]:
        def update() -> None:
            index, done[name] = done[name], done[name] + 1
            now[clock] += 60.0 if index < 4 or index == 8 else milliseconds / 1e3

        return update

    def read(name: str) -> Callable[[], float]:
        return lambda: now[name]

    fake = SimpleNamespace(perf_counter=read("wall"), process_time=read("cpu"))
    monkeypatch.setattr(clock_module, "time", fake)
    monkeypatch.setattr(bench_sac, "_build_sb3", lambda options: job("sb3", 8.0))
    milliseconds = {"sac": 2.0, "sac-nf": 12.0, "sac-ardae": 4.0}
    monkeypatch.setattr(bench_sac, "_build", lambda name, options: job(name, milliseconds[name]))
    figures = bench_sac.bench_sac(Sac(updates=5, warmup=4, clock=clock))
    assert figures["ms"] == pytest.approx({"sb3": 8.0, **milliseconds})
    assert figures["ratio_to_sb3"] == pytest.approx({"sac": 0.25, "sac-nf": 1.5, "sac-ardae": 0.5})
    assert done == {"sb3": 9, "sac": 9, "sac-nf": 9, "sac-ardae": 9}
