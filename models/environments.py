# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Tasks with a known answer: four equal goals, and a bandit whose Q is known.

Importing this module registers ``pyro_ardae/MultiGoal-v0`` with gymnasium.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

__all__ = ["BANDITS", "Bandit", "MultiGoal"]

Array = np.ndarray[Any, np.dtype[np.float64]]


class MultiGoal(gymnasium.Env[Array, Array]):
    r"""A point in the plane that is to go to one of four equal goals (Haarnoja et al. 2017,
    `arXiv 1702.08165 <https://arxiv.org/abs/1702.08165>`_, section 5.1).

    The point starts at the origin and moves by the action, at most 1 per coordinate. With its
    position x after the step and the goals :math:`g_i` at distance 5, the reward is

    .. math:: c\, [ -\min_i \lVert x - g_i \rVert^2 - 30 \lVert a \rVert^2
        + 10\, \text{at a goal} ],

    c being ``reward_scale``. The episode terminates within 1 of a goal, and is cut off after 30
    steps.

    :param float reward_scale: c, > 0. The temperature of a policy is relative to it.
    :param float action_cost: weight of the squared action, >= 0.
    :param float start_scale: standard deviation of the start, >= 0. With 0, a policy cannot choose
        the goal by where it starts.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    GOALS = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
    LIMIT = 7.0
    RADIUS = 1.0

    def __init__(
        self, *, reward_scale: float = 0.1, action_cost: float = 30.0, start_scale: float = 0.0
    ) -> None:
        self.reward_scale, self.action_cost = reward_scale, action_cost
        self.start_scale = start_scale
        self.observation_space = Box(-self.LIMIT, self.LIMIT, (2,), np.float64)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self._position = np.zeros(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._position = self.start_scale * self.np_random.standard_normal(2)
        return self._position.copy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self._position = np.clip(self._position + action, -self.LIMIT, self.LIMIT)
        distance = float(np.square(self._position - self.GOALS).sum(-1).min())
        arrived = distance < self.RADIUS**2
        cost = distance + self.action_cost * float(np.square(action).sum())
        reward = self.reward_scale * (10.0 * arrived - cost)
        return self._position.copy(), reward, arrived, False, {"goal": self.goal(self._position)}

    @classmethod
    def goal(cls, position: Array) -> int:
        """Index of the goal nearest to a position ``[2]``."""
        return int(np.square(position - cls.GOALS).sum(-1).argmin())

    @classmethod
    def reached(cls, position: Array) -> int | None:
        """Index of the goal within whose radius a position ``[2]`` lies; ``None`` for none."""
        goal = cls.goal(position)
        near = np.square(position - cls.GOALS[goal]).sum() < cls.RADIUS**2
        return goal if near else None


class Bandit:
    r"""Action values of a bandit with four states, whose best soft policy is known.

    :math:`Q(s, a) = \alpha \log p(a \mid s)` on :math:`(-1, 1)^D`, with p a product over
    coordinates or a mixture of two Gaussians, cut off at the box and normalized. The policy
    that maximizes :math:`E[Q] + \alpha H` is p itself.

    :param int action_dim: D, >= 1.
    :param bool factorized: a product of D bimodal densities (``2 ** D`` modes), not two modes.
    :param float alpha: temperature, > 0.
    """

    NUM_STATES = 4
    WEIGHTS = (0.5, 0.5, 0.5, 0.3)
    """Weight of the first mode, by state."""
    OFFSETS = (0.5, 0.35, 0.6, 0.5)
    """Distance of the modes from zero, by state."""
    SCALES = (0.12, 0.1, 0.15, 0.12)
    """Standard deviation of the modes, by state."""

    def __init__(self, action_dim: int, *, factorized: bool = False, alpha: float = 0.2) -> None:
        self.action_dim, self.factorized, self.alpha = action_dim, factorized, alpha
        # Modes at ± direction * offset. Directions differ between states.
        angle = torch.arange(self.NUM_STATES) * 0.7 + 0.3
        direction = torch.zeros(self.NUM_STATES, action_dim)
        direction[:, 0] = angle.cos() if action_dim > 1 else 1.0
        if action_dim > 1:
            direction[:, 1] = angle.sin()
        if factorized:
            direction = torch.ones(self.NUM_STATES, action_dim)
        offset = torch.tensor(self.OFFSETS).unsqueeze(-1)
        scale = torch.tensor(self.SCALES).unsqueeze(-1)
        self.centers = torch.stack([-direction * offset, direction * offset])
        self.scales = scale.expand(self.NUM_STATES, action_dim)
        weight = torch.tensor(self.WEIGHTS)
        self.log_weights = torch.stack([weight.log(), (1 - weight).log()])

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log p of ``action [*batch, D]`` in states ``obs [*batch, 4]`` (one-hot), ``[*batch]``."""
        state = obs.argmax(-1)
        center = self.centers.to(action)[:, state]
        scale = self.scales.to(action)[state]
        standard = (action - center) / scale
        inside = torch.special.ndtr((1 - center) / scale) - torch.special.ndtr(
            (-1 - center) / scale
        )
        normal = -0.5 * standard.square() - (scale * math.sqrt(2 * math.pi) * inside).log()
        log_weights = self.log_weights.to(action)[:, state]
        if self.factorized:
            return (normal + log_weights.unsqueeze(-1)).logsumexp(0).sum(-1)
        return (normal.sum(-1) + log_weights).logsumexp(0)

    def __call__(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q as a critic gives it: ``[1, *batch]``."""
        return self.alpha * self.log_prob(obs, action).unsqueeze(0)

    def states(self) -> Tensor:
        """The observations of the four states, ``[4, 4]``."""
        return torch.eye(self.NUM_STATES)


BANDITS = {
    "1d": Bandit(1),
    "2d": Bandit(2),
    "6d": Bandit(6, factorized=True),
}


gymnasium.register("pyro_ardae/MultiGoal-v0", entry_point=MultiGoal, max_episode_steps=30)
