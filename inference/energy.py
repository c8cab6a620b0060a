# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Fits guides to an energy of the plane: ``python -m inference.energy u1|u2|u3|u4 [options]``.

Examples::

    python -m inference.energy u1                     # 3 guides, 60 s each, one seed
    python -m inference.energy u4 --guide implicit --seeds 0 1 2
    python -m inference.energy u2 --guide flow --budget-seconds 300 --out runs/u2-flow

Each guide trains through SVI for the same time, one after the other, then is compared with the
density on a grid by millions of its draws, see :mod:`inference.grid`. The folder gets
``results.csv`` and ``results.json`` (one row for each guide and seed), ``samples.png`` and
the RunFolder's ``config.json``, ``command.txt``, ``versions.json``, ``metrics.csv``.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pyro
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from inference import grid, plots
from inference.errors import UserError, user_errors
from inference.optim import TorchOptim
from inference.run import RunFolder
from models.energies import ENERGIES, log_normalizer
from models.networks import ACTIVATIONS
from models.unconditional import FlowPosterior, GaussianPosterior, ImplicitPosterior
from pyro_ardae import ARDAE, TraceImplicit_ELBO

__all__ = ["PRESETS", "Config", "Training", "main", "run"]

Guide = Literal["implicit", "flow", "gaussian"]
COLUMNS = ("step", "seconds", "beta", "loss", "score_loss", "stein")


@dataclass(frozen=True)
class Config:
    """Options of a fit."""

    energy: tyro.conf.Suppress[Literal["u1", "u2", "u3", "u4"]]
    """The energy; fixed by the preset."""
    guide: Literal["implicit", "flow", "gaussian", "all"] = "all"
    """The guide, or all three for the same time each."""
    budget_seconds: float = 60.0
    """Time of training of each guide. The schedules run over it, whatever the machine's speed."""
    clock: Literal["wall", "cpu"] = "wall"
    """What the budget is measured in: wall-clock, or this process's CPU time, which on one thread
    is the wall-clock of an idle core."""
    steps: int = 1_000_000
    """Training steps at most; the schedules run over whichever limit comes first."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """Seeds; everything is done for each."""
    threads: int = 1
    """CPU threads of torch; networks of this size gain nothing by more."""
    out: Path | None = None
    """Folder of the results; runs/energy-PRESET if left out."""

    beta_start: float = 0.1
    """Inverse temperature at the first step, in (0, 1]; it rises to 1 geometrically, ..."""
    beta_share: float = 0.5
    """... over this share of the run."""
    decay_start: float = 0.5
    """Share of the run after which step sizes fall, along a cosine, to zero."""
    average_decay: float = 0.99
    """Decay of the Polyak average of the guide, which is what is evaluated."""
    spread: float = 2.0
    """Scale of the guides' draws before training."""

    learning_rate: float = 2e-3
    """Implicit guide: step size of Adam."""
    batch_size: int = 512
    """Implicit guide: draws per step."""
    noise_dim: int = 10
    """Implicit guide: width of the noise."""
    width: float = 0.5
    """Implicit guide: scale of its Gaussian before training."""
    input_scale: float = 3.0
    """Implicit guide: factor on the noise before the first layer."""
    hidden_dims: tuple[int, ...] = (64, 64, 64)
    """Implicit guide: widths of the hidden layers."""
    activation: Literal["elu", "relu", "silu", "softplus", "tanh"] = "silu"
    """Implicit guide: activation of the hidden layers."""
    langevin_steps: int = 4
    """Implicit guide: Langevin steps at its end."""
    num_score_samples: int = 1024
    """Implicit guide: draws by which the score is learned in a step."""
    num_score_updates: int = 1
    """Implicit guide: updates of the score network per step."""
    score_hidden_dim: int = 64
    """Implicit guide: width of the score network."""
    score_folds: int = 4
    """Implicit guide: optimizer steps of the score network per update."""
    score_learning_rate: float = 8e-3
    """Implicit guide: step size of the score network."""
    score_depth: int = 4
    """Implicit guide: hidden layers of the score network."""
    score_delta: float = 0.1
    """Implicit guide: scale of the noise by which the score is learned, in units of its input."""
    score_whitening: Literal["pooled", "diagonal", "none"] = "none"
    """Implicit guide: coordinates of the score network; "none" leaves the plane as it is."""
    score_reference: bool = True
    """Implicit guide: whether the score network learns the difference from the model's score."""
    score_weight_decay: float = 0.0
    """Implicit guide: weight decay of the score network."""

    flow_learning_rate: float = 2e-3
    """Flow: step size of Adam."""
    flow_batch_size: int = 256
    """Flow: draws per step."""
    flow_transforms: int = 3
    """Flow: number of autoregressive spline transforms."""
    flow_hidden_dims: tuple[int, ...] = (64, 64)
    """Flow: widths of the hidden layers of each."""
    flow_bins: int = 8
    """Flow: pieces of each spline."""

    gaussian_learning_rate: float = 1e-2
    """Gaussian: step size of Adam."""
    gaussian_batch_size: int = 512
    """Gaussian: draws per step."""

    draws: int = 4_000_000
    """Draws of each guide for the evaluation."""


