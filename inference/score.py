# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Compares estimators of a score that is known: ``python -m inference.score [options]``.

Examples::

    python -m inference.score
    python -m inference.score --estimators ardae gaussian --targets mixture8 moving8 --seeds 0
    python -m inference.score --estimators ardae ardae:depth=3 --targets moving8 --out runs/depth

After a colon, an estimator may have other options than its defaults.

Every estimator learns on every target, once for each seed, for the same CPU time: that of its
updates alone. Drawing from the target and evaluating are not counted; the first update's imports
neither. An update gets fresh contexts with fresh draws of each. The error is
``Target.relative_error``, on contexts and draws of its own, on a moving target at the moment of
the query. An estimator without anything to learn is evaluated once, at time 0. The kernel
estimators see the draws of one context at a time, on targets without context too.

The run folder (``--out``) holds metrics.csv, table.md and figures/. Runs that it holds are skipped:
after an interruption the same command goes on, and estimators, targets and seeds can be
added. Columns of metrics.csv:

- ``estimator``, ``target``, ``seed``: the run;
- ``updates``, ``cpu_seconds``: done at the evaluation;
- ``draws``: given with the query, per context;
- ``error``: relative, squared, in whitened units; 1 for the zero score, nan if not finite;
- ``update_ms``: CPU milliseconds of an update, mean over the run so far;
- ``query_ms``: CPU milliseconds of the query, at all values of all contexts.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from inference.scores import plots as score_plots
from inference.scores.table import COLUMNS, Key, Row, Rows, read, table, write
from inference.shared.errors import UserError, check_options, positive, some_seeds, user_errors
from inference.shared.files import write_text
from inference.shared.plots import save
from inference.shared.process import use_threads
from inference.shared.progress import advance
from inference.shared.randomness import seed_of
from inference.shared.run import RunFolder
from models.targets import TARGETS, Target
from pyro_ardae.score import (
    ARDAE,
    DAE,
    KernelDensityScore,
    PaperARDAE,
    ScoreEstimator,
    SlicedScore,
    SpectralScore,
    SteinScore,
)

__all__ = ["COLUMNS", "ESTIMATORS", "GaussianScore", "Score", "compare", "main"]

#: Shares of the time at which the error is measured.
MOMENTS = (1 / 40, 1 / 20, 1 / 10, 1 / 4, 1 / 2, 1)


class GaussianScore(ScoreEstimator):
    """Score of the Gaussian with the mean and covariance of the draws: the trivial baseline.

    The inverse of the covariance is unbiased for a Gaussian q. With D + 2 draws or fewer it does
    not exist, and the covariance is taken for diagonal.
    """

    def update(
        self, samples: Tensor, context: Tensor | None = None, *, center: Tensor | None = None
    ) -> Tensor:
        """Nothing to learn."""
        return samples.new_zeros(())

    @torch.no_grad()
    def forward(
        self,
        value: Tensor,
        samples: Tensor,
        context: Tensor | None = None,
        *,
        center: Tensor | None = None,
    ) -> Tensor:
        """Minus the distance from the mean, divided by the covariance."""
        z, _ = self._rows(samples, context)
        centered = z - z.mean(0)
        at = value.reshape(len(value), -1, self.dim) - z.mean(0)
        if len(z) <= self.dim + 2:
            return (-at / z.var(0)).reshape(value.shape)
        # The mean of an inverse Wishart matrix.
        cov = torch.einsum("sbi,sbj->bij", centered, centered) / (len(z) - self.dim - 2)
        return -torch.einsum("bij,nbj->nbi", torch.linalg.inv(cov), at).reshape(value.shape)


def _paper(dim: int, context_dim: int) -> PaperARDAE:
    # The paper's 25 Gaussians have 2 latents, its MNIST runs 32.
    return (PaperARDAE.gaussians if dim < 32 else PaperARDAE.mnist)(dim, context_dim)


ESTIMATORS: dict[str, Callable[..., ScoreEstimator]] = {
    "ardae": ARDAE,
    "ardae-energy": partial(ARDAE, parametrization="energy"),
    "ardae-paper": _paper,
    "dae": DAE,
    "dae-residual": partial(DAE, residual=True),
    "sliced": SlicedScore,
    "stein": SteinScore,
    "spectral": SpectralScore,
    "kde": KernelDensityScore,
    "gaussian": GaussianScore,
}
"""Estimators by name: ``(dim, context_dim)`` to an estimator."""


