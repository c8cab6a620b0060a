# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Settings of the whole process: for programs, in ``main``."""

from __future__ import annotations

import torch

from inference.shared.errors import UserError

__all__ = ["keep_freed_memory", "use_threads"]


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
