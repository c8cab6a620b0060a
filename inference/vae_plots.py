# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of VAE runs: ``python -m inference.vae_plots RUN... --out FOLDER``.

Draws validation log p(x) against time of all runs in one plot, wall-clock or by measured step
times, and for each run samples, reconstructions and latent traversals. Runs with two latents get
one more figure and a CSV file: the guide's posterior of single test images beside the true one by
quadrature, and their KL divergence.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.autoencoders.evaluation import restore
from inference.autoencoders.options import Guide
from inference.autoencoders.plane_posterior import PlanePosterior, plane_posterior
from inference.autoencoders.plots import image_figure, point_posterior
from inference.autoencoders.presets import Config, build_data
from inference.benchmarks.vae_table import folder_name, read_steps
from inference.shared import plots
from inference.shared.errors import UserError, user_errors
from inference.shared.precision import full_precision
from inference.shared.rows import write_csv
from inference.shared.run import make_folder, read_metrics
from models.vae import VAE

__all__ = ["log_px_curves", "main", "posterior_figure"]


@dataclass(frozen=True)
class Options:
    """Figures of VAE runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; those of one preset are its seeds."""
    out: Path = Path("runs/figures")
    """Folder of the figures."""
    images: int = 50
    """Two latents: test images of which the divergence is computed, a random subset."""
    draws: int = 400_000
    """Two latents: draws of the guide for each of them."""
    seed: int = 0
    """Seed of the subset and the draws."""
    step_times: Path | None = None
    """steps.csv of inference.bench vae: log p(x) is drawn against steps times the milliseconds that
    were measured there, whatever else kept the machine busy while training."""
    data_dir: Path | None = None
    """Folder of binarized_mnist.npz; as in the run by default."""
    device: str | None = None
    """Torch device; that of each run by default."""


