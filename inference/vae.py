# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Trains a variational autoencoder: ``python -m inference.vae PRESET [options]``.

Examples::

    python -m inference.vae 25gaussians-implicit --seed 1
    python -m inference.vae sbmnist-mlp-gaussian --budget-seconds 300 --precision bf16
    python -m inference.vae sbmnist-mlp-gaussian --resume runs/sbmnist-mlp-gaussian-seed0
    python -m inference.vae dbmnist-resconv-implicit --schedule paper --device cuda
    python -m inference.vae sbmnist-conv-flow --steps 12000 --train-on-valid
    python -m inference.vae sbmnist-mlp-2d-implicit --decoder RUN --seen-share 0.05

Columns of metrics.csv, one row for each validation:

- ``loss``: mean of the training loss per data point since the last row, in nats. With a guide
  without a density it lacks the guide's entropy: it is no bound, and not to be compared across
  guides;
- ``valid_log_px``, its standard error ``valid_log_px_se``, and with a guide that has one
  ``valid_elbo``: of the averaged weights, see
  :func:`inference.autoencoders.evaluation.evaluate`; empty with ``--train-on-valid``;
- ``aggregate_std``, ``point_std``: standard deviations of the latents, ibidem;
- ``score_loss``, ``stein``: of the score estimator, see ``TraceImplicit_ELBO.diagnostics``; means
  over the sites;
- ``beta``: weight of the KL terms; ``seconds``: wall-clock time of training, validation included.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch
import tyro
from tqdm import tqdm

from inference.autoencoders.evaluation import describe, final_evaluation
from inference.autoencoders.options import ESTIMATE
from inference.autoencoders.plots import image_figure, toy_figure
from inference.autoencoders.presets import (
    MAY_DIFFER,
    PAPER_PRESETS,
    PRESETS,
    Config,
    build_data,
    check,
)
from inference.autoencoders.tight import FILE_NAME as TIGHT_FILE
from inference.autoencoders.training import Training
from inference.shared import plots
from inference.shared.errors import UserError, user_errors
from inference.shared.precision import process_precision
from inference.shared.process import keep_freed_memory, use_threads
from inference.shared.run import RunFolder

__all__ = ["COLUMNS", "main", "run", "train"]

COLUMNS = (
    *("step", "seconds", "beta", "loss", "valid_log_px", "valid_log_px_se", "valid_elbo"),
    *("aggregate_std", "point_std", "score_loss", "stein"),
)

_DESCRIPTION = """Trains a variational autoencoder; each preset below with what to expect of it.

Options follow the preset: python -m inference.vae PRESET --help lists them."""


