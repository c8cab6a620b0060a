# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Random numbers that leave no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["fork_rng"]


def fork_rng() -> AbstractContextManager[None]:
    """A context after which the random states of torch, on the CPU and on all CUDA devices, are as
    before it.

    A program that has not used CUDA is not made to start it.
    """
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng(range(torch.cuda.device_count()) if used else [])
