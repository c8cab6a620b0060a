# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Pareto :math:`\hat k`: whether an importance-sampling estimate can be trusted."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = ["PARETO_K_LIMIT", "pareto_k"]

PARETO_K_LIMIT = 0.7
"""Above it no practicable number of samples makes the estimate reliable (Vehtari et al. 2024)."""


def pareto_k(log_weights: Float[Tensor, "samples *batch"]) -> Float[Tensor, "*batch"]:
    r"""The shape :math:`\hat k` of a generalized Pareto law fitted to the largest weights.

    The weights have finite moments up to the order :math:`1 / k`: a mean below 1, a variance below
    1/2. The tail are the largest :math:`\min(S / 5, 3 \sqrt S)` of the S weights.

    :param Tensor log_weights: logarithms of importance weights, ``[S, *batch]``, S >= 25; minus
        infinity for a weight of 0.
    :returns: :math:`\hat k`, ``[*batch]``, float64; minus infinity where the tail is constant, as
        for a proposal that equals the target, and nan where a weight is nan.
    :raises ValueError: for fewer than 25 weights, whose tail has fewer than 5.

    Reference: A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto smoothed importance
    sampling", JMLR 25 (2024), arXiv:1507.02646; the fit is that of Zhang and Stephens (2009) with
    their prior for short tails, as in :func:`pyro.ops.stats.fit_generalized_pareto`.
    """
    count = len(log_weights)
    if count < 25:
        raise ValueError(f"log_weights: expected at least 25 per batch element, got {count}")
    tail = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    rows = log_weights.detach().double().reshape(count, -1)
    largest = rows.topk(tail + 1, dim=0).values.cpu()  # nan counts as the largest
    columns = zip(largest.unbind(1), rows.logsumexp(0).cpu().unbind(), strict=True)
    with torch.device("cpu"):  # whatever the default: the fit builds a grid
        result = torch.tensor([_fit(*column) for column in columns], dtype=torch.double)
    return result.to(rows.device).reshape(log_weights.shape[1:])


def _fit(largest: Tensor, total: Tensor) -> float:
    """From the logs of the largest weights in descending order, the last of which is the threshold,
    and of the sum of all weights.
    """
    if bool(largest.isnan().any()) or float(largest[0]) == -math.inf:
        return math.nan
    if float(largest[0] - largest[-1]) <= 1e-12:  # rounding of a constant is no tail
        return -math.inf
    weights = (largest - largest[0]).exp()
    exceedances = weights[:-1] - weights[-1]
    exceedances = exceedances[exceedances > 1e-12]
    # The fit needs five, with a positive first quartile. Fewer are left of a constant with a few
    # larger weights, which matter or not, or where one weight outdoes all others by more than
    # rounding shows.
    if len(exceedances) < 5:
        share = float(exceedances.sum() * (largest[0] - total).exp())
        return math.inf if share > 0.01 else -math.inf
    return float(fit_generalized_pareto(exceedances)[0])
