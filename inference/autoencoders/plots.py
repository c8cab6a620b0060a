# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of trained autoencoders: the 25 Gaussians with their posteriors, images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inference.autoencoders.plane_posterior import PlanePosterior, plane_posterior
from inference.shared.plots import images, mass_levels, scatter, subplots
from inference.shared.precision import full_precision
from models.vae import VAE

__all__ = ["image_figure", "point_posterior", "toy_comparison", "toy_figure"]

#: Images that are shown with their reconstructions at most, in five rows.
_SHOWN = 50

_NUM_POINTS = 4000

#: Draws of a posterior that are shown at most.
_DRAWS = 3000


def point_posterior(axes: Axes, one: PlanePosterior, *, colour: str) -> Axes:
    """Draws the guide's samples of a point over its exact posterior: shades hold 50, 90 and 99 % of
    its mass.
    """
    masses = one.log_masses.exp().cpu()
    levels = [*mass_levels(masses), float(masses.max())]
    centres = [axis.cpu().numpy() for axis in one.centres]
    axes.contourf(*centres, masses.mT.numpy(), levels=levels, colors=["0.9", "0.75", "0.55"])
    axes.scatter(*one.draws[:_DRAWS].cpu().numpy().T, s=3, alpha=0.6, linewidths=0, color=colour)
    (left, right), (bottom, top) = one.shown
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=5)
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
        one = plane_posterior(vae, point, num_draws=800)
        point_posterior(panel, one, colour=f"C{index}")
        panel.set_title(f"point {index + 1}: guide over exact posterior", fontsize=8)


@torch.no_grad()
def _traversals(
    axes: Axes, vae: VAE, x: Tensor, *, title: str, columns: int = 11, rows: int = 10
) -> Axes:
    """Draws what single latents of an image do: each row moves one over [-2.5, 2.5].

    The rows are the latents whose posterior means vary most over ``x``, the others those of the
    first image.
    """
    means = vae.posterior(x).sample(torch.Size((64,))).mean(0)
    # Of two levels, those that the decoder sees.
    order = means[:, : vae.latent_dim].var(0).argsort(descending=True)[:rows]
    latents = means[0].expand(len(order), columns, -1).clone()
    at = torch.linspace(-2.5, 2.5, columns, device=x.device)
    latents.scatter_(
        2, order.view(-1, 1, 1).expand(-1, columns, 1), at.view(1, -1, 1).expand(len(order), -1, 1)
    )
    return images(axes, vae.decoder(latents.flatten(0, 1)).mean, title=title, columns=columns)


@torch.no_grad()
def image_figure(vae: VAE, x: Tensor, *, name: str) -> Figure:
    """Images with their reconstructions below them, samples of the model, latent traversals."""
    figure, axes = subplots(1, 3, width=4.6, height=4.6)
    columns = min(10, len(x))
    shown = x[: min(_SHOWN, len(x)) // columns * columns]
    again = vae.decoder(vae.posterior(shown).sample()).mean
    both = torch.stack([part.unflatten(0, (-1, columns)) for part in (shown, again)], 1)
    title = f"{name}: images, reconstructions below"
    images(axes[0], both.flatten(0, 2), title=title, columns=columns)
    prior = vae.prior(x).sample(torch.Size((100,)))
    images(axes[1], vae.decoder(prior).mean, title="samples of the model")
    _traversals(axes[2], vae, x, title="one latent a row, from -2.5 to 2.5")
    return figure
