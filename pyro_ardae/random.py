# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Random numbers that leave no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["fork_rng"]


def fork_rng() -> AbstractContextManager[None]:
    """A context after which the random states of torch, on the CPU and on the current CUDA device,
    are as before it.

    :func:`torch.random.fork_rng` takes all devices, and warns where there are several.
    """
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng([torch.cuda.current_device()] if used else [])