def estimator_for(name: str, target: Target) -> ScoreEstimator:
    """An estimator, by name or as ``name:option=value,...``.

    :raises UserError: if there is none, or not with such options.
    """
    kind, _, text = name.partition(":")
    if kind not in ESTIMATORS:
        raise UserError(f"--estimators: expected some of {', '.join(ESTIMATORS)}; found {kind}")
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("it is no option=value")
        options = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        return ESTIMATORS[kind](target.dim, target.context_dim, **options)
    except (SyntaxError, TypeError, ValueError) as error:
        raise UserError(
            f"--estimators: expected options of {kind!r}, like {kind}:option=1, found {name!r}: "
            f"{error}"
        ) from None


@dataclass(frozen=True)
class Score:
    """Options of the comparison."""

    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    """Estimators to compare."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Targets to compare them on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds: of draws, contexts, weights and noise."""
    seconds: float = 20.0
    """CPU time of the updates of a run."""
    num_contexts: int = 64
    """Contexts of an update; without context, batches of draws of the one target."""
    num_samples: int = 64
    """Draws per context of an update."""
    draws: tuple[int, ...] = (64, 512)
    """Draws per context given with a query; each number has rows of its own."""
    eval_contexts: int = 64
    """Contexts of an evaluation."""
    eval_samples: int = 64
    """Values per context of an evaluation."""
    threads: int = 1
    """CPU threads of torch. CPU time counts the work of all."""
    figures: bool = True
    """Whether to draw figures. Fields and noise levels need some training more, once a folder."""
    figure_seconds: float = 10.0
    """CPU time of training of each estimator in those."""
    out: Path = Path("runs/score")
    """Run folder; new, or to go on with."""


#: Options that may change when a run folder is gone on with.
MAY_DIFFER = ("estimators", "targets", "seeds", "figures", "figure_seconds", "out")


class Run:
    """One estimator on one target: its draws, its time, its errors.

    :param ScoreEstimator estimator: what learns.
    :param Target target: what it learns from.
    :param int seed: seed of the draws.
    :param Score options: numbers of contexts and draws.
    """

    def __init__(
        self, estimator: ScoreEstimator, target: Target, seed: int, options: Score
    ) -> None:
        self.estimator, self.target, self.seed, self.options = estimator, target, seed, options
        self.learns = any(True for _ in estimator.parameters())
        self.updates, self.cpu_seconds = 0, 0.0
        self._generator = torch.Generator().manual_seed(seed_of(seed, "draws", 0))

    def train(self, seconds: float) -> Iterator[float]:
        """Update until that much CPU time is spent; yield the time of each update."""
        options = self.options
        while self.learns and self.cpu_seconds < seconds:
            target = self.target.at(self.updates)
            context = target.contexts(options.num_contexts, generator=self._generator)
            samples = target.sample(options.num_samples, context, generator=self._generator)
            arguments = self._arguments(target, context)
            start = time.process_time()
            self.estimator.update(samples, **arguments)
            spent = time.process_time() - start
            self.cpu_seconds += spent
            self.updates += 1
            yield spent

    def evaluate(self, draws: int) -> Row:
        """Error and cost of a query with so many draws per context."""
        # The same values for every estimator and at every time, none of them trained on.
        generator = torch.Generator().manual_seed(seed_of(self.seed, "evaluation", 0))
        target = self.target.at(self.updates)
        context = target.contexts(self.options.eval_contexts, generator=generator)
        value = target.sample(self.options.eval_samples, context, generator=generator)
        samples = target.sample(draws, context, generator=generator)
        arguments = self._arguments(target, context)
        start = time.process_time()
        estimate = self.estimator(value, samples, **arguments)
        spent = time.process_time() - start
        return {
            "updates": self.updates,
            "cpu_seconds": round(self.cpu_seconds, 4),
            "draws": draws,
            "error": float(target.relative_error(estimate, value, context)),
            "update_ms": round(1e3 * self.cpu_seconds / max(1, self.updates), 4),
            "query_ms": round(1e3 * spent, 4),
        }

    def _arguments(self, target: Target, context: Tensor) -> dict[str, Tensor | None]:
        arguments = {"context": context if target.context_dim else None}
        if self.estimator.needs_center:
            # What comes nearest to the output of a sampler for zero noise.
            arguments["center"] = target.moments(context)[0]
        return arguments


def start(key: Key, options: Score) -> Run:
    """A run at its start, after what only the first update of a process does."""
    name, target_name, seed = key
    target = TARGETS[target_name]()
    torch.manual_seed(seed)
    first = Run(estimator_for(name, target), target, seed, options)
    next(first.train(math.inf), None)
    torch.manual_seed(seed)
    return Run(estimator_for(name, target), target, seed, options)


