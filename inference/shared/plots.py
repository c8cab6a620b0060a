# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of the programs: each takes and returns matplotlib Axes, or saves a figure of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from inference.shared.errors import UserError
from inference.shared.files import replacing

__all__ = [
    "heat_map",
    "images",
    "mass_levels",
    "save",
    "scatter",
    "subplots",
]


def scatter(axes: Axes, points: Tensor, *, title: str, limit: float, colour: str = "C0") -> Axes:
    """Draws points of the plane.

    :param Axes axes: where to draw.
    :param Tensor points: ``[n, 2]``.
    :param str title: title.
    :param float limit: the axes run over ``[-limit, limit]``.
    :param str colour: matplotlib colour.
    """
    axes.scatter(*points.cpu().numpy().T, s=2, alpha=0.4, linewidths=0, color=colour)
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return axes


def mass_levels(masses: Tensor, shares: Sequence[float] = (0.99, 0.9, 0.5)) -> list[float]:
    """Levels whose contours enclose these shares of the mass of a grid, largest share first.

    :param Tensor masses: non-negative, of any shape.
    """
    ordered = masses.flatten().sort(descending=True).values
    enclosed = ordered.cumsum(0) / ordered.sum()
    return [float(ordered[int((enclosed < share).sum())]) for share in shares]


def heat_map(
    axes: Axes, masses: Tensor, *, title: str, extent: float, limit: float, top: float
) -> Axes:
    """Draws the masses of the cells of a square grid ``[n, n]`` (row: x, column: y) as colours.

    :param Axes axes: where to draw.
    :param Tensor masses: non-negative.
    :param str title: title.
    :param float extent: the grid covers ``[-extent, extent]^2``, ...
    :param float limit: ... of which ``[-limit, limit]^2`` is shown.
    :param float top: mass that gets the darkest colour.
    """
    corners = (-extent, extent, -extent, extent)
    values = masses.mT.cpu().numpy()
    axes.imshow(values, origin="lower", extent=corners, cmap="magma_r", vmin=0, vmax=top)
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return axes


def images(axes: Axes, pixels: Tensor, *, title: str, columns: int = 10) -> Axes:
    """Draws images ``[n, 784]`` in ``[0, 1]`` as a mosaic, row by row; missing pixels are blue."""
    rows = len(pixels) // columns
    mosaic = pixels[: rows * columns].reshape(rows, columns, 28, 28).permute(0, 2, 1, 3)
    mosaic = mosaic.reshape(rows * 28, columns * 28)
    axes.set_facecolor("lightsteelblue")  # what shows through where a pixel is NaN
    axes.imshow(mosaic.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure and returns the path.

    :raises UserError: if it cannot be written.
    """
    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110)
    except ValueError as error:
        raise UserError(f"{path}: expected a writable file for a figure, found: {error}") from None
    return path


def subplots(
    rows: int, columns: int, *, width: float = 4.0, height: float = 4.0
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; each is so many inches wide and high."""
    # Without pyplot: no global state, no display needed.
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns)))
