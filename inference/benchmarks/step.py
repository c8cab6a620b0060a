# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Times one SVI step, implicit against explicit guide: ``python -m inference.bench step``.

It has the shapes of the MNIST preset, by default with batches of 128 where the preset has 256. They
take turns in one process, so that a slow moment of the machine meets all:

- explicit: ``Trace_ELBO`` with the Gaussian guide;
- implicit: ``TraceImplicit_ELBO`` with the implicit guide of the same size, score updates included
  in the share of steps that have one, without draws of the model;
- score: loss and gradient of an optimizer step of the score network alone, and its matrix products
  alone, of the shapes that it has in the implicit variant.

It measures the median of each, their ratio, the rate of a matrix product in fp32 and bf16 between
the steps, and the peak memory of each variant, of a process of its own that takes a few steps: the
largest resident set, by how much it is above that with all imported, and (on Linux) what of it is
the process's own after a step; the rest is code of libraries, mapped from files.

With ``--rows`` it times training steps of rows of the VAE benchmark instead, model and score apart:
see :mod:`inference.benchmarks.rows`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
import tyro

from inference.autoencoders.presets import PRESETS, check
from inference.autoencoders.training import Training
from inference.benchmarks.rows import FixedImages, turn
from inference.shared.clock import clock_of, median_seconds
from pyro_ardae.score.student import Student
from pyro_ardae.score.whitened import WhitenedEstimator

__all__ = ["Memory", "Step", "bench_step", "describe_step", "measure_memory"]

VARIANTS = {"explicit": "sbmnist-mlp-gaussian", "implicit": "sbmnist-mlp-implicit"}

#: A product of the size that the score network of the paper works with.
GEMM_SHAPE = (4096, 256, 256)


@dataclass(frozen=True)
class _Shapes:
    threads: int = 1
    """CPU threads of torch."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "fp32"
    """Precision of the matrix products of model and guide."""
    batch_size: int = 128
    """Data points of a minibatch."""
    seed: int = 0
    """Seed of weights, data and noise."""


@dataclass(frozen=True)
class Step(_Shapes):
    """Times one SVI step, implicit against explicit guide."""

    steps: int = 200
    """Timed turns of each, of as many steps as it takes until the score has been learned."""
    warmup: int = 20
    """Turns of each before the clock runs."""
    memory_steps: int = 20
    """Steps of the processes that measure memory; 0 leaves it out."""
    rows: tuple[str, ...] = ()
    """MNIST presets, each with options of it or none, to time instead of the two variants."""
    device: str = "cpu"
    """Torch device of the rows."""
    json: Path | None = None
    """Write the figures to this file too."""


@dataclass(frozen=True)
class Memory(_Shapes):
    """Takes steps of one variant and prints its peak memory in bytes (what ``step`` runs)."""

    variant: tyro.conf.Positional[Literal["explicit", "implicit"]] = "implicit"
    """Which variant."""
    steps: int = 20
    """Steps."""


def _training(variant: str, options: _Shapes) -> Training:
    """A variant in training, its score estimators built."""
    config = dataclasses.replace(
        PRESETS[VARIANTS[variant]][1],
        precision=options.precision,
        batch_size=options.batch_size,
        fantasy_share=0.0,
    )
    check(config)
    training = Training(config, FixedImages(config.batch_size, config.device), name=variant)
    training.step()
    return training


def _build_score(
    estimator: WhitenedEstimator, contexts: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Loss and gradient of a score network on one part of the draws, and their products alone."""
    config = PRESETS[VARIANTS["implicit"]][1]
    draws = config.num_score_samples // config.score_folds
    contexts, dim = min(contexts, config.num_score_contexts or contexts), estimator.dim
    network, base = estimator.network, Student(math.inf, 1.0)
    w, features = torch.randn(draws, contexts, dim), torch.randn(contexts, network.feature_dim)
    rows, hidden = 2 * draws * contexts, network.hidden_dim
    layers = [(rows, dim + 2, hidden), *[(rows, hidden, hidden)] * (network.depth - 1)]
    layers += [(rows, hidden, 2 * dim), (contexts, network.feature_dim, hidden)]
    layers += [(contexts, hidden, hidden), (contexts, hidden, 2 * network.depth * hidden)]
    pairs = []
    for index, (count, fan_in, fan_out) in enumerate(layers):
        x, weight = torch.randn(count, fan_in), torch.randn(fan_in, fan_out)
        gradient = torch.randn(count, fan_out)
        pairs += [(x, weight), (x.mT, gradient)]
        if index not in (0, network.depth + 1):  # inputs have no gradient
            pairs.append((gradient, weight.mT))

    def products() -> None:
        for left, right in pairs:
            torch.mm(left, right)

    return lambda: estimator._loss(w, features, base), products


