# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The demonstration: ``python -m inference.demo``, which is what ``make demo`` runs.

Trains a VAE on the 25 Gaussians twice: with an implicit guide, then with a Gaussian one for as long
as that took. The posteriors of this model are cells with sharp edges, which a Gaussian guide can
only fill in part.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pyro
import tyro

from inference.autoencoders.data import ToyData
from inference.autoencoders.evaluation import restore
from inference.autoencoders.plots import toy_comparison
from inference.autoencoders.presets import PRESETS
from inference.shared import plots
from inference.shared.errors import user_errors
from inference.shared.process import use_threads
from inference.vae import run
from models.toy import EXPECTED_LOG_PROB

__all__ = ["Demo", "main"]

GUIDES = {"implicit": "25gaussians-implicit", "gaussian": "25gaussians-gaussian"}

#: More steps than any time allows.
UNLIMITED = 1_000_000_000


@dataclass(frozen=True)
class Demo:
    """25 Gaussians: implicit against Gaussian guide in the same time."""

    steps: int = PRESETS[GUIDES["implicit"]][1].steps
    """Training steps of the implicit guide. The Gaussian guide, whose step is shorter, takes as
    many as fit in the same wall-clock time."""
    seed: int = 0
    """Seed of everything."""
    test_points: int = 2000
    """Data points of the final evaluation."""
    test_samples: int = 1000
    """Importance samples per data point of the final evaluation."""
    threads: int = 1
    """CPU threads of torch; networks of this size gain nothing by more."""
    out: Path = Path("runs/demo")
    """Folder of the two runs and the figure; runs are numbered if it exists."""


def _free(path: Path) -> Path:
    """The first of ``path``, ``path-2``, ``path-3``, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def demonstrate(options: Demo) -> Path:
    """Trains both guides, prints the table; returns the figure that compares them."""
    out = _free(options.out)
    rows, vaes = [], []
    steps = options.steps
    seconds: float | None = None  # the first guide sets the time
    for guide, preset in GUIDES.items():
        extent = f"{steps} steps" if seconds is None else f"{seconds:.0f} s"
        print(f"\n{preset}: {extent} of training")
        config = dataclasses.replace(
            PRESETS[preset][1],
            steps=steps,
            budget_seconds=seconds,
            seed=options.seed,
            test_points=options.test_points,
            test_samples=options.test_samples,
            checkpoint_every=steps,
            threads=options.threads,
            out=out / guide,
        )
        pyro.clear_param_store()
        folder = run(config)
        result = json.loads((folder / "results.json").read_text())
        steps, seconds = UNLIMITED, result["seconds"]
        rows.append((guide, result))
        vaes.append((guide, restore(folder)[1]))
    x = ToyData(1, options.seed).subset("test", 4000, options.seed)
    figure = plots.save(toy_comparison(vaes, x), out / "comparison.png")

    samples = f"{rows[0][1]['test_points']} points, {rows[0][1]['test_samples']} samples each"
    print(f"\n25 Gaussians, test log p(x) in nats by importance sampling ({samples})")
    print(f"{'guide':10} {'steps':>7} {'seconds':>8} {'log p(x) ± s.e.':>17} {'modes':>9}")
    for guide, result in rows:
        value = f"{result['log_px']:.3f} ± {result['log_px_se']:.3f}"
        print(
            f"{guide:10} {result['steps']:7d} {result['seconds']:8.1f} {value:>17} "
            f"{result['modes']:3d} of 25"
        )
    print(
        f"{'the limit':10} {'':7} {'':8} {EXPECTED_LOG_PROB:>9.3f}  "
        "(-3.754 if the components did not overlap)"
    )
    print("\nfigures:")
    for path in (figure, *(out / guide / "figures" / "model.png" for guide in GUIDES)):
        print(f"  {path}")
    return figure


def main() -> None:
    """Runs the demonstration."""
    options = tyro.cli(Demo, prog="python -m inference.demo", description=__doc__)
    with user_errors():
        use_threads(options.threads)
        demonstrate(options)


if __name__ == "__main__":
    main()
