# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The implicit policy: what it learns of its own density, step by step and in the end, and what
it says of that."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from inference.sac_policy import ImplicitPolicy
from models.actors import Encoded, log_tanh_slope
from pyro_ardae.score import ARDAE
from tests.inference.test_sac import LinearActor

#: Location of the parts of `Skewed`, ± that, and their scale, before the state's.
KAPPA, SCALE = 0.6, 0.8
#: Probabilities of its parts.
WEIGHTS = (0.8, 0.2)


class Skewed(LinearActor):
    """z = loc(s) + exp(log_scale(s)) (± KAPPA + SCALE y), y of the first part being a mixture of
    two normals with mean 0 and variance 1, y of the second its mirror image."""

    part_scale = KAPPA
    first, modes, std = 0.3, (-1.366, 0.586), 0.4472

    def encode(self, obs: Tensor) -> Encoded:
        log_weights = torch.tensor(WEIGHTS).log().expand(len(obs), -1)
        return super().encode(obs)._replace(log_weights=log_weights)

    def choose(self, encoded: Encoded, num_draws: int = 1) -> Tensor:
        return (torch.rand(num_draws, len(encoded.loc)) > WEIGHTS[0]).long()

    def place(self, encoded: Encoded, part: Tensor) -> tuple[Tensor, Tensor]:
        loc = KAPPA * self.codes[part]
        return loc, torch.full_like(loc, math.log(SCALE))

    def noise(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        return torch.randn(num_draws, len(obs), 2)

    def deviate(self, encoded: Encoded, part: Tensor, noise: Tensor) -> Tensor:
        which, normal = noise.split(1, -1)
        low, high = self.modes
        center = torch.where(torch.special.ndtr(which) < self.first, low, high)
        return self.codes[part] * (center + self.std * normal)

    def log_density(self, u: Tensor) -> Tensor:
        """Of u, the z in units of the state's location and scale."""
        each = []
        for code, weight in zip((1, -1), WEIGHTS, strict=True):
            y = code * (u - KAPPA * code) / SCALE
            for share, mode in zip((self.first, 1 - self.first), self.modes, strict=True):
                density = Normal(mode, self.std).log_prob(y) - math.log(SCALE)
                each.append(density + math.log(weight * share))
        return torch.stack(each).logsumexp(0)


def test_log_pi_is_learned() -> None:
    """Of a law far from normal that stands still, from a third of a nat to less than a tenth."""
    actor: Any = Skewed(1, 1)
    estimator = ARDAE(
        *(1, 2),  # what it tells of y; by state and part
        parametrization="energy",
        whitening="none",
        hidden_dim=32,
        depth=2,
        num_folds=1,
        ratio_weight=30.0,
        num_normalizer_samples=0,
    )
    policy = ImplicitPolicy(actor, estimator, num_draws=1, learning_rate=5e-3)

    def error() -> float:
        obs = torch.randn(4000, 1)
        z, log_pi = policy.sample(obs)
        encoded = actor.encode(obs)
        log_q = actor.log_density((z - encoded.loc) / encoded.log_scale.exp()) - encoded.log_scale
        return float((log_pi - log_q.squeeze(-1) + log_tanh_slope(z)).detach().abs().mean())

    first = error()
    for _ in range(300):
        policy.fit(torch.randn(128, 1))
    print("ERR", first, error())
