# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of the programs: each takes and returns matplotlib Axes, or saves a figure of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from inference.shared.errors import UserError
from models.vae import VAE

__all__ = [
    "density",
    "heat_map",
    "images",
    "mnist_figure",
    "save",
    "scatter",
    "subplots",
    "toy_comparison",
    "toy_figure",
]

_NUM_POINTS = 4000


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


def density(axes: Axes, log_density: Tensor, *, title: str, limit: float) -> Axes:
    """Draws contours of an unnormalized log-density on a square grid ``[n, n]`` (row: y, column: x)
    over ``[-limit, limit]``, and nothing below a thousandth of its maximum.
    """
    values = (log_density - log_density.max()).exp().cpu().numpy()
    axis = np.linspace(-limit, limit, len(values))
    axes.contour(axis, axis, values, levels=[0.001, 0.01, 0.1, 0.5], cmap="Greys", linewidths=1)
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return axes


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


@torch.no_grad()
def posterior_of_points(axes: Axes, vae: VAE, x: Tensor, *, title: str) -> Axes:
    """Draws guide samples of single data points over the contours of their exact posteriors."""
    limit, size = 3.5, 200
    axis = torch.linspace(-limit, limit, size)
    grid = torch.cartesian_prod(axis, axis)[:, [1, 0]].to(x).unsqueeze(1)
    for index, row in enumerate(x.split(1)):
        log_density = vae.log_joint(row, grid).reshape(size, size)
        density(axes, log_density, title="", limit=limit)
        points = vae.posterior(row).sample(torch.Size((400,)))[:, 0]
        scatter(axes, points, title=title, limit=limit, colour=f"C{index % 10}")
    return axes


@torch.no_grad()
def toy_figure(vae: VAE, x: Tensor) -> Figure:
    """Data, reconstruction, samples, aggregate posterior against the prior, single posteriors."""
    x = x[:_NUM_POINTS]
    figure, axes = subplots(2, 3)
    latent = vae.posterior(x).sample()
    prior = vae.prior(x).sample(torch.Size((len(x),)))
    scatter(axes[0], x, title="data", limit=5.5)
    scatter(axes[1], vae.decoder(latent).sample(), title="reconstruction", limit=5.5)
    scatter(axes[2], vae.decoder(prior).sample(), title="samples of the model", limit=5.5)
    scatter(axes[3], prior, title="prior", limit=4, colour="C7")
    scatter(axes[4], latent, title="aggregate posterior", limit=4, colour="C3")
    posterior_of_points(axes[5], vae, x[:4], title="guide of 4 points, exact contours")
    return figure


@torch.no_grad()
def toy_comparison(vaes: Sequence[tuple[str, VAE]], x: Tensor) -> Figure:
    """One row a guide: samples of the model, aggregate posterior, single posteriors."""
    x = x[:_NUM_POINTS]
    figure, axes = subplots(len(vaes), 3)
    for row, (name, vae) in enumerate(vaes):
        first, second, third = axes[3 * row : 3 * row + 3]
        scatter(first, vae.draw(len(x), x), title=f"{name}: samples", limit=5.5)
        latent = vae.posterior(x).sample()
        scatter(second, latent, title="aggregate posterior", limit=4, colour="C3")
        posterior_of_points(third, vae, x[:4], title="guide of 4 points, exact contours")
    return figure


@torch.no_grad()
def mnist_figure(vae: VAE, x: Tensor) -> Figure:
    """Data, reconstruction (pixel means) and samples (pixel means)."""
    x = x[:100]
    figure, axes = subplots(1, 3)
    prior = vae.prior(x).sample(torch.Size((100,)))
    images(axes[0], x, title="data")
    images(axes[1], vae.decoder(vae.posterior(x).sample()).mean, title="reconstruction")
    images(axes[2], vae.decoder(prior).mean, title="samples of the model")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure and returns the path.

    :raises UserError: if it cannot be written.
    """
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
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
