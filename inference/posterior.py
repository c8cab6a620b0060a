# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Compares automatic guides with the posterior itself: ``python -m inference.posterior [options]``.

Examples::

    python -m inference.posterior                        # 8 posteriors, 5 guides, 3 seeds: an hour
    python -m inference.posterior --posteriors banana bimodal --guides multivariate implicit
    python -m inference.posterior --seconds 10 --clock cpu --seeds 0

Every guide trains on every posterior for the same time, once for each seed: that of its training
steps. Then draws of it are compared with draws of the posterior
(:mod:`inference.posteriors.reference`: NUTS, or exact ones), in constrained space, in units of the
posterior's standard deviations (:mod:`inference.posteriors.distances`).

The run folder (``--out``) holds ``results.csv``, ``moments.csv``, ``table.md``, ``figures/`` with
pair plots, ``draws/`` and, shared by runs, ``references/``. Rows that it holds are not made again:
after an interruption the same command goes on, and posteriors, guides and seeds can be added.
Columns of results.csv:

- ``posterior``, ``guide``, ``seed``: the run. The guide ``floor`` is one half of the reference
  draws, compared with the other. These are half as many draws as a guide is compared by, so that
  where all is noise a perfect guide has a distance smaller by the root of 2;
- ``sliced_wasserstein``: the sliced 2-Wasserstein distance;
- ``ks``, ``ks_worst``: the Kolmogorov-Smirnov distance, mean and largest over the coordinates;
- ``c2st``: accuracy of a classifier that tells the draws apart, 0.5 to 1;
- ``mean_error``, ``std_error``: root mean square over the coordinates of the errors of mean and
  standard deviation, in posterior standard deviations; ``mean_error_worst``, ``std_error_worst``
  the largest absolute ones;
- ``modes``: modes with at least half of the draws that belong there, empty for posteriors with one;
- ``steps``, ``seconds``: of the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pyro
import tyro
from torch import Tensor
from tqdm import tqdm

from inference.posteriors import distances
from inference.posteriors import plots as posterior_plots
from inference.posteriors.reference import R_HAT_LIMIT, Reference, reference
from inference.posteriors.table import COLUMNS, FLOOR, MOMENTS, Key, read, table
from inference.posteriors.training import Config, Training
from inference.shared.clock import clock_of
from inference.shared.errors import (
    UserError,
    check_options,
    failed,
    needs,
    positive,
    some_seeds,
    user_errors,
)
from inference.shared.files import write_arrays, write_text
from inference.shared.plots import save
from inference.shared.process import use_threads
from inference.shared.progress import advance
from inference.shared.rows import Row, write_rows
from inference.shared.run import RunFolder
from models.posterior_guides import GUIDES
from models.posteriors import POSTERIORS, Posterior

__all__ = ["compare", "evaluate", "main"]


#: Options that may change when a run folder is gone on with.
MAY_DIFFER = ("posteriors", "guides", "seeds", "figures", "references", "out")


def evaluate(draws: Tensor, against: Tensor, posterior: Posterior) -> Row:
    """The distances of draws ``[n, dim]`` from those of the posterior."""
    x, y = (distances.standardize(z, against) for z in (draws, against))
    ks = distances.kolmogorov_smirnov(x, y)
    mean, std = distances.moment_errors(draws, against)
    row: Row = {
        "sliced_wasserstein": distances.sliced_wasserstein(x, y),
        "ks": float(ks.mean()),
        "ks_worst": float(ks.max()),
        "c2st": distances.c2st(x, y),
        "mean_error": float(mean.square().mean().sqrt()),
        "mean_error_worst": float(mean.abs().max()),
        "std_error": float(std.square().mean().sqrt()),
        "std_error_worst": float(std.abs().max()),
        "modes": math.nan,
    }
    if posterior.modes is not None:
        row["modes"] = distances.modes_found(posterior.modes(draws), posterior.modes(against))
    return row


