# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Builds the policy and the critics that options ask for."""

from __future__ import annotations

from typing import TypedDict

import torch

from inference.agents.options import Config
from inference.agents.policy import ExplicitPolicy, ImplicitPolicy, Policy
from inference.shared.errors import UserError, needs
from models.actors import FlowActor, GaussianActor
from models.critics import TwinCritic
from models.implicit_actor import ImplicitActor
from pyro_ardae import ARDAE

__all__ = ["build_critic", "build_policy"]


class _Hidden(TypedDict):
    hidden_dims: tuple[int, ...]
    compute_dtype: torch.dtype | None


def build_policy(config: Config, obs_dim: int, action_dim: int) -> Policy:
    """Builds actor and, for the implicit one, score estimator, on the configured device.

    :raises UserError: if the flow's package is missing.
    """
    hidden: _Hidden = {"hidden_dims": config.hidden_dims, "compute_dtype": config.compute_dtype}
    if config.agent == "sac":
        return ExplicitPolicy(GaussianActor(obs_dim, action_dim, **hidden)).to(config.device)
    if config.agent == "sac-nf":
        with needs("sac-nf", "zuko", "flows"):
            return ExplicitPolicy(FlowActor(obs_dim, action_dim, **hidden)).to(config.device)
    if config.noise_dim is not None and config.noise_dim < action_dim:
        raise UserError(
            f"--noise-dim: expected the action's width at least, {action_dim}, found "
            f"{config.noise_dim}"
        )
    actor = ImplicitActor(
        obs_dim,
        action_dim,
        noise_dim=max(10, action_dim) if config.noise_dim is None else config.noise_dim,
        noise_hidden_dims=config.noise_hidden_dims,
        noise_scale=config.noise_scale,
        spread=config.spread,
        part_scale=config.part_scale,
        part_bits=config.part_bits,
        min_scale=config.min_scale,
        **hidden,
    )
    estimator = ARDAE(
        action_dim,
        obs_dim + actor.num_bits,  # the state and the part
        parametrization="energy",
        whitening="none",  # the actor's location and scale have done it
        hidden_dim=config.score_hidden_dim,
        depth=config.score_depth,
        delta=config.score_delta,
        num_folds=config.score_steps,
        learning_rate=config.score_learning_rate,
        ratio_weight=config.score_ratio_weight,
        num_normalizer_samples=config.score_normalizer_draws,
        quasi_random=True,
    )
    policy = ImplicitPolicy(
        actor,
        estimator,
        num_draws=config.score_draws,
        bound=config.bound,
        even_share=config.even_share,
    )
    return policy.to(config.device)


def build_critic(config: Config, obs_dim: int, action_dim: int) -> TwinCritic:
    """Builds the critics, on the configured device."""
    critic = TwinCritic(
        obs_dim, action_dim, hidden_dims=config.hidden_dims, compute_dtype=config.compute_dtype
    )
    return critic.to(config.device)
