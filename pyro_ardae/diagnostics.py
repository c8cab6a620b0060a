# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Stein's identity at every implicit site: the check of a score by samples alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ardae.implicit import Implicit, find_implicit

__all__ = ["SteinCheck", "stein_check"]


@dataclass(frozen=True)
class SteinCheck:
    """Stein's identity at one implicit site."""

    stein: float
    r""":math:`-E[s(z)^\top (z - m)] / D`; 1 for the true score."""
    error: float
    """Its standard error."""
    worst_direction: float
    r"""Eigenvalue of the symmetric part of :math:`-E[s (z - m)^\top]` that is farthest from 1. For
    the true score of a Gaussian in many dimensions D it is off by about :math:`2 \sqrt{D / N}`, by
    less in few."""
    mean_score: float
    r"""Norm of the mean score, each component in units of its standard error; about
    :math:`\sqrt{D}` for the true score."""
    threshold: float
    """``abs(stein - 1)`` above which there was a warning."""
    num_samples: int
    """Draws N that the figures are means over."""

    @property
    def passed(self) -> bool:
        """Whether the identity holds up to the threshold."""
        return abs(self.stein - 1) <= self.threshold


def stein_check(
    loss: Any,
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4096,
    tolerance: float = 0.1,
    failure_rate: float = 1e-3,
) -> dict[str, SteinCheck]:
    r"""Checks the learned score of each implicit site on fresh draws of the guide.

    For every density that vanishes at infinity :math:`E_q[\nabla \log q(z)\, (z - m)^\top] = -I`
    (Stein's identity). The trace of it is tested: a warning is given where

    .. math:: |\widehat{\mathrm{stein}} - 1| > \text{tolerance} + k\, \widehat{\mathrm{s.e.}},

    with k the normal quantile for ``failure_rate`` over all sites. The standard error takes care of
    the number of draws, the tolerance of the fact that a learned score is never exact: 0.1 is a
    guide whose width is off by about 5 %, if it is so in all directions. One direction may be off
    by more, as D others make up for it: see ``worst_direction``. The identity is necessary, not
    sufficient.

    :param loss: a loss of this package that was trained on the guide.
    :param callable guide: the guide.
    :param args: its arguments; keyword arguments by ``functools.partial``.
    :param int num_samples: draws per site, over all contexts, at least 100.
    :param float tolerance: deviation that is let pass, >= 0.
    :param float failure_rate: rate of false warnings at a deviation of ``tolerance``, in (0, 1).
    :returns: the figures by site.
    :raises ValueError: for a number out of its range, or a loss that knows no site of the guide.
    :warns UserWarning: for every site where the identity fails.

    Reference: C. Stein, "Estimation of the mean of a multivariate normal distribution", Annals of
    Statistics 9 (1981); as a check of learned scores: J. Gorham, L. Mackey, NeurIPS 2015.
    """
    if num_samples < 100:
        raise ValueError(f"num_samples: expected at least 100, got {num_samples}")
    if tolerance < 0 or not 0 < failure_rate < 1:
        raise ValueError(
            f"expected tolerance >= 0 and failure_rate in (0, 1), got {tolerance}, {failure_rate}"
        )
    loss._restore(guide, args)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    # Several traces: what an upstream site drew is part of the context of the next.
    for _ in range(8):
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(guide).get_trace(*args)
            for name, site in trace.nodes.items():
                fn = find_implicit(site["fn"]) if site["type"] == "sample" else None
                if fn is not None and name in loss.estimators:
                    pair = _scored(fn.distinct(), loss, name, num_samples / 8)
                    rows.setdefault(name, []).append(pair)
    if not rows:
        raise ValueError(
            "expected a loss that was trained on this guide, got one without an estimator for any "
            "of its implicit sites: take a training step first"
        )
    k = NormalDist().inv_cdf(1 - failure_rate / len(rows) / 2)
    result = {name: _check(pairs, tolerance, k) for name, pairs in rows.items()}
    for name, check in result.items():
        if not check.passed:
            warnings.warn(
                f"implicit site '{name}': Stein's identity is off, {check.stein:.3f} ± "
                f"{check.error:.3f} where the true score has 1 (threshold {check.threshold:.3f}). "
                "The score does not follow the guide: lower the guide's learning rate, or raise "
                "num_score_updates or num_score_samples.",
                stacklevel=2,
            )
    return result


def _scored(fn: Implicit, loss: Any, name: str, num_samples: float) -> tuple[Tensor, Tensor]:
    """The score of fresh draws and the draws, centered: ``[n, dim]`` each, over all contexts."""
    site = loss._sites.met[name]
    contexts = max(1, fn.batch_shape.numel())
    count = math.ceil(num_samples / contexts)
    # As many draws for the whitening as in training, whose particles may have had more contexts.
    whiten = site.num_draws or loss._num_draws(contexts)

    draws, center = fn.flat_draws(count + whiten, center=site.estimator.needs_center)
    draws = draws.to(torch.promote_types(draws.dtype, torch.float32))
    site.follow(draws)
    value, samples = draws.split([count, whiten])
    score = site.score(value, samples, fn.context, center)
    centered = value - samples.mean(0)
    dim = site.estimator.dim
    return score.reshape(-1, dim).double(), centered.reshape(-1, dim).double()


def _check(pairs: list[tuple[Tensor, Tensor]], tolerance: float, k: float) -> SteinCheck:
    score = torch.cat([pair[0] for pair in pairs])
    centered = torch.cat([pair[1] for pair in pairs])
    count, dim = score.shape
    products = -(score * centered).sum(-1) / dim
    # Draws of one trace share what the guide drew before: then their means differ by more.
    means = torch.stack([part.mean() for part in products.split([len(s) for s, _ in pairs])])
    error = max(float(products.std()) / math.sqrt(count), float(means.std()) / len(pairs) ** 0.5)
    # Whitened on the left and right, so that the identity's eigenvalues have no units.
    scale = centered.std(0).clamp_min(1e-30)
    matrix = -(score * scale).mT @ (centered / scale) / count
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    worst = eigenvalues[(eigenvalues - 1).abs().argmax()]
    standardized = score.mean(0) / (score.std(0) / math.sqrt(count)).clamp_min(1e-30)
    return SteinCheck(
        stein=float(products.mean()),
        error=error,
        worst_direction=float(worst),
        mean_score=float(standardized.norm()),
        threshold=tolerance + k * error,
        num_samples=count,
    )
