# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of trained autoencoders: the 25 Gaussians with their posteriors, images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inference.shared.plots import images, mass_levels, scatter, subplots
from inference.shared.precision import full_precision
from models.vae import VAE

__all__ = ["mnist_figure", "point_posterior", "toy_comparison", "toy_figure"]

_NUM_POINTS = 4000

#: Half of the width of the square that holds all posteriors of the plane; cells along a side.
_LIMIT, _CELLS = 5.0, 240


@torch.no_grad()
def point_posterior(axes: Axes, vae: VAE, x: Tensor, *, colour: str, num_draws: int = 800) -> Axes:
    """Draws the guide's samples of a point over its exact posterior, by quadrature: shades hold 50,
    90 and 99 % of its mass.

    :param Axes axes: where to draw; the square around those 99 % is shown.
    :param VAE vae: a model with two latents.
    :param Tensor x: the point, ``[1, X]``.
    """
    low, high = torch.full((2,), -_LIMIT), torch.full((2,), _LIMIT)
    for _ in range(2):  # the whole plane, then what holds the mass
        sides = [torch.linspace(float(a), float(b), _CELLS) for a, b in zip(low, high, strict=True)]
        grid = torch.cartesian_prod(*sides).to(x).unsqueeze(1)
        masses = (vae.log_joint(x, grid).flatten()).softmax(0).cpu()
        inside = grid[masses >= mass_levels(masses)[0], 0].cpu()
        low, high = inside.amin(0), inside.amax(0)
        middle, half = (low + high) / 2, 0.6 * float((high - low).max())
        low, high = middle - half, middle + half
    levels = [*mass_levels(masses), float(masses.max())]
    values = masses.view(_CELLS, _CELLS).mT.numpy()
    x_side, y_side = (side.numpy() for side in sides)
    axes.contourf(x_side, y_side, values, levels=levels, colors=["0.9", "0.75", "0.55"])
    draws = vae.posterior(x).sample(torch.Size((num_draws,)))[:, 0].cpu().numpy()
    axes.scatter(*draws.T, s=3, alpha=0.6, linewidths=0, color=colour)
    axes.set(xlim=(x_side[0], x_side[-1]), ylim=(y_side[0], y_side[-1]), aspect="equal")
    axes.tick_params(labelsize=7)
    return axes


@torch.no_grad()
def toy_figure(vae: VAE, x: Tensor) -> Figure:
    """Data, reconstruction, samples, aggregate posterior; below, the posteriors of four points."""
    x = x[:_NUM_POINTS]
    figure, axes = subplots(2, 4, width=3.4, height=3.4)
    scatter(axes[0], x, title="data", limit=5.5)
    with full_precision(vae):  # bf16 puts draws on a grid
        latent = vae.posterior(x).sample()
        scatter(axes[1], vae.decoder(latent).sample(), title="reconstruction", limit=5.5)
        scatter(axes[2], vae.draw(len(x), x), title="samples of the model", limit=5.5)
        scatter(axes[3], latent, title="aggregate posterior", limit=4, colour="C7")
        _points(axes[4:], vae, x)
    return figure


@torch.no_grad()
def toy_comparison(vaes: Sequence[tuple[str, VAE]], x: Tensor) -> Figure:
    """One row a guide: samples of its model, then the posteriors of four points."""
    x = x[:_NUM_POINTS]
    figure, axes = subplots(len(vaes), 5, width=2.9, height=3.0)
    for row, (name, vae) in enumerate(vaes):
        first, *others = axes[5 * row : 5 * row + 5]
        with full_precision(vae):
            draws = vae.draw(len(x), x)
            scatter(first, draws, title=f"{name} guide: samples of the model", limit=5.5)
            _points(others, vae, x)
        first.title.set_fontsize(9)
    return figure


def _points(axes: Sequence[Axes], vae: VAE, x: Tensor) -> None:
    for index, (panel, point) in enumerate(zip(axes, x[: len(axes)].split(1), strict=True)):
        point_posterior(panel, vae, point, colour=f"C{index}")
        panel.set_title(f"point {index + 1}: guide over exact posterior", fontsize=8)


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