def moments(draws: Tensor, found: Reference, posterior: Posterior) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation, of the draws and of the reference, by shown coordinate."""
    against = found.draws.flatten(0, 1)
    result = {}
    for name in posterior.shown:
        at = found.labels.index(name)
        columns = (draws[:, at], against[:, at])
        result[name] = tuple(float(f) for z in columns for f in (z.mean(), z.std()))
    return result


def compare(config: Config) -> Path:
    """Makes the rows that the folder lacks, then table and figures; returns the folder."""
    _check(config)
    path, options = config.out, dataclasses.asdict(config)
    RunFolder.open_or_create(path, options, (), may_differ=MAY_DIFFER)
    rows = read(path / "results.csv", COLUMNS) if (path / "results.csv").exists() else {}
    known = read(path / "moments.csv", MOMENTS) if (path / "moments.csv").exists() else {}
    wanted: list[Key] = [
        (posterior, guide, seed)
        for seed in config.seeds
        for posterior in config.posteriors
        for guide in config.guides
    ]
    missing = [key for key in wanted if key not in rows]
    if len(missing) < len(wanted):
        print(f"{path}: {len(wanted) - len(missing)} of {len(wanted)} runs are there already")
    clock = clock_of(config.clock)
    references: dict[str, Reference] = {}
    for name in config.posteriors:
        print(f"reference of {name}: ", end="", flush=True)
        references[name] = found = _reference(name, config)
        print(found if found.r_hat < R_HAT_LIMIT else f"{found}: r-hat is NOT below {R_HAT_LIMIT}")
        first, second = found.draws.chunk(2)
        rows[(name, FLOOR, 0)] = {
            **evaluate(first.flatten(0, 1), second.flatten(0, 1), _posterior(name)),
            "steps": 0,
            "seconds": 0.0,
        }
    (path / "draws").mkdir(exist_ok=True)
    with tqdm(total=config.seconds * len(missing), unit="s", mininterval=1.0) as progress:
        for index, key in enumerate(missing, 1):
            name, guide, seed = key
            label = f"{name}, {guide}, seed {seed}"
            progress.set_description(label)
            posterior, found = _posterior(name), references[name]
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            with _user_errors(label):
                training = Training(posterior, guide, config)
                for spent in training.train(clock):
                    advance(progress, progress.n + spent)
                draws = training.draws(config.draws)
            row = evaluate(draws, found.draws.flatten(0, 1), posterior)
            row |= {"steps": training.steps_done, "seconds": round(training.seconds, 3)}
            file = path / "draws" / f"{name}-{guide}-{seed}.npz"
            write_arrays(file, draws=draws.float().numpy())
            for at, figures in moments(draws, found, posterior).items():
                known[(name, guide, seed, at)] = dict(zip(MOMENTS[4:], figures, strict=True))
            rows[key] = row
            write_rows(path / "moments.csv", known, MOMENTS)
            write_rows(path / "results.csv", rows, COLUMNS)
            advance(progress, index * config.seconds)
            progress.write(
                f"{label}: sliced Wasserstein {row['sliced_wasserstein']:.3f}, c2st "
                f"{row['c2st']:.3f} after {training.steps_done} steps"
            )
    write_rows(path / "results.csv", rows, COLUMNS)
    text = table(rows, known, config.seconds, config.clock)
    write_text(path / "table.md", text)
    print(f"\n{text}")
    if config.figures:
        for name in config.posteriors:
            figure = posterior_plots.pairs(name, references[name], _posterior(name), path / "draws")
            print(f"figure: {save(figure, path / 'figures' / f'{name}.png')}")
    return path


def _posterior(name: str) -> Posterior:
    with needs(f"--posteriors {name}", "scikit-learn", "programs"):
        return POSTERIORS[name]()


def _reference(name: str, config: Config) -> Reference:
    return reference(
        _posterior(name),
        config.references or config.out / "references",
        num_draws=config.reference_draws,
        warm_up=config.reference_warm_up,
    )


@contextlib.contextmanager
def _user_errors(label: str) -> Iterator[None]:
    try:
        with needs(label, "zuko", "flows"):
            yield
    except ValueError as error:
        raise failed(label, error, "Try a lower --learning-rate") from error


def _check(config: Config) -> None:
    for option, names, known in (
        ("posteriors", config.posteriors, POSTERIORS),
        ("guides", config.guides, GUIDES),
    ):
        unknown = ", ".join(name for name in names if name not in known)
        if unknown or not names:
            raise UserError(
                f"--{option}: expected some of {', '.join(known)}; found {unknown or 'none'}"
            )
    pairs = config.particles is None or (config.particles > 1 and config.particles % 2 == 0)
    conditions = (
        *positive(
            config,
            *("seconds", "steps", "threads", "learning_rate", "flow_learning_rate"),
            *("implicit_learning_rate", "score_learning_rate", "reference_warm_up"),
        ),
        *some_seeds(config),
        (pairs, "particles", "an even number, for pairs of opposite noise"),
        (0 < config.beta_start <= 1, "beta-start", "a value in (0, 1]"),
        (0 <= config.beta_share <= 1, "beta-share", "a share in [0, 1]"),
        (0 <= config.decay_start < 1, "decay-start", "a share in [0, 1)"),
        (config.score_samples >= 2, "score-samples", "at least 2"),
        (config.draws >= 100, "draws", "at least 100"),
        (config.reference_draws >= 50, "reference-draws", "at least 50"),
    )
    check_options(config, conditions)


def main() -> None:
    """Compares guides with posteriors."""
    config = tyro.cli(Config, prog="python -m inference.posterior", description=__doc__)
    with user_errors():
        use_threads(config.threads)
        compare(config)


if __name__ == "__main__":
    main()
