# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Environments of gymnasium as the agents need them: transitions, and episodes for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled, Error
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import FlattenObservation, TransformAction, TransformObservation
from PIL import Image
from torch import Tensor

import models.environments  # noqa: F401 (registers them)
from inference.agents.replay import Batch
from inference.shared.errors import UserError
from inference.shared.randomness import forked_rng

__all__ = [
    "Collector",
    "Episode",
    "check_renders",
    "evaluate",
    "make_envs",
    "record_episode",
    "return_figures",
    "wrap",
]

#: Actions ``[B, D]`` in (-1, 1) for observations ``[B, obs_dim]``.
Act = Callable[[Tensor], Tensor]

#: Steps after which an episode is taken for endless: an evaluation waits for its end.
ENDLESS = 50_000


class Episode(NamedTuple):
    """What an episode came to."""

    env: int
    """Index of the environment that it was played in."""
    value: float
    """Its return: the undiscounted sum of rewards."""
    length: int
    """Its number of steps."""
    last_obs: Tensor
    """Its last observation, ``[obs_dim]``."""
    transitions: Batch | None = None
    """Its steps, if they were kept."""


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


class Collector:
    """Steps environments and turns the steps into transitions.

    :param VectorEnv envs: what :func:`make_envs` returned.
    :param int seed: seed of the first episodes.
    :param str name: of the environment, for messages.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any], *, seed: int, name: str) -> None:
        self.envs, self.name = envs, name
        self.steps = 0
        self._finished: list[Episode] = []
        self._started = 0
        self.reset(seed)

    @property
    def obs_dim(self) -> int:
        """Width of an observation."""
        return int(self.envs.single_observation_space.shape[0])  # type: ignore[index]

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return int(self.envs.single_action_space.shape[0])  # type: ignore[index]

    def reset(self, seed: int) -> None:
        """Begins new episodes, all of whose randomness follows from the seed."""
        obs, _ = self.envs.reset(seed=seed)
        count = self.envs.num_envs
        self._returns, self._lengths = np.zeros(count), np.zeros(count, dtype=int)
        self._indices = self._started + np.arange(count)
        self._started += count
        self.obs = self._tensor(obs)
        self._refuse(np.zeros(count), obs)

    def step(self, action: Tensor) -> Batch:
        """Takes one step of each environment.

        :param Tensor action: ``[num_envs, D]`` in [-1, 1].
        :returns: one transition for each. Episodes that are cut off do not count as terminated.
        :raises UserError: for an action, a reward or an observation that is not finite. Nothing of
            that step is returned, so nothing is learned from it.
        """
        if not torch.isfinite(action).all():
            raise UserError(
                f"{self.name}: expected finite actions, found NaN or infinity: the policy has "
                "diverged; lower the step sizes, --actor-learning-rate first"
            )
        obs, reward, terminated, truncated, infos = self.envs.step(action.cpu().numpy())
        done = terminated | truncated
        final = np.array(obs)
        if done.any():
            final[done] = np.stack([np.ravel(infos["final_obs"][i]) for i in np.flatnonzero(done)])
        self._lengths += 1
        self._refuse(reward, final)
        self._refuse(reward, np.array(obs))  # a new episode may begin with one that is not finite
        self._returns += reward
        batch = Batch(
            self.obs,
            action,
            self._tensor(reward),
            self._tensor(final),
            self._tensor(terminated),
        )
        self.obs = self._tensor(obs)
        self.steps += self.envs.num_envs
        for i in np.flatnonzero(done):
            episode = Episode(
                int(i), float(self._returns[i]), int(self._lengths[i]), batch.next_obs[i]
            )
            self._finished.append(episode)
            self._returns[i] = self._lengths[i] = 0
            self._indices[i], self._started = self._started, self._started + 1
        return batch

    @property
    def longest(self) -> int:
        """Steps so far of the longest running episode."""
        return int(self._lengths.max())

    def take_finished(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def state_dict(self) -> dict[str, int]:
        """The counters; with :meth:`reset`, all there is to resume from."""
        return {"steps": self.steps, "started": self._started}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the counters; :meth:`reset` has to follow."""
        self.steps, self._started = state["steps"], state["started"]

    def _refuse(self, reward: Any, obs: Any) -> None:
        with np.errstate(over="ignore"):  # in the precision of the buffer
            reward, obs = np.asarray(reward, np.float32), np.asarray(obs, np.float32)
        for what, bad in (
            ("reward", ~np.isfinite(reward)),
            ("observation", ~np.isfinite(obs).all(-1)),
        ):
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise UserError(
                    f"{self.name}: expected finite numbers, found NaN or infinity in the {what} of "
                    f"episode {self._indices[i]}, step {self._lengths[i]}; nothing was learned "
                    "from it, checkpoints are as they were"
                )

    @staticmethod
    def _tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array, dtype=np.float32))


def evaluate(
    env_id: str,
    act: Act,
    *,
    episodes: int,
    seed: int,
    device: str = "cpu",
    obs_limit: float | None = None,
    keep: bool = False,
) -> list[Episode]:
    """Plays whole episodes, up to 10 side by side, with randomness of their own.

    The global random states are left as they were.

    :param str env_id: environment.
    :param Act act: the policy.
    :param int episodes: number of episodes, >= 1.
    :param int seed: seed of environments and policy.
    :param obs_limit: as for :func:`make_envs`.
    :param keep: whether to keep the transitions.
    :returns: as many of each environment; those that finish first would be the short ones.
    :raises UserError: if an episode does not end.
    """
    side_by_side = max(n for n in range(1, 11) if episodes % n == 0)
    counts = [episodes // side_by_side] * side_by_side
    found: list[Episode] = []
    steps: list[Batch] = []
    with forked_rng(seed):
        envs = make_envs(env_id, side_by_side, obs_limit=obs_limit)
        collector = Collector(envs, seed=seed, name=env_id)
        while any(counts):
            step = collector.step(act(collector.obs.to(device)).cpu())
            steps += [step] if keep else []
            _refuse_endless(collector.longest, env_id)
            for episode in collector.take_finished():
                if counts[episode.env]:
                    counts[episode.env] -= 1
                    transitions = _of_episode(steps, episode) if keep else None
                    found.append(episode._replace(transitions=transitions))
        collector.envs.close()
    return found


def _refuse_endless(length: int, env_id: str) -> None:
    if length >= ENDLESS:
        raise UserError(
            f"{env_id}: expected episodes that end, found one of {length} steps; register the "
            "environment with max_episode_steps"
        )


def _of_episode(steps: Sequence[Batch], episode: Episode) -> Batch:
    """The transitions of an episode that has just ended."""
    columns = zip(*steps[-episode.length :], strict=True)
    return Batch(*(torch.stack([value[episode.env] for value in column]) for column in columns))


def return_figures(noisy: Sequence[Episode], still: Sequence[Episode]) -> dict[str, float]:
    """Mean and standard deviation of the returns, with noise and without, as metrics.csv has them.

    :param Sequence[Episode] noisy: episodes of the policy.
    :param Sequence[Episode] still: episodes of the policy without its noise.
    """
    row: dict[str, float] = {}
    for name, episodes in (("eval_return", noisy), ("eval_return_no_noise", still)):
        values = torch.tensor([episode.value for episode in episodes], dtype=torch.float64)
        row |= {name: float(values.mean()), f"{name}_std": float(values.std(correction=0))}
    return row


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
            _refuse_endless(0 if over else steps, env_id)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=80, loop=0)
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
