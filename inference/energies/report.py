# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What :mod:`inference.energy` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from inference.energies.presets import Config
from inference.shared import grid, plots
from models.energies import ENERGIES

__all__ = ["draw", "table"]


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
    figure, panels = plots.subplots(1, 1 + len(histograms), width=3.6, height=3.9)
    shown = [(f"density, {config.energy}", density), *histograms]
    top = float(density.max())
    for axes, (title, mass) in zip(panels, shown, strict=True):
        plots.heat_map(axes, mass / mass.sum(), title=title, extent=grid.LIMIT, limit=7.5, top=top)
    return figure