PRESETS: dict[str, tuple[str, Config]] = {
    "u1": ("Two modes on a ring.", Config(energy="u1")),
    "u2": ("A ridge along a sine.", Config(energy="u2")),
    "u3": ("Two ridges that part and meet again.", Config(energy="u3")),
    "u4": ("A ridge that forks.", Config(energy="u4")),
}


class Training:
    """A guide in training.

    :param Config config: options.
    :param str guide: ``"implicit"``, ``"flow"`` or ``"gaussian"``.
    """

    def __init__(self, config: Config, guide: Guide) -> None:
        self.config = config
        self.energy = ENERGIES[config.energy]
        self.posterior, self.loss, self.rate = build(config, guide, self._target_score)
        adam = torch.optim.Adam(self.posterior.parameters(), self.rate, fused=True)
        self.optim = TorchOptim(self.posterior, adam)
        self.svi = SVI(self.energy.model, self._guide, self.optim, loss=self.loss)
        average = get_ema_multi_avg_fn(config.average_decay)
        self.average = AveragedModel(self.posterior, multi_avg_fn=average)
        self.steps_done = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by seconds, in [0, 1]."""
        config = self.config
        return min(1.0, max(self.steps_done / config.steps, self.seconds / config.budget_seconds))

    @property
    def beta(self) -> float:
        """Inverse temperature of the next step."""
        left = 1 - self.progress / self.config.beta_share if self.config.beta_share else 0.0
        return self.config.beta_start ** max(0.0, left)

    @property
    def decay(self) -> float:
        """Factor on the step sizes of the next step: 1, then half a cosine to zero."""
        past = (self.progress - self.config.decay_start) / (1 - self.config.decay_start)
        return 0.5 + 0.5 * math.cos(math.pi * max(0.0, past))

    def step(self) -> float:
        """Takes one training step; returns the loss."""
        decay = self.decay
        self.optim.optimizer.param_groups[0]["lr"] = self.rate * decay
        if isinstance(self.loss, TraceImplicit_ELBO):
            for estimator in self.loss.estimators.values():
                # The score has less and less to follow, too.
                estimator.learning_rate = self.config.score_learning_rate * max(0.1, decay)
        loss = self.svi.step(self.beta)
        self.steps_done += 1
        self.average.update_parameters(self.posterior)
        return loss

    def diagnostics(self) -> dict[str, float]:
        """Score loss and Stein identity of an implicit guide."""
        if not isinstance(self.loss, TraceImplicit_ELBO):
            return {}
        score = self.loss.diagnostics()["z"]
        return {name: score[name] for name in ("score_loss", "stein") if name in score}

    @torch.no_grad()
    def draws(self, num_draws: int, *, batch_size: int = 100_000) -> Iterator[Tensor]:
        """Draws of the averaged guide, in batches ``[n, 2]``."""
        q = self.average.module()
        for start in range(0, num_draws, batch_size):
            yield q(torch.Size((min(batch_size, num_draws - start),)))

    def _target_score(self, z: Tensor) -> Tensor:
        """The score of the density that the guide approaches at this step."""
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(at).sum(), at)
        return -self.beta * slope

    def _guide(self, beta: float) -> None:
        pyro.module("posterior", self.posterior)
        pyro.sample("z", self.posterior())


def build(
    config: Config, guide: Guide, target_score: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, ELBO, float]:
    """Builds a guide, its loss and its step size."""
    if guide == "implicit":
        posterior: nn.Module = ImplicitPosterior(
            2,
            noise_dim=config.noise_dim,
            hidden_dims=config.hidden_dims,
            activation=ACTIVATIONS[config.activation],
            spread=config.spread,
            width=config.width,
            input_scale=config.input_scale,
            energy=ENERGIES[config.energy],
            langevin_steps=config.langevin_steps,
        )
        estimator = partial(
            ARDAE,
            hidden_dim=config.score_hidden_dim,
            num_folds=config.score_folds,
            learning_rate=config.score_learning_rate,
            depth=config.score_depth,
            delta=config.score_delta,
            whitening=config.score_whitening,
            weight_decay=config.score_weight_decay,
            reference=target_score if config.score_reference else None,
        )
        loss: ELBO = TraceImplicit_ELBO(
            estimator,
            num_score_samples=config.num_score_samples,
            num_score_updates=config.num_score_updates,
            num_particles=config.batch_size,
            vectorize_particles=True,
            max_plate_nesting=0,
        )
        return posterior, loss, config.learning_rate
    if guide == "flow":
        try:
            posterior = FlowPosterior(
                2,
                transforms=config.flow_transforms,
                hidden_dims=config.flow_hidden_dims,
                bins=config.flow_bins,
                spread=config.spread,
            )
        except ModuleNotFoundError as error:
            raise UserError(
                f"--guide flow: expected zuko to be installed, found: {error}; "
                'pip install "pyro-ardae[flows]"'
            ) from None
        batch_size, rate = config.flow_batch_size, config.flow_learning_rate
    else:
        posterior = GaussianPosterior(2, spread=config.spread)
        batch_size, rate = config.gaussian_batch_size, config.gaussian_learning_rate
    loss = Trace_ELBO(num_particles=batch_size, vectorize_particles=True, max_plate_nesting=0)
    return posterior, loss, rate


def train(training: Training, folder: RunFolder, clock: Callable[[], float]) -> None:
    """The training loop."""
    started, losses, logged = clock(), [], 0.0
    with tqdm(unit="step", mininterval=1.0) as progress:
        while training.progress < 1:
            beta = training.beta
            losses.append(training.step())
            training.seconds = clock() - started
            progress.update()
            if training.progress >= min(1.0, logged + 0.05):
                logged = training.progress
                row = {"step": training.steps_done, "seconds": training.seconds, "beta": beta}
                row |= {"loss": sum(losses) / len(losses), **training.diagnostics()}
                losses.clear()
                folder.log(row)


def run(config: Config) -> Path:
    """Trains and evaluates all guides for all seeds; returns the folder."""
    check(config)
    options = dataclasses.asdict(config)
    energy = ENERGIES[config.energy]
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    guides = get_args(Guide) if config.guide == "all" else (config.guide,)
    out = config.out or Path("runs") / f"energy-{config.energy}"
    log_z = log_normalizer(energy)
    rows, histograms = [], []
    for seed in config.seeds:
        for guide in guides:
            folder = RunFolder.create(out / f"{guide}-seed{seed}", options, COLUMNS)
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            training = Training(config, guide)
            train(training, folder, clock)
            folder.close()
            folder.save("latest", {"posterior": training.average.module.state_dict()})
            row, counts = evaluate(training, log_z)
            row = {"energy": config.energy, "guide": guide, "seed": seed, **row}
            folder.write_json("results.json", row)
            rows.append(row)
            if seed == config.seeds[0]:
                histograms.append((guide, counts))
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(table(config, rows))
    figure = plots.save(draw(config, histograms), out / "samples.png")
    print(f"\nresults {out / 'results.csv'}, figure {figure}")
    return out


def check(config: Config) -> None:
    """Refuses options out of range.

    :raises UserError: naming the first of them.
    """
    for ok, option, expected, found in (
        (config.budget_seconds > 0, "budget-seconds", "a positive time", config.budget_seconds),
        (config.steps > 0, "steps", "a positive number", config.steps),
        (0 < config.beta_start <= 1, "beta-start", "a value in (0, 1]", config.beta_start),
        (0 <= config.beta_share <= 1, "beta-share", "a share in [0, 1]", config.beta_share),
        (0 <= config.decay_start < 1, "decay-start", "a share in [0, 1)", config.decay_start),
        (config.noise_dim >= 2, "noise-dim", "at least 2", config.noise_dim),
        (len(config.seeds) > 0, "seeds", "one seed at least", config.seeds),
        (config.draws > 0, "draws", "a positive number", config.draws),
    ):
        if not ok:
            raise UserError(f"--{option}: expected {expected}, found {found}")


@torch.no_grad()
def evaluate(training: Training, log_z: float) -> tuple[dict[str, Any], Tensor]:
    """The row of results of a trained guide, and the counts of its draws on the grid."""
    energy = training.energy
    counts = grid.count(training.draws(training.config.draws))
    result = grid.divergence(counts, energy)
    row: dict[str, Any] = {
        "kl": result.kl,
        "kl_coarse": result.kl_coarse,
        "kl_exact": None,
        "modes": result.found,
        "of_modes": len(result.expected),
        "smallest_share": min(s / e for s, e in zip(result.shares, result.expected, strict=True)),
        "steps": training.steps_done,
        "seconds": training.seconds,
    }
    if not isinstance(training.loss, TraceImplicit_ELBO):
        q = training.average.module()
        z = q(torch.Size((100_000,)))
        row["kl_exact"] = float((q.log_prob(z) + energy(z)).mean()) + log_z
    return row, counts


def table(config: Config, rows: Sequence[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [
        f"{config.energy}: KL(guide || density) in nats, {config.draws:,} draws on a grid",
        f"{'guide':9} {'seed':>4} {'KL':>8} {'KL, h=.1':>9} {'by log q':>9} {'modes':>7} "
        f"{'smallest':>9} {'steps':>7} {'seconds':>8}",
    ]
    for row in rows:
        exact = "" if row["kl_exact"] is None else f"{row['kl_exact']:.4f}"
        lines.append(
            f"{row['guide']:9} {row['seed']:4d} {row['kl']:8.4f} {row['kl_coarse']:9.4f} "
            f"{exact:>9} {row['modes']:2d} of {row['of_modes']} {row['smallest_share']:9.2f} "
            f"{row['steps']:7d} {row['seconds']:8.1f}"
        )
    return "\n".join(lines)


def draw(config: Config, histograms: Sequence[tuple[str, Tensor]]) -> Figure:
    """The density, and beside it the histogram of each guide's draws in the same colours."""
    density = grid.cell_log_masses(ENERGIES[config.energy]).exp()
    figure = Figure(figsize=(3.6 * (1 + len(histograms)), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(histograms))
    shown = [(f"density, {config.energy}", density), *histograms]
    top = float(density.max())
    for axes, (title, mass) in zip(panels, shown, strict=True):
        plots.heat_map(axes, mass / mass.sum(), title=title, extent=grid.LIMIT, limit=7.5, top=top)
    return figure


def main() -> None:
    """Fits guides to an energy."""
    config = tyro.extras.overridable_config_cli(
        PRESETS, prog="python -m inference.energy", description=__doc__
    )
    # A global of the process, which this program owns.
    torch.set_num_threads(config.threads)
    with user_errors():
        run(config)


if __name__ == "__main__":
    main()
