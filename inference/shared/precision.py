# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Precision of matrix products, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models.networks import Network

__all__ = ["full_precision", "process_precision", "training_dtype"]


def training_dtype(precision: str, device: str) -> torch.dtype | None:
    """Dtype of matrix products in training: bf16 if ``precision`` is ``"bf16"``, or ``"auto"`` on a
    processor whose cores multiply in it; the parameters' own, ``None``, otherwise.
    """
    auto = precision == "auto" and device == "cpu" and _multiplies_bf16()
    return torch.bfloat16 if auto or precision == "bf16" else None


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions for it, as far as this version of torch can tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def process_precision(device: str, *, tf32: bool) -> None:
    """Sets whether a CUDA device may round the inputs of fp32 matrix products to TF32.

    A global of the process, for programs. Other devices have no such mode, and nothing is touched.
    """
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def full_precision(vae: nn.Module) -> Iterator[None]:
    """Within it, matrix products and convolutions of a model are in fp32."""
    networks = [module for module in vae.modules() if isinstance(module, Network)]
    dtypes = [network.compute_dtype for network in networks]
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for network in networks:
            network.compute_dtype = None
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # on by torch's default, whatever that of products
        yield
    finally:
        for network, dtype in zip(networks, dtypes, strict=True):
            network.compute_dtype = dtype
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
