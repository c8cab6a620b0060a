# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Environments of gymnasium with flat observations and actions in [-1, 1], stepped together."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled, Error
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import FlattenObservation, TransformAction, TransformObservation

import models.environments  # noqa: F401 (registers them)
from inference.shared.errors import UserError

__all__ = ["make_envs", "wrap"]


def _check(env: gymnasium.Env[Any, Any], env_id: str) -> None:
    if not isinstance(env.observation_space, Box):
        raise UserError(
            f"{env_id}: expected observations in a Box, found {env.observation_space}; wrap the "
            "environment in gymnasium.wrappers.FlattenObservation"
        )
    if not isinstance(env.action_space, Box):
        raise UserError(
            f"{env_id}: expected actions in a Box, found {env.action_space}; soft actor-critic as "
            "provided has continuous actions only"
        )
    if not np.issubdtype(env.action_space.dtype, np.floating):
        raise UserError(
            f"{env_id}: expected real actions, found {env.action_space}; soft actor-critic as "
            "provided has continuous actions only"
        )
    if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
        raise UserError(
            f"{env_id}: expected bounded actions, found {env.action_space}; give the space bounds, "
            "as by gymnasium.wrappers.TransformAction(env, f, Box(low, high)); ClipAction takes "
            "bounds away"
        )


def wrap(
    env: gymnasium.Env[Any, Any], *, obs_limit: float | None = None
) -> gymnasium.Env[Any, Any]:
    """Flat observations and actions in [-1, 1].

    :param obs_limit: magnitude at which observations are cut off, if they are.
    :raises UserError: if its spaces are not bounded boxes of real numbers.
    """
    _check(env, env.spec.id if env.spec else "environment")
    space = env.action_space
    assert isinstance(space, Box)
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    kind = space.dtype.type  # type: ignore[union-attr]

    def scale(action: Any) -> Any:
        # gymnasium's RescaleAction leaves the box by rounding, and divides by its width.
        share = (np.asarray(action, np.float64) + 1) / 2
        scaled = np.clip(low + share * (high - low), low, high)
        return scaled.astype(kind).reshape(space.shape)

    env = FlattenObservation(env)
    if obs_limit is not None:
        seen = env.observation_space
        assert isinstance(seen, Box)
        bound = Box(-obs_limit, obs_limit, seen.shape, np.float32)

        def cut(obs: Any) -> Any:
            return np.clip(np.asarray(obs, np.float32), -obs_limit, obs_limit)

        env = TransformObservation(env, cut, bound)
    return TransformAction(env, scale, Box(-1, 1, low.shape, kind))


def make_envs(
    env_id: str, num_envs: int, *, obs_limit: float | None = None, **options: Any
) -> VectorEnv[Any, Any, Any]:
    """Environments stepped together, with flat observations and actions in [-1, 1].

    A finished one is reset in the same step; its last observation is in ``infos["final_obs"]``.

    :param str env_id: gymnasium's id.
    :param int num_envs: how many.
    :param obs_limit: magnitude at which observations are cut off, if they are.
    :param options: arguments of the environment, as for :func:`gymnasium.make`.
    :raises UserError: if there is no such environment, what it needs is missing, or its spaces are
        not bounded boxes.
    """
    try:
        return gymnasium.make_vec(
            env_id,
            num_envs=num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
            wrappers=(partial(wrap, obs_limit=obs_limit),),
            **options,
        )
    except (DependencyNotInstalled, ImportError) as error:
        module, *_ = env_id.rpartition(":")
        own = bool(module) and f"No module named '{module.split('.')[0]}'" in str(error)
        advice = "put its folder on PYTHONPATH" if own else 'pip install "pyro-ardae[rl]"'
        raise UserError(
            f"{env_id}: expected the packages that it needs, found: {error}; {advice}"
        ) from None
    except Error as error:
        raise UserError(
            f"{env_id}: expected the id of a registered environment, like HalfCheetah-v5, found: "
            f"{error}"
        ) from None
