# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Pair plots of guides over the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from inference.posteriors.reference import Reference
from models.posterior_guides import GUIDES
from models.posteriors import Posterior

__all__ = ["pair", "pairs"]

_NUM_POINTS = 1500


def pair(axes: Axes, reference: Tensor, draws: Tensor, names: Sequence[str]) -> Axes:
    """Draws of a guide over those of the posterior, in two coordinates.

    :param Axes axes: where to draw.
    :param Tensor reference: draws of the posterior, ``[n, 2]``.
    :param Tensor draws: draws of a guide, ``[m, 2]``.
    :param names: names of the coordinates.
    """
    style = {"s": 3, "linewidths": 0}
    axes.scatter(*reference[:: max(1, len(reference) // _NUM_POINTS)].T, color="0.7", **style)
    axes.scatter(*draws[:_NUM_POINTS].T, color="C3", alpha=0.4, **style)
    low, high = torch.quantile(reference, torch.tensor([0.002, 0.998]).to(reference), dim=0)
    margin = 0.25 * (high - low)
    for which, i in (("x", 0), ("y", 1)):
        limits = (float(low[i] - margin[i]), float(high[i] + margin[i]))
        axes.set(**{f"{which}lim": limits, f"{which}label": names[i]})
    return axes


def _seed(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def pairs(name: str, reference: Reference, posterior: Posterior, folder: Path) -> Figure:
    """One row for each guide with draws in the folder (its first seed), one column for each pair.

    :param str name: name of the posterior, as in the names of the files.
    :param Reference reference: its draws.
    :param Posterior posterior: names the coordinates that are shown.
    :param Path folder: folder of ``POSTERIOR-GUIDE-SEED.npz``.
    """
    shown = list(combinations(posterior.shown[:3], 2))
    found = ((guide, folder.glob(f"{name}-{guide}-*.npz")) for guide in GUIDES)
    files = [(guide, sorted(paths, key=_seed)) for guide, paths in found]
    present = [(guide, paths[0]) for guide, paths in files if paths]
    figure = Figure(figsize=(3 * max(1, len(present)), 2.8 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    if not present:
        return figure
    axes = figure.subplots(len(shown), len(present), squeeze=False)
    against = reference.draws.flatten(0, 1)
    for column, (guide, path) in enumerate(present):
        with np.load(path, allow_pickle=False) as file:
            draws = torch.as_tensor(file["draws"]).double()
        for row, names in enumerate(shown):
            at = [reference.labels.index(one) for one in names]
            pair(axes[row, column], against[:, at], draws[:, at], names)
        axes[0, column].set_title(f"{guide} (red), reference (grey)", fontsize="small")
    return figure
