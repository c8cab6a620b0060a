# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Fits guides to an energy of the plane: ``python -m inference.energy u1|u2|u3|u4 [options]``.

Examples::

    python -m inference.energy u1                     # 3 guides, 60 s each, one seed
    python -m inference.energy u4 --guide implicit --seeds 0 1 2
    python -m inference.energy u2 --guide flow --budget-seconds 300 --out runs/u2-flow

Each guide trains through SVI for the same time, one after the other, then is compared with the
density on a grid by millions of its draws, see :mod:`inference.shared.grid`. The folder gets
``results.csv`` and ``results.json`` (one row for each guide and seed), ``samples.png`` and
the RunFolder's ``config.json``, ``command.txt``, ``versions.json``, ``metrics.csv``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyro
import torch
import tyro
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from inference.energies.presets import PRESETS, Config, Guide, check
from inference.energies.report import draw, table
from inference.shared import grid, plots
from inference.shared.clock import clock_of
from inference.shared.errors import failed, needs, user_errors
from inference.shared.optim import TorchOptim
from inference.shared.process import use_threads
from inference.shared.rows import write_csv
from inference.shared.run import RunFolder
from inference.shared.schedules import annealed, cosine_decay, decay_score
from models.energies import ENERGIES, log_normalizer
from models.networks import ACTIVATIONS
from models.unconditional import FlowPosterior, GaussianPosterior, ImplicitPosterior
from pyro_ardae import ARDAE, TraceImplicit_ELBO

__all__ = ["Training", "main", "run"]

COLUMNS = ("step", "seconds", "beta", "loss", "score_loss", "stein")


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
        return annealed(self.progress, self.config.beta_start, self.config.beta_share)

    @property
    def decay(self) -> float:
        """Factor on the step sizes of the next step: 1, then half a cosine to zero."""
        return cosine_decay(self.progress, self.config.decay_start)

    def step(self) -> float:
        """Takes one training step; returns the loss."""
        decay = self.decay
        self.optim.optimizer.param_groups[0]["lr"] = self.rate * decay
        decay_score(self.loss, self.config.score_learning_rate, decay)
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
        return -self.beta * self.energy.slope(z)

    def _guide(self, beta: float) -> None:
        pyro.module("posterior", self.posterior)
        implicit = isinstance(self.posterior, ImplicitPosterior)
        pyro.sample("z", self.posterior(beta) if implicit else self.posterior())


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
            energy=ENERGIES[config.energy].value_and_slope,
            num_moves=config.moves,
            step_size=config.langevin_step_size,
            jump_scale=config.jump_scale,
        )
        estimator = partial(
            ARDAE,
            hidden_dim=config.score_hidden_dim,
            num_folds=config.score_folds,
            learning_rate=config.score_learning_rate,
            depth=config.score_depth,
            delta=config.score_delta,
            whitening="none",  # the network learns the difference from the model's score
            weight_decay=0.0,
            reference=target_score,
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
        with needs("--guide flow", "zuko", "flows"):
            posterior = FlowPosterior(
                2,
                transforms=config.flow_transforms,
                hidden_dims=config.flow_hidden_dims,
                bins=config.flow_bins,
                spread=config.spread,
            )
        batch_size, rate = config.flow_batch_size, config.flow_learning_rate
    else:
        posterior = GaussianPosterior(2, spread=config.spread)
        batch_size, rate = config.gaussian_batch_size, config.gaussian_learning_rate
    loss = Trace_ELBO(num_particles=batch_size, vectorize_particles=True, max_plate_nesting=0)
    return posterior, loss, rate


def train(training: Training, folder: RunFolder, clock: Callable[[], float]) -> None:
    """The training loop."""
    folder.prepare()
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
    clock = clock_of(config.clock)
    guides = get_args(Guide) if config.guide == "all" else (config.guide,)
    out = config.out or Path("runs") / f"energy-{config.energy}"
    log_z = log_normalizer(energy)
    rows, histograms = [], []
    # All that can be refused comes first: none of the time is spent.
    for guide in guides:
        Training(config, guide)
    folders = {
        (guide, seed): RunFolder.create(
            out / f"{guide}-seed{seed}", options, COLUMNS, resumable=False
        )
        for seed in config.seeds
        for guide in guides
    }
    for seed in config.seeds:
        for guide in guides:
            folder = folders[guide, seed]
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            training = Training(config, guide)
            try:
                train(training, folder, clock)
                row, counts = evaluate(training, log_z)
            except ValueError as error:
                raise failed(f"{guide}, seed {seed}", error, "Lower its step size") from error
            folder.close()
            folder.save("latest", {"posterior": training.average.module.state_dict()})
            row = {"energy": config.energy, "guide": guide, "seed": seed, **row}
            folder.write_json("results.json", row)
            rows.append(row)
            write_csv(out / "results.csv", [*rows[0]], (row.values() for row in rows))
            if seed == config.seeds[0]:
                histograms.append((guide, counts))
    print(table(config, rows))
    figure = plots.save(draw(config, histograms), out / "samples.png")
    print(f"\nresults {out / 'results.csv'}, figure {figure}")
    return out


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


def main() -> None:
    """Fits guides to an energy."""
    config = tyro.extras.overridable_config_cli(
        PRESETS, prog="python -m inference.energy", description=__doc__
    )
    with user_errors():
        use_threads(config.threads)
        run(config)


if __name__ == "__main__":
    main()
