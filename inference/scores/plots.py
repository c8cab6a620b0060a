# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of ``inference.score``: error against time, fields in the plane, error against sigma."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from inference.scores.table import EXACT, Rows
from inference.shared import plots
from models.mixtures import GaussianMixture
from models.targets import TARGETS, Target
from pyro_ardae.score import ARDAE, DAE, ScoreEstimator

__all__ = [
    *("error_against_sigma", "error_against_time", "errors_figure", "field", "fields_figure"),
    "levels_figure",
]

#: Larger errors are off the scale.
TOP = 3.0

#: Noise levels of the levels figure, in standard deviations of the target.
LEVELS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

#: Arrows a side of a field.
ARROWS = 22

KINDS = ("exact", "AR-DAE")

Train = Callable[[ScoreEstimator, Target], float]
"""Trains an estimator on a target; returns its error."""


def error_against_time(
    axes: Axes, runs: Rows, target: str, *, reference: float, draws: int, colours: Mapping[str, str]
) -> Axes:
    """Draws the error of every estimator on a target: median over seeds, and their range.

    :param Axes axes: where to draw.
    :param Rows runs: the rows of all runs.
    :param str target: the target.
    :param float reference: error of the Gaussian with the exact moments, dotted.
    :param int draws: draws given with a query.
    :param Mapping[str, str] colours: colours of the estimators. What learns is a line with
        markers, what doesn't is dashed.
    """
    start, end = math.inf, 0.0
    constant: dict[str, float] = {}
    for name, colour in colours.items():
        seeds = [
            [(row["cpu_seconds"], row["error"]) for row in rows if row["draws"] == draws]
            for key, rows in runs.items()
            if key[:2] == (name, target)
        ]
        if not seeds:
            continue
        moments = list(zip(*seeds, strict=True))  # by moment, by seed: time and error
        middle = [statistics.median(error for _, error in moment) for moment in moments]
        if len(moments) == 1:
            constant[name] = middle[0]
            continue
        times = [statistics.median(seconds for seconds, _ in moment) for moment in moments]
        start, end = min(start, times[0]), max(end, times[-1])
        low, high = ([f(error for _, error in m) for m in moments] for f in (min, max))
        axes.plot(times, middle, marker="o", markersize=3, color=colour, label=name)
        axes.fill_between(times, low, high, color=colour, alpha=0.2, linewidth=0)
    ends = (start, end) if end else (0.1, 1.0)
    for name, error in constant.items():
        axes.plot(ends, (error, error), "--", color=colours[name], label=name)
    axes.plot(ends, (reference, reference), ":", color="0.4", label=EXACT)
    axes.set(xscale="log", yscale="log", title=target, xlabel="CPU seconds of updates")
    axes.set(ylabel="relative error")
    # A decade and a half at least; and not below what matters, where an exact answer's rounding
    # errors are.
    axes.set_ylim(min(0.1, max(1e-4, axes.get_ylim()[0])), TOP)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    return axes


