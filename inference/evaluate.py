# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluates a run of ``inference.vae`` again: ``python -m inference.evaluate RUN``.

With the seed and the numbers of samples of the run it gives the recorded figures exactly (same
machine, same number of threads); other numbers of samples can be asked for.

With ``--ais`` it estimates log p(x) tightly instead, by annealed importance sampling, and the
posterior gap, log p(x) less the guide's ELBO, on a random subset of the test images; it writes both
to ``results.json`` of the run and the figures of each image to ``ais.npz``. ``--against OTHER``
gives the difference to another run that was evaluated so, with its standard error over images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from inference.autoencoders.evaluation import (
    describe,
    describe_tight,
    evaluate_tight,
    final_evaluation,
    restore,
)
from inference.autoencoders.presets import build_data, check_range
from inference.autoencoders.tight import Tight, check_tight, load, paired
from inference.shared.errors import check_unread, user_errors
from inference.shared.process import use_threads

__all__ = ["Evaluation", "main"]


@dataclass(frozen=True)
class Evaluation:
    """Options of ``python -m inference.evaluate``."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    test_points: int | None = None
    """Data points, a seeded random subset; as in the run by default."""
    test_samples: int | None = None
    """Importance samples per data point; as in the run by default."""
    guide_samples: int | None = None
    """Guide samples that the proposal is fitted to; as in the run by default."""
    seed: int | None = None
    """Seed of the subset and the samples; that of the run by default."""
    data_dir: Path | None = None
    """Folder of binarized_mnist.npz; as in the run by default."""
    threads: int | None = None
    """CPU threads of torch; as in the run by default."""
    device: str | None = None
    """Torch device; that of the run by default."""
    ais: bool = False
    """Estimate log p(x) by annealed importance sampling, and the posterior gap."""
    tight: Annotated[Tight, tyro.conf.arg(name="")] = field(default_factory=Tight)
    """Options of --ais."""
    against: Path | None = None
    """Run folder to compare with, evaluated with --ais too."""


def _check_unread(options: Evaluation) -> None:
    if options.ais:
        unread = ("seed", "test_points", "test_samples", "guide_samples")
        check_unread(options, Evaluation(options.run), unread, reader="--ais")
    else:
        names = [field.name for field in dataclasses.fields(Tight)]
        check_unread(options.tight, Tight(), names, reader="an evaluation without --ais")


def main() -> None:
    """Evaluates a run again."""
    options = tyro.cli(Evaluation, prog="python -m inference.evaluate", description=__doc__)
    with user_errors():
        _check_unread(options)
        own = {"run", "ais", "tight", "against"}
        given = {
            key: value
            for key, value in dataclasses.asdict(options).items()
            if key not in own and value is not None
        }
        config, vae = restore(options.run, **given)
        check_range(config)
        if options.ais:
            check_tight(options.tight, config)
        if config.threads is not None:
            use_threads(config.threads)
        if options.ais:
            figures = evaluate_tight(options.run, config, vae, options.tight)
            print(describe_tight(config, options.tight, figures))
        else:
            print(describe(config, final_evaluation(config, vae, build_data(config))))
        if options.against is not None:
            one, other = load(options.run), load(options.against)
            mean, error = paired(one, other)
            print(f"log p(x) {mean:+.3f} ± {error:.3f} nats against {options.against}")


if __name__ == "__main__":
    main()