def log_px_curves(
    axes: Axes,
    runs: Mapping[str, Sequence[Mapping[str, list[float]]]],
    guides: Mapping[str, Guide],
    *,
    title: str,
) -> Axes:
    """Draws validation log p(x) against time, a line for each seed.

    A guide has the same colour in all such figures; of two rows with one guide, the second is
    dashed.

    :param Axes axes: where to draw.
    :param runs: by label the metrics of each seed, see :func:`inference.shared.run.read_metrics`.
    :param guides: by label the guide.
    :param str title: title.
    """
    last, drawn = [], set()
    for label, seeds in runs.items():
        guide = guides[label]
        for at, metrics in enumerate(seeds):
            shown = f"{label} ({len(seeds)} seeds)" if len(seeds) > 1 else label
            axes.plot(
                np.array(metrics["seconds"]) / 60,
                metrics["valid_log_px"],
                color=f"C{get_args(Guide).index(guide)}",
                linestyle="--" if guide in drawn else "-",
                linewidth=1.2,
                marker=".",
                markersize=4,
                label=None if at else shown,
            )
            last.append(metrics["valid_log_px"])
        drawn.add(guide)
    # The first validations lie far below what the plot is about.
    values = np.concatenate([np.array(one) for one in last])
    ends = np.array([one[-1] for one in last])
    low = max(values.min(), ends.min() - 6)
    axes.set(title=title, xlabel="minutes", ylabel="validation log p(x), nats")
    axes.set_ylim(low, values.max() + 0.05 * (values.max() - low) + 0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")  # "best" is a search, which a slow machine warns of
    return axes


def posterior_figure(columns: Mapping[str, Sequence[PlanePosterior]]) -> Figure:
    """The posteriors of some images: draws of the guide over the true one.

    :param columns: by name of the run the same images for each.
    """
    count = len(next(iter(columns.values())))
    figure, axes = plots.subplots(len(columns), count, width=3.0, height=3.2)
    for row, (name, posteriors) in enumerate(columns.items()):
        for column, one in enumerate(posteriors):
            panel = axes[row * count + column]
            point_posterior(panel, one, colour="C3")
            panel.set(ylabel=name if column == 0 else "", title=f"KL {one.kl:.2f}")
    return figure


def _plane(runs: Mapping[Path, tuple[Config, VAE]], options: Options) -> list[Path]:
    """Figure and CSV file of the runs with two latents."""
    found: dict[Path, list[PlanePosterior]] = {}
    for run, (config, vae) in runs.items():
        x = build_data(config).subset("test", options.images, options.seed).to(config.device)
        torch.manual_seed(options.seed)
        # One image at a time: its grid alone has as many latents as a minibatch has pixels.
        with full_precision(vae):  # rounding to bf16 makes ragged contours
            found[run] = [plane_posterior(vae, row, num_draws=options.draws) for row in x.split(1)]
    path = options.out / "posteriors.csv"
    lines = (
        [run.name, index, f"{one.kl:.5f}", f"{one.log_px:.5f}", f"{one.negentropy:.5f}"]
        for run, ones in found.items()
        for index, one in enumerate(ones)
    )
    write_csv(path, ("run", "image", "kl", "log_px", "negentropy"), lines)
    for run, ones in found.items():
        kl = torch.tensor([one.kl for one in ones], dtype=torch.double)
        error = kl.std() / len(kl) ** 0.5
        print(
            f"{run}: KL(guide || posterior) {kl.mean():.3f} ± {error:.3f} nats over {len(kl)} "
            f"images, median {kl.quantile(0.5):.3f}, log p(x) by quadrature "
            f"{sum(one.log_px for one in ones) / len(ones):.3f}"
        )
    # Images by a rule: those whose posterior in the last run is farthest from a Gaussian.
    last = torch.tensor([one.negentropy for one in list(found.values())[-1]])
    chosen = last.argsort(descending=True)[:5].tolist()
    labels = {run.name: [ones[index] for index in chosen] for run, ones in found.items()}
    return [plots.save(posterior_figure(labels), options.out / "posteriors.png"), path]


def _times(path: Path) -> dict[str, tuple[str, float]]:
    """Rows of a steps.csv and their milliseconds a step, by the names of their folders."""
    if not path.exists():
        raise UserError(
            f"--step-times: expected a steps.csv of inference.bench vae, found no {path}"
        )
    return {
        folder_name(row): (row, figures["step_ms"]) for row, figures in read_steps(path).items()
    }


def draw(options: Options) -> list[Path]:
    """Writes the figures; returns their paths."""
    if not options.runs:
        raise UserError("RUNS: expected one run folder at least, found none")
    names = [run.name for run in options.runs]
    if len({*names}) < len(names):
        raise UserError(
            "RUNS: expected folders of different names, which name the figures, found "
            + ", ".join(names)
        )
    make_folder(options.out)
    times = None if options.step_times is None else _times(options.step_times)
    given = {"data_dir": options.data_dir, "device": options.device}
    changes = {name: value for name, value in given.items() if value is not None}
    metrics: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    guides: dict[str, Guide] = {}
    plane: dict[Path, tuple[Config, VAE]] = {}
    written = []
    for run in options.runs:
        config, vae = restore(run, **changes)
        vae.requires_grad_(False)
        found = read_metrics(run)
        label = re.sub(r"-seed\d+$", "", run.name)  # runs of other options are no seeds of it
        if times is not None:
            if label not in times:
                raise UserError(
                    f"{options.step_times}: expected a row for {run}, found "
                    f"{', '.join(sorted(times))}; folders are named as inference.bench vae does"
                )
            label, milliseconds = times[label]
            found["seconds"] = [1e-3 * milliseconds * step for step in found["step"]]
        if config.data == "25gaussians":
            raise UserError(f"{run}: expected a run on images, found {config.preset}")
        if not config.train_on_valid:  # such a run has no validation figures
            metrics[label].append(found)
            guides[label] = config.guide
        x = build_data(config).subset("test", 500, options.seed).to(config.device)
        torch.manual_seed(options.seed)
        written.append(
            plots.save(image_figure(vae, x, name=config.preset), options.out / f"{run.name}.png")
        )
        if vae.latent_dim == 2:
            plane[run] = (config, vae)
    if metrics:
        figure, axes = plots.subplots(1, 1, width=7, height=5)
        title = "importance-sampled log p(x) while training"
        log_px_curves(axes[0], metrics, guides, title=title)
        written.append(plots.save(figure, options.out / "log_px.png"))
    return written + (_plane(plane, options) if plane else [])


def main() -> None:
    """Draws figures of run folders."""
    options = tyro.cli(Options, prog="python -m inference.vae_plots", description=__doc__)
    with user_errors():
        for path in draw(options):
            print(path)


if __name__ == "__main__":
    main()