@contextmanager
def _failing_at(step: int) -> Iterator[None]:
    """Says at which step a loss, draws of the guide or their covariance were not finite."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise UserError(f"step {step}: {error}") from error


def train(training: Training, folder: RunFolder) -> None:
    """The training loop: steps, validations, checkpoints."""
    config = training.config
    budget = config.budget_seconds if config.budget_seconds is not None else float("inf")
    started = time.perf_counter() - training.seconds
    total = config.steps if config.budget_seconds is None else None  # else the time ends it
    progress = tqdm(total=total, initial=training.steps_done, unit="step", mininterval=1.0)
    with progress:
        while training.steps_done < config.steps and training.seconds < budget:
            beta = training.beta
            with _failing_at(training.steps_done + 1):
                training.loss_sum = training.loss_sum + training.step()
            training.loss_count += 1
            training.seconds = time.perf_counter() - started
            progress.update()
            last = training.steps_done == config.steps or training.seconds >= budget
            if last or training.steps_done % config.valid_every == 0:
                loss = float(training.loss_sum) / training.loss_count
                training.loss_sum, training.loss_count = 0.0, 0
                row = {"step": training.steps_done, "beta": beta, "loss": loss}
                shown = f"step {row['step']}: {training.seconds:.0f} s, loss {loss:.3f}"
                row |= training.score_figures()
                if not math.isfinite(loss):
                    raise UserError(
                        f"step {row['step']}: expected a finite loss, found {loss}; start anew, "
                        "with another --out and a lower --learning-rate or with --clip 2"
                    )
                if not config.train_on_valid:
                    with _failing_at(training.steps_done):
                        row |= training.validate()
                    shown += (
                        f", valid log p(x) {row['valid_log_px']:.3f} ± {row['valid_log_px_se']:.3f}"
                    )
                # Without validation images the last weights are the best known.
                if config.train_on_valid or row["valid_log_px"] > training.best_valid:
                    training.best_valid = row.get("valid_log_px", training.best_valid)
                    folder.save(
                        "best", {"vae": training.averaged.state_dict(), "step": row["step"]}
                    )
                training.seconds = time.perf_counter() - started
                folder.log(row | {"seconds": training.seconds})
                progress.write(shown)
                last = last or training.seconds >= budget  # by the validation
            if last or training.steps_done % config.checkpoint_every == 0:
                folder.save("latest", training.state())


def run(config: Config) -> Path:
    """Trains, evaluates, draws; returns the run folder."""
    check(config)
    process_precision(config.device, tf32=config.tf32)
    options = dataclasses.asdict(config)
    data = build_data(config)
    pyro.set_rng_seed(config.seed)
    training = Training(config, data)
    if config.resume is None:
        if config.decoder is not None:
            training.take_decoder(config.decoder)
        path = config.out or Path("runs") / f"{config.preset}-seed{config.seed}"
        folder = RunFolder.create(path, options, COLUMNS)
    else:
        path = config.resume
        folder = RunFolder.open(path, options, COLUMNS, may_differ=MAY_DIFFER)
        state = folder.load("latest", config.device)
        try:
            training.load_state(state)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{path}: expected the state of a training run of this version, found another "
                f"({error}); start anew"
            ) from error
        recorded = RunFolder.read_config(path)
        if any(recorded[name] != options[name] for name in ESTIMATE):
            training.best_valid = -float("inf")  # other estimates cannot be compared with it
        validated = folder.checkpoint("best").exists()
        if validated and folder.load("best")["step"] > training.steps_done:
            training.best_valid = -float("inf")  # the run goes on from before it
        folder.record(options)
        folder.drop_rows_after(training.steps_done)
    folder.prepare()
    train(training, folder)
    folder.close()

    vae = training.averaged
    best = folder.load("best", config.device)
    vae.load_state_dict(best["vae"])
    figures = final_evaluation(config, vae, data)
    results = {"best_step": best["step"], "steps": training.steps_done, "seconds": training.seconds}
    before = folder.read_json("results.json")
    if before.get("best_step") == best["step"]:  # nothing better has come: of the same weights
        results |= {name: value for name, value in before.items() if name.startswith("ais_")}
    else:
        (path / TIGHT_FILE).unlink(missing_ok=True)
    folder.write_json("results.json", {**results, **figures})
    print(describe(config, figures))
    x = data.subset("test", 4000, config.seed).to(config.device)
    toy = config.data == "25gaussians"
    drawn = toy_figure(vae, x) if toy else image_figure(vae, x[:500], name=config.preset)
    figure = plots.save(drawn, path / "figures" / "model.png")
    print(f"run folder {path}, figure {figure}")
    return path


def main() -> None:
    """Trains a variational autoencoder."""
    # Options left out, and those that --help lists, are the schedule's.
    paper = re.search(r"--schedule[ =]paper\b", " ".join(sys.argv))
    config = tyro.extras.overridable_config_cli(
        {**PRESETS, **PAPER_PRESETS} if paper else PRESETS,
        prog="python -m inference.vae",
        description=_DESCRIPTION,
    )
    keep_freed_memory()
    pyro.clear_param_store()
    with user_errors():
        if config.threads is not None:
            use_threads(config.threads)
        run(config)


if __name__ == "__main__":
    main()
