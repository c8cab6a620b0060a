# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Seeds by purpose, and the states of the global random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["forked_rng", "load_rng_state", "rng_state", "seed_of"]


def seed_of(run_seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step, unrelated to that of any other."""
    key = [run_seed, *purpose.encode(), step]
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seeds the global generators, and puts them back as they were after."""
    state = rng_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        load_rng_state(state)


def rng_state() -> dict[str, Any]:
    """The states of the global random number generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_rng_state(state: Mapping[str, Any]) -> None:
    """Restores what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        here = state["cuda"][: torch.cuda.device_count()]  # of a machine with more of them
        torch.cuda.set_rng_state_all([one.cpu() for one in here])
