# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Settings of the whole process: for programs, in ``main``."""

from __future__ import annotations

import functools
import sys

import torch
from tqdm import tqdm

from inference.shared.errors import UserError

__all__ = ["keep_freed_memory", "mujoco_warns_once", "use_threads"]


def use_threads(count: int) -> None:
    """Sets torch's number of CPU threads, a global of the process: for programs.

    :raises UserError: if it is not positive.
    """
    if count < 1:
        raise UserError(f"--threads: expected a positive number, found {count}")
    torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Lets this process keep the memory that tensors free: for programs, in ``main``.

    The GNU allocator returns freed blocks to the system, and takes as long as the arithmetic on
    half a megabyte to get them back, unless a larger block has been freed before: up to 32 MB, it
    then keeps what is smaller. A tenth of the time of an update of soft actor-critic.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def mujoco_warns_once() -> None:
    """Has MuJoCo, if it is installed, say each of its warnings once: for programs, in ``main``.

    It would say them whenever an environment is made, and append them to a file in the current
    folder.
    """
    try:
        import mujoco
    except ImportError:
        return
    mujoco.set_mju_user_warning(_say_once)


@functools.cache
def _say_once(text: str) -> None:
    # Not by warnings.warn: one that is turned into an error would end the process.
    tqdm.write(f"MuJoCo: {text.strip()}", file=sys.stderr)
