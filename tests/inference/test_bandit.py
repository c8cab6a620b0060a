# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The bandit: what the evaluation says of the best policy, and the schedules of training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.agents.agent import Agent
from inference.agents.policy import ImplicitPolicy
from inference.bandit import Options, evaluate, train
from models.environments import BANDITS, Bandit


class Best(ImplicitPolicy):
    """Draws of the best policy, p itself, and their density."""

    def __init__(self, bandit: Bandit) -> None:
        nn.Module.__init__(self)
        self.bandit = bandit
        self.actor: Any = SimpleNamespace(draw=self._draw)

    def _draw(self, obs: Tensor, num_draws: int) -> Tensor:
        bandit, state = self.bandit, obs.argmax(-1)
        shape = (num_draws, len(obs), bandit.action_dim)
        # Each coordinate has a mode of its own, or all the same one.
        which = torch.rand(shape if bandit.factorized else (*shape[:2], 1))
        first = which < torch.tensor(Bandit.WEIGHTS)[state].unsqueeze(-1)
        one, other = bandit.centers[:, state].double()
        center, scale = torch.where(first, one, other), bandit.scales[state]
        low, high = (torch.special.ndtr((end - center) / scale) for end in (-1, 1))
        level = low + (high - low) * torch.rand(shape, dtype=torch.float64)
        return (center + scale * torch.special.ndtri(level)).atanh().float()

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        z = self._draw(obs, 1)[0]
        return z, self.bandit.log_prob(obs, z.tanh())

    def diagnostics(self, obs: Tensor) -> dict[str, float]:
        return {"width": float(len(obs))}


def rows_of_the_best(name: str, draws: int) -> list[dict[str, Any]]:
    options, bandit = Options(draws=draws), BANDITS[name]
    agent: Any = SimpleNamespace(policy=Best(bandit), config=options.config)
    return evaluate(options, bandit, agent)


@pytest.mark.parametrize(("name", "cells", "error"), [("1d", 400, 0.06), ("2d", 200**2, 0.2)])
def test_evaluation_of_the_best_policy(
    name: str,
    cells: int,
    error: float,
    standard_errors: Callable[[int], float],
    chi_square_bound: Callable[[float], float],
) -> None:
    draws = 200_000
    rows = rows_of_the_best(name, draws)
    assert [row["state"] for row in rows] == [0, 1, 2, 3]
    for row, weight in zip(rows, Bandit.WEIGHTS, strict=True):
        # 2 N of the uncorrected divergence is chi-square with less than a degree for each cell.
        assert abs(row["kl"]) < chi_square_bound(cells) / (2 * draws)
        assert row["weight_exact"] == weight
        slack = standard_errors(4) * (weight * (1 - weight) / draws) ** 0.5
        assert abs(row["weight"] - weight) < slack
        # The histogram's error: with K cells in use, about 250 and 4000, (K / N)^(1/2) at most is
        # noise, 0.036 and 0.14; the slope within a cell adds to it.
        assert row["log_prob_error"] < error
        assert abs(row["log_prob_bias"]) < error / 2
        assert row["width"] == 256


def test_evaluation_of_the_best_factorized_policy(
    standard_errors: Callable[[int], float], chi_square_bound: Callable[[float], float]
) -> None:
    draws = 100_000
    for row, weight in zip(rows_of_the_best("6d", draws), Bandit.WEIGHTS, strict=True):
        assert abs(row["kl"]) < chi_square_bound(6 * 400) / (2 * draws) / 6
        # The rarest of the 64 modes varies most.
        rarest = min(weight, 1 - weight) ** 6
        slack = standard_errors(4 * 64) / (draws * rarest) ** 0.5
        assert 1 - slack < row["smallest_mode"] < 1 < row["largest_mode"] < 1 + slack
        assert "log_prob_error" not in row


def test_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The temperature falls geometrically to its own over the first part of the time, step sizes
    along a cosine to zero, those of the estimates to a tenth, over the last one."""
    seen: list[tuple[float, ...]] = []

    def note(self: Agent, obs: Tensor, proposal: Any) -> None:
        policy = self.policy
        assert isinstance(policy, ImplicitPolicy)
        rates = (one.param_groups[0]["lr"] for one in (self.actor_optimizer, policy.optimizer))
        estimator: Any = policy.estimator
        seen.append((self.alpha, *rates, estimator.learning_rate))

    monkeypatch.setattr(Agent, "update_actor", note)
    config = dataclasses.replace(Options().config, hidden_dims=(8,), batch_size=8)
    options = Options(updates=20, seconds=1e9, alpha_start=3.0, config=config)
    options = dataclasses.replace(options, alpha_share=0.6, decay_start=0.25)
    agent = train(options, BANDITS["1d"], "sac-ardae", 0)
    assert agent.updates == len(seen) == 20
    for index, found in enumerate(seen):
        progress = index / 20
        alpha = 0.2 * 3.0 ** max(0.0, 1 - progress / 0.6)
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0.0, (progress - 0.25) / 0.75))
        estimates = max(decay, 0.1)
        expected = alpha, 1e-3 * decay, 2e-3 * estimates, 4e-3 * estimates
        assert found == pytest.approx(expected, rel=1e-6)
