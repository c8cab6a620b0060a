# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What all estimators with a network have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ardae.score import ARDAE, DAE, PaperARDAE, ScoreEstimator, SlicedScore

every = pytest.mark.parametrize("kind", [ARDAE, SlicedScore, PaperARDAE, DAE])


def train(estimator: ScoreEstimator, updates: int, seed: int) -> Tensor:
    """Weights after some updates whose noise follows from the seed."""
    torch.manual_seed(seed)
    for _ in range(updates):
        estimator.update(torch.randn(16, 4, 2), torch.randn(4, 3), center=torch.zeros(4, 2))
    return torch.cat([p.detach().flatten() for p in estimator.parameters()]).clone()


@every
def test_one_state_starts_several(kind: Callable[[int, int], Any]) -> None:
    first, second, third = (kind(2, 3) for _ in range(3))
    train(first, 3, seed=0)
    state = first.state_dict()
    second.load_state_dict(state)
    expected = train(second, 5, seed=1)
    third.load_state_dict(state)
    assert torch.equal(train(third, 5, seed=1), expected)
    assert torch.equal(train(first, 5, seed=1), expected)  # nor does it disturb the first


@every
def test_a_state_may_take_the_place_of_the_parameters(kind: Callable[[int, int], Any]) -> None:
    first, second = kind(2, 3), kind(2, 3)
    train(first, 3, seed=0)
    train(second, 1, seed=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()), assign=True)
    assert torch.equal(train(second, 2, seed=1), train(first, 2, seed=1))


@every
def test_one_draw_has_no_spread(kind: Callable[[int, int], Any]) -> None:
    estimator = kind(2, 3)
    before = train(estimator, 1, seed=0)
    with pytest.raises(ValueError, match="at least 2 draws per context"):
        train_on_one(estimator)
    after = torch.cat([p.detach().flatten() for p in estimator.parameters()])
    assert torch.equal(before, after)


def train_on_one(estimator: ScoreEstimator) -> None:
    estimator.update(torch.randn(1, 4, 2), torch.randn(4, 3), center=torch.zeros(4, 2))


@pytest.mark.parametrize("kind", [ARDAE, SlicedScore, DAE])
def test_nor_has_it_a_score(kind: Callable[[int, int], Any]) -> None:
    with pytest.raises(ValueError, match="at least 2 draws per context, got 1"):
        kind(2, 3)(torch.randn(5, 4, 2), torch.randn(1, 4, 2), torch.randn(4, 3))


@every
def test_a_query_in_inference_mode(kind: Callable[[int, int], Any]) -> None:
    estimator = kind(2, 3)
    train(estimator, 1, seed=0)
    given = torch.randn(5, 4, 2), torch.randn(16, 4, 2), torch.randn(4, 3)
    expected = estimator(*given, center=torch.zeros(4, 2))
    with torch.inference_mode():
        inside = [one + 0.0 for one in given]
        assert torch.equal(estimator(*inside, center=torch.zeros(4, 2)), expected)
