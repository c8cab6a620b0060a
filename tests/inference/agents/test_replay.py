# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from inference.agents.replay import Batch, Replay


def transitions(first: int, count: int) -> Batch:
    """Transitions that are told apart by their reward."""
    number = torch.arange(first, first + count).float()
    obs = number.unsqueeze(-1) + torch.tensor([0.1, 0.2, 0.3])
    return Batch(obs, -number.unsqueeze(-1).expand(-1, 2), number, obs + 1, (number % 2))


def test_keeps_the_last_ones_whole() -> None:
    replay = Replay(10, 3, 2)
    for first in range(0, 24, 4):
        replay.add(transitions(first, 4))
        assert len(replay) == min(first + 4, 10)
    batch = replay.sample(1000)
    assert set(batch.reward.tolist()) == set(map(float, range(14, 24)))
    for row in range(1000):
        expected = transitions(int(batch.reward[row]), 1)
        for part, wanted in zip(batch, expected, strict=True):
            assert torch.equal(part[row], wanted[0])


def test_draws_are_uniform(chi_square_bound: Callable[[float], float]) -> None:
    replay = Replay(50, 3, 2)
    replay.add(transitions(0, 20))
    counts = torch.bincount(replay.sample(20_000).reward.long(), minlength=20)
    assert float((counts - 1000).square().sum() / 1000) < chi_square_bound(19)


def test_memory_is_one_contiguous_block() -> None:
    replay = Replay(100, 3, 2)
    address = replay.rows.data_ptr()
    for first in range(0, 300, 7):
        replay.add(transitions(first, 7))
    assert replay.rows.data_ptr() == address
    assert replay.rows.is_contiguous()
    assert replay.sample(5).obs.shape == (5, 3)


@pytest.mark.parametrize("added", [4, 25])
def test_state_resumes(added: int) -> None:
    one, other = Replay(10, 3, 2), Replay(10, 3, 2)
    for first in range(0, added, 2):
        one.add(transitions(first, 2))
    state = one.state_dict()
    one.add(transitions(100, 3))
    other.load_state_dict(state)
    other.add(transitions(100, 3))
    draws = []
    for replay in (one, other):
        torch.manual_seed(5)
        draws.append(replay.sample(64))
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_bad_input() -> None:
    replay = Replay(10, 3, 2)
    with pytest.raises(ValueError, match="expected transitions to draw from, got none"):
        replay.sample(1)
    with pytest.raises(ValueError, match="at most 10 transitions"):
        replay.add(transitions(0, 11))
    with pytest.raises(ValueError, match=r"widths \[4, 2, 1, 4, 1\].*got 2 of \[3, 2, 1, 3, 1\]"):
        Replay(10, 4, 2).add(transitions(0, 2))
    with pytest.raises(ValueError, match="expected a capacity >= 1, got 0"):
        Replay(0, 3, 2)
    replay.add(transitions(0, 4))
    with pytest.raises(ValueError, match="expected rows"):
        Replay(2, 3, 2).load_state_dict(replay.state_dict())
