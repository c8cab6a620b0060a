# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Steps environments: transitions to learn from, and whole episodes for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from inference.agents.environments import make_envs
from inference.agents.replay import Batch
from inference.shared.errors import UserError
from inference.shared.randomness import forked_rng

__all__ = ["Act", "Collector", "Episode", "evaluate", "refuse_endless", "return_figures"]

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
            refuse_endless(collector.longest, env_id)
            for episode in collector.take_finished():
                if counts[episode.env]:
                    counts[episode.env] -= 1
                    transitions = _of_episode(steps, episode) if keep else None
                    found.append(episode._replace(transitions=transitions))
        collector.envs.close()
    return found


def refuse_endless(length: int, env_id: str) -> None:
    """Refuses an episode that goes on and on.

    :param int length: its steps so far.
    :param str env_id: environment.
    :raises UserError: if there are :data:`ENDLESS` of them.
    """
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
