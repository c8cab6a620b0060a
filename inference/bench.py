# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The benchmarks: ``python -m inference.bench {step,vae,sac,learn} [options]``.

``step`` times one SVI step, implicit against explicit guide: see :mod:`inference.benchmarks.step`.
``step --rows PRESET ...`` times training steps of rows of the VAE benchmark instead, model and
score apart, with ``--device cuda`` on a GPU: see :mod:`inference.benchmarks.rows`.

``vae`` trains and compares VAE presets: see :mod:`inference.benchmarks.vae`.

``sac`` times soft actor-critic: see :mod:`inference.benchmarks.sac`. ``learn`` compares what its
agents learn: see :mod:`inference.benchmarks.learn`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from inference.benchmarks.learn import Learn, bench_learn
from inference.benchmarks.rows import bench_rows, describe_rows
from inference.benchmarks.sac import Sac, bench_sac, describe_sac
from inference.benchmarks.step import Memory, Step, bench_step, describe_step, measure_memory
from inference.benchmarks.vae import Vae, bench_vae
from inference.shared.errors import check_device, check_options, check_unread, user_errors
from inference.shared.files import write_text
from inference.shared.process import keep_freed_memory, mujoco_warns_once, use_threads

__all__ = ["main"]


def main() -> None:
    """Runs a benchmark."""
    options = tyro.extras.subcommand_cli_from_dict(
        {
            "step": _step_main,
            "vae": _vae_main,
            "sac": _sac_main,
            "learn": _learn_main,
            "memory": _memory_main,
        },
        prog="python -m inference.bench",
        description="Benchmarks; all but `memory` are made to be run by hand.",
    )
    del options


def _step_main(options: Annotated[Step, tyro.conf.arg(name="")]) -> None:
    """Times one SVI step, implicit against explicit guide."""
    with user_errors():
        check_options(
            options,
            (
                (options.steps > 0, "steps", "a positive number"),
                (options.warmup >= 0, "warmup", "no negative number"),
            ),
        )
        check_device(options.device)
        use_threads(options.threads)
        if options.rows:
            figures = bench_rows(
                options.rows,
                steps=options.steps,
                warmup=options.warmup,
                batch_size=options.batch_size,
                precision=options.precision,
                device=options.device,
                seed=options.seed,
            )
            print(describe_rows(figures))
            _write(options.json, figures)
            return
        check_unread(options, Step(), ("device",), reader="a call without --rows")
        figures = bench_step(options)
        print(describe_step(figures))
        _write(options.json, figures)


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        write_text(path, json.dumps(figures, indent=2) + "\n")


def _sac_main(options: Annotated[Sac, tyro.conf.arg(name="")]) -> None:
    """Times one soft actor-critic update of each agent and of Stable-Baselines3's."""
    with user_errors():
        use_threads(options.threads)
        keep_freed_memory()
        figures = bench_sac(options)
        print(describe_sac(figures))
        _write(options.json, figures)


def _vae_main(options: Annotated[Vae, tyro.conf.arg(name="")]) -> None:
    """Trains VAE presets for the same time each and compares them."""
    with user_errors():
        use_threads(options.threads)
        keep_freed_memory()
        bench_vae(options)


def _learn_main(options: Annotated[Learn, tyro.conf.arg(name="")]) -> None:
    """Trains agents and Stable-Baselines3's on tasks, and compares their returns."""
    with user_errors():
        use_threads(1)
        keep_freed_memory()
        mujoco_warns_once()
        bench_learn(options)


def _memory_main(options: Annotated[Memory, tyro.conf.arg(name="")]) -> None:
    """Takes steps of one variant and prints its peak memory (what `step` runs)."""
    use_threads(options.threads)
    print(json.dumps(measure_memory(options)))


if __name__ == "__main__":
    main()