def _build_gemm(dtype: torch.dtype) -> Callable[[], Any]:
    rows, inner, columns = GEMM_SHAPE
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    return lambda: left @ right


def bench_step(options: Step) -> dict[str, Any]:
    """Runs the step benchmark; returns its figures."""
    pyro.set_rng_seed(options.seed)
    trainings = {variant: _training(variant, options) for variant in VARIANTS}
    (estimator,) = trainings["implicit"].loss.estimators.values()
    score, products = _build_score(estimator, options.batch_size)
    jobs = {
        **{variant: partial(turn, training) for variant, training in trainings.items()},
        "score": score,
        "products": products,
        "fp32": _build_gemm(torch.float32),
        "bf16": _build_gemm(torch.bfloat16),
    }
    median = median_seconds(
        jobs, turns=options.steps, warmup=options.warmup, clock=clock_of("wall")
    )
    for variant, training in trainings.items():
        median[variant] /= training.config.score_interval
    flop = 2 * GEMM_SHAPE[0] * GEMM_SHAPE[1] * GEMM_SHAPE[2]
    figures: dict[str, Any] = {
        "ms": {variant: 1e3 * median[variant] for variant in VARIANTS},
        "ratio": median["implicit"] / median["explicit"],
        "score_ms": {name: 1e3 * median[name] for name in ("score", "products")},
        "score_gemm_share": median["products"] / median["score"],
        "gemm_gflops": {name: flop / median[name] / 1e9 for name in ("fp32", "bf16")},
        "steps": options.steps,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "precision": options.precision,
        "torch": torch.__version__,
    }
    if options.memory_steps:
        figures["peak_memory_mb"] = {variant: _memory(variant, options) for variant in VARIANTS}
    return figures


def _memory(variant: str, options: Step) -> dict[str, float]:
    command = [sys.executable, "-m", "inference.bench", "memory", variant]
    for name in ("threads", "precision", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--steps", str(options.memory_steps), "--batch-size", str(options.batch_size)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return {name: value / 2**20 for name, value in json.loads(done.stdout).items()}


def measure_memory(options: Memory) -> dict[str, int]:
    """Peak memory of this process in bytes, by steps of one variant."""
    pyro.set_rng_seed(options.seed)
    before = _peak()
    training = _training(options.variant, options)
    own: list[int] = []
    for _ in range(options.steps):
        training.step()
        own += _status("RssAnon")
    figures = {"total": _peak(), "above_imports": _peak() - before}
    return figures | ({"own": max(own)} if own else {})


def _peak() -> int:
    # Not ru_maxrss: on Linux a process inherits that of the one that started it.
    for size in _status("VmHWM"):
        return size
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> list[int]:
    """An entry of this process's status in bytes; none where there is no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")]


def describe_step(figures: dict[str, Any]) -> str:
    """The figures in words."""
    lines = []
    for variant, ms in figures["ms"].items():
        memory = figures.get("peak_memory_mb", {}).get(variant)
        peak = ""
        if memory:
            peak = (
                f", peak memory {memory['total']:.0f} MB ({memory['above_imports']:.0f} MB "
                "above what the imports take"
            )
            peak += f"; {memory['own']:.0f} MB its own)" if "own" in memory else ")"
        lines.append(f"{variant}: {ms:.2f} ms a step{peak}")
    score = figures["score_ms"]
    rates = ", ".join(f"{n} {rate:.0f} GFLOP/s" for n, rate in figures["gemm_gflops"].items())
    lines += [
        f"ratio implicit / explicit: {figures['ratio']:.2f}",
        f"score network: {score['score']:.2f} ms an optimizer step, its matrix products alone "
        f"{score['products']:.2f} ms ({figures['score_gemm_share']:.0%} of their rate)",
        f"matrix product {'x'.join(map(str, GEMM_SHAPE))}: {rates}",
    ]
    return "\n".join(lines)