def rows_of(run: Run, progress: tqdm[Any]) -> list[Row]:
    """Train a run to its end; its rows."""
    options, rows = run.options, list[Row]()
    for share in MOMENTS if run.learns else MOMENTS[-1:]:
        for spent in run.train(options.seconds * share):
            advance(progress, progress.n + spent)
        rows += [run.evaluate(draws) for draws in options.draws]
    return rows


def compare(options: Score) -> Path:
    """Make the runs that the folder lacks, then table and figures; returns the folder."""
    _check(options)
    path, config = options.out, dataclasses.asdict(options)
    RunFolder.open_or_create(path, config, COLUMNS, may_differ=MAY_DIFFER)
    runs = read(path / "metrics.csv")
    wanted: list[Key] = [
        (estimator, target, seed)
        for seed in options.seeds
        for target in options.targets
        for estimator in options.estimators
    ]
    missing = [key for key in wanted if key not in runs]
    if len(missing) < len(wanted):
        print(f"{path}: {len(wanted) - len(missing)} of {len(wanted)} runs are there already")
    with tqdm(total=options.seconds * len(missing), unit="s", mininterval=1.0) as progress:
        for index, key in enumerate(missing, 1):
            label = f"{key[1]}, {key[0]}, seed {key[2]}"
            progress.set_description(label)
            run = start(key, options)
            runs[key] = rows_of(run, progress)
            write(path / "metrics.csv", runs)
            advance(progress, index * options.seconds)
            ends = runs[key][-len(options.draws) :]
            errors = ", ".join(f"{row['error']:.4g} ({row['draws']:g} draws)" for row in ends)
            progress.write(f"{label}: error {errors} after {run.updates} updates")
    report(runs, options)
    return path


def report(runs: Rows, options: Score) -> None:
    """Write and print the table of all runs, draw the figures."""
    generator = torch.Generator().manual_seed(0)
    reference: dict[str, float] = {}
    for name in TARGETS:
        if any(key[1] == name for key in runs):
            target = TARGETS[name]()
            context = target.contexts(1024, generator=generator)
            value = target.sample(64, context, generator=generator)
            exact = target.gaussian_score(value, context)
            reference[name] = float(target.relative_error(exact, value, context))
    heading = (
        f"{options.seconds:g} CPU seconds of updates, each {options.num_contexts} contexts with "
        f"{options.num_samples} draws; {options.threads} thread(s); seeds "
        f"{', '.join(str(seed) for seed in sorted({key[2] for key in runs}))}; torch "
        f"{torch.__version__}."
    )
    text = table(runs, reference, heading, options.draws)
    write_text(options.out / "table.md", text)
    print(f"\n{text}")
    if options.figures:
        folder = options.out / "figures"
        figure = score_plots.errors_figure(runs, reference, options.draws[0])
        print(f"figures: {save(figure, folder / 'errors.png')}")
        for path, draw in (
            (folder / "fields.png", score_plots.fields_figure),
            (folder / "levels.png", score_plots.levels_figure),
        ):
            if not path.exists():
                torch.manual_seed(0)
                save(draw(lambda estimator, target: _train(estimator, target, options)), path)
            print(f"         {path}")


def _train(estimator: ScoreEstimator, target: Target, options: Score) -> float:
    """Train for a figure; the error."""
    run = Run(estimator, target, 0, options)
    for _ in tqdm(run.train(options.figure_seconds), desc="figures", unit=" updates", leave=False):
        pass
    return float(run.evaluate(options.draws[-1])["error"])


def _check(options: Score) -> None:
    unknown = ", ".join(name for name in options.targets if name not in TARGETS)
    if unknown or not options.targets:
        raise UserError(
            f"--targets: expected some of {', '.join(TARGETS)}; found {unknown or 'none'}"
        )
    if not options.estimators:
        raise UserError(f"--estimators: expected some of {', '.join(ESTIMATORS)}; found none")
    for name in options.estimators:
        estimator_for(name, TARGETS[options.targets[0]]())
    conditions = (
        *positive(options, "seconds", "figure_seconds", "threads", "num_contexts"),
        *positive(options, "eval_contexts", "eval_samples"),
        *some_seeds(options),
        (options.num_samples >= 8, "num-samples", "at least 8"),
        (min(options.draws, default=0) >= 3, "draws", "3 or more each"),
    )
    check_options(options, conditions)


def main() -> None:
    """Compares score estimators."""
    options = tyro.cli(Score, prog="python -m inference.score", description=__doc__)
    with user_errors():
        use_threads(options.threads)
        compare(options)


if __name__ == "__main__":
    main()