def errors_figure(runs: Rows, reference: Mapping[str, float], draws: int) -> Figure:
    """A panel for each target: error against time."""
    names = list(dict.fromkeys(key[0] for key in runs))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    columns = min(4, len(reference))
    rows = -(-len(reference) // columns)
    width = 13.6 / columns  # legend and title take the same room whatever the number of panels
    figure, axes = plots.subplots(rows, columns, width=width, height=min(4.5, 0.82 * width))
    for one, (target, error) in zip(axes, reference.items(), strict=False):
        error_against_time(one, runs, target, reference=error, draws=draws, colours=colours)
    for one in axes[len(reference) :]:
        one.remove()
    shown: dict[str, Any] = {}
    for one in axes[: len(reference)]:
        handles, texts = one.get_legend_handles_labels()
        shown |= dict(zip(texts, handles, strict=True))
    figure.legend([*shown.values()], [*shown], loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"Error with {draws} draws per query: median over seeds and range. "
        f"Errors above {TOP:g} are off the scale."
    )
    return figure


def field(
    axes: Axes,
    points: Tensor,
    vectors: Tensor,
    *,
    title: str,
    unit: float,
    log_density: Tensor,
    limit: float,
) -> Axes:
    """Draws a field over the contours of a density.

    :param Axes axes: where to draw.
    :param Tensor points: ``[n, 2]``, of a square grid.
    :param Tensor vectors: ``[n, 2]``.
    :param str title: title.
    :param float unit: length (in grid cells) and colour are ``norm / (norm + unit)``.
    :param Tensor log_density: ``[m, m]`` on the square (row: y), contours at 1/2, 1/10, 1/100 of
        its maximum.
    :param float limit: the axes run over ``[-limit, limit]``.
    """
    values = (log_density - log_density.max()).exp().numpy()
    axis = np.linspace(-limit, limit, len(values))
    greys = ["0.94", "0.86", "0.76"]
    axes.contourf(axis, axis, values, levels=[0.01, 0.1, 0.5, 1.0], colors=greys)
    norm = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    length = norm / (norm + unit)
    axes.quiver(
        *points.numpy().T,
        *(vectors / norm * length).numpy().T,
        length.squeeze(-1).numpy(),
        cmap="viridis_r",
        clim=(0, 1),
        angles="xy",
        scale_units="xy",
        scale=math.sqrt(len(points)) / (2 * limit),
        width=0.004,
    )
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return axes


def fields_figure(train: Train) -> Figure:
    """Exact and learned fields: the ring, and the swiss roll without and with noise.

    One AR-DAE for each target. That of the swiss roll is trained on levels up to 1, so that one
    network gives the rows of sigma = 0 and of sigma = 1.
    """
    figure, axes = plots.subplots(3, 2, width=4.5, height=4.5)
    pairs = iter(zip(axes[::2], axes[1::2], strict=True))
    for name, limit, delta, levels in (
        ("ring", 3.5, 0.2, (0.0,)),
        ("swissroll", 6.0, 1.0, (0.0, 1.0)),
    ):
        target = TARGETS[name]()
        assert isinstance(target, GaussianMixture)
        estimator = ARDAE(2, delta=delta)
        train(estimator, target)
        points = _square(ARROWS, limit)
        none = points.new_zeros(1, 0)
        for sigma in levels:
            smoothed = target.smoothed(sigma)
            exact = smoothed.score(points, none)[:, 0]
            learned = estimator.smoothed(points, points, sigma=sigma)[:, 0]
            log_density = smoothed.log_prob(_square(100, limit), none).view(100, 100)
            draws = smoothed.sample(2000, none)
            unit = float(smoothed.score(draws, none).square().sum(-1).mean().sqrt())
            for one, vectors, kind in zip(next(pairs), (exact, learned), KINDS, strict=True):
                field(
                    one,
                    points[:, 0],
                    vectors,
                    title=f"{name}, sigma = {sigma:g}: {kind}",
                    unit=unit,
                    log_density=log_density,
                    limit=limit,
                )
    figure.suptitle(
        "Scores; half a cell is their root mean square.\n"
        "Grey: the density at 1/2, 1/10, 1/100 of its maximum"
    )
    return figure


def error_against_sigma(
    axes: Axes, sigmas: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> Axes:
    """Draws errors against the noise level of training.

    :param Axes axes: where to draw.
    :param Sequence[float] sigmas: noise levels.
    :param Mapping[str, Sequence[float]] curves: an error for each of them, by name.
    """
    for name, errors in curves.items():
        exact = name.startswith("exact")
        style = {"color": "0.4", "linestyle": ":"} if exact else {"marker": "o", "markersize": 4}
        axes.plot(sigmas, errors, label=name, **style)
    axes.set(xlabel="sigma (AR-DAE: the largest), in standard deviations")
    axes.set(xscale="log", yscale="log", ylabel="relative error of the score")
    axes.set_ylim(bottom=1e-4)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes


def levels_figure(train: Train) -> Figure:
    """The paper's approximation error: a mixture on the line, against the noise level.

    The regular auto-encoders estimate the score of the smoothed target, whose error is the dotted
    line, with a network's error on top, which the one that is not residual divides by sigma
    squared. AR-DAE learns on sigma up to this one, and is queried at sigma = 0.
    """
    figure, (axes,) = plots.subplots(1, 1, width=6, height=4.5)
    target = TARGETS["mixture1"]()
    assert isinstance(target, GaussianMixture)
    curves: dict[str, list[float]] = {}
    for sigma in LEVELS:
        estimators = {
            "DAE": DAE(1, sigma=sigma),
            "residual DAE": DAE(1, sigma=sigma, residual=True),
            "AR-DAE": ARDAE(1, delta=sigma),
        }
        for name, estimator in estimators.items():
            curves.setdefault(name, []).append(train(estimator, target))
    none = torch.zeros(1, 0)
    value = target.sample(100_000, none, generator=torch.Generator().manual_seed(0))
    curves["exact score of the smoothed target"] = [
        float(target.relative_error(target.smoothed(sigma).score(value, none), value, none))
        for sigma in LEVELS
    ]
    error_against_sigma(axes, LEVELS, curves)
    axes.set_title("Approximation error, mixture of two Gaussians on the line")
    return figure


def _square(size: int, limit: float) -> Tensor:
    """``[size * size, 1, 2]``, row by row from below."""
    axis = torch.linspace(-limit, limit, size)
    return torch.cartesian_prod(axis, axis)[:, [1, 0]].unsqueeze(1)
