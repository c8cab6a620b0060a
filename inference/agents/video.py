# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""An episode as a small animated GIF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.error import DependencyNotInstalled
from PIL import Image

from inference.agents.environments import wrap
from inference.agents.rollout import Act, refuse_endless
from inference.shared.errors import UserError
from inference.shared.files import replacing
from inference.shared.randomness import forked_rng

__all__ = ["check_renders", "record_episode"]


def check_renders(env_id: str) -> None:
    """Refuses an environment that has no pictures, by one of them.

    :raises UserError: if it cannot be rendered.
    """
    with _rendering(env_id) as env, forked_rng(0):
        env.reset(seed=0)
        env.render()


def record_episode(
    env_id: str,
    act: Act,
    path: Path,
    *,
    seed: int,
    device: str = "cpu",
    obs_limit: float | None = None,
) -> Path:
    """Plays an episode and writes it as a small animated GIF, every fourth frame.

    :param Path path: the file, ``*.gif``.
    :param obs_limit: as for :func:`make_envs`.
    :raises UserError: if the environment cannot be rendered.
    """
    with _rendering(env_id, obs_limit) as env, forked_rng(seed):
        obs, _ = env.reset(seed=seed)
        frames, over, steps = [], False, 0
        while not over:
            if steps % 4 == 0:
                frame = Image.fromarray(env.render())  # type: ignore[arg-type]
                frame.thumbnail((240, 240))
                frames.append(frame)
            batch = torch.as_tensor(obs, dtype=torch.float32, device=device).unsqueeze(0)
            obs, _, terminated, truncated, _ = env.step(act(batch)[0].cpu().numpy())
            over, steps = terminated or truncated, steps + 1
            refuse_endless(0 if over else steps, env_id)
    with replacing(path) as partial:
        frames[0].save(partial, save_all=True, append_images=frames[1:], duration=80, loop=0)
    return path


@contextmanager
def _rendering(env_id: str, obs_limit: float | None = None) -> Iterator[gymnasium.Env[Any, Any]]:
    """An environment that renders pictures.

    :raises UserError: for one that has none, or whatever else goes wrong.
    """
    try:
        env = gymnasium.make(env_id)
        env.close()
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            raise UserError(
                f"--record-video: expected an environment that renders pictures, found {env_id}; "
                "leave the option out"
            )
        env = wrap(gymnasium.make(env_id, render_mode="rgb_array"), obs_limit=obs_limit)
        try:
            yield env
        finally:
            env.close()
    except UserError:
        raise
    except Exception as error:  # whatever the renderer's driver raises
        own = "" if isinstance(error, DependencyNotInstalled) else "; set MUJOCO_GL=egl for MuJoCo"
        raise UserError(
            f"--record-video: expected {env_id} to render without a display, found: {error}{own}, "
            "or leave the option out"
        ) from None
