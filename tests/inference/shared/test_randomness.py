# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from inference.shared.randomness import forked_rng, load_rng_state, rng_state


def test_seeds_of_a_moment_leave_all_generators_as_they_are() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seen = []
    for _ in range(2):
        with forked_rng(7):
            seen.append(draw())
    before = rng_state()
    with forked_rng(7):
        seen.append(draw())
    after = draw()
    load_rng_state(before)
    assert seen[0] == seen[1] == seen[2] != after == draw()


def test_a_state_of_more_gpus_is_taken_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: taken.append(len(states)))
    load_rng_state({**rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2})
    assert taken == [1]
