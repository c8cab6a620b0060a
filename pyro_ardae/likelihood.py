# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""The log-marginal likelihood :math:`\log p(x)` of a Pyro model, with any guide."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ardae.evaluate import fitted_gaussian_log_weights
from pyro_ardae.pareto import PARETO_K_LIMIT, pareto_k
from pyro_ardae.traces import guide_draws
from pyro_ardae.unconstrained import UnconstrainedModel

__all__ = ["LogLikelihood", "log_likelihood"]


@dataclass(frozen=True)
class LogLikelihood:
    r"""Estimates of :math:`\log p(x)`, one for each element of the batch of plates."""

    value: Tensor
    """The estimates, nats, ``[*plates]``."""
    error: Tensor
    """Standard errors, nats: the relative standard error of the mean weight. Not to be trusted
    where ``pareto_k`` is above 0.7."""
    pareto_k: Tensor
    r""":math:`\hat k` of the weights; :func:`~pyro_ardae.pareto.pareto_k`."""
    ess: Tensor
    """Effective sample size, the squared sum of the weights over the sum of their squares."""
    plates: tuple[str, ...]
    """Names of the plates that are the batch; empty where the data have one likelihood in all."""
    num_samples: int
    """Importance samples per element."""

    def __str__(self) -> str:
        worst = float(self.pareto_k.max())
        value, count = self.value.double(), self.value.numel()
        of, error = "all data", float(self.error.max())
        if self.plates:
            of = f"mean of {count} points"
        if count > 1:
            of, error = f"{of} and its standard error", float(value.std()) / math.sqrt(count)
        return (
            f"log p(x) {float(value.mean()):.3f} ± {error:.3f} nats ({of}, {self.num_samples} "
            f"samples, largest Pareto k {worst:.2f})"
        )


def log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 2000,
    num_guide_samples: int | None = None,
    parallel: bool = True,
    chunk_size: int = 100,
) -> LogLikelihood:
    r"""Estimates :math:`\log p(x)` of a model by importance sampling.

    .. math:: \log \frac1K \sum_{k=1}^K
        \frac{p(x, z(u_k))\, |\det \partial z / \partial u|}{r(u_k)},
        \qquad u_k \sim r = N(\hat m, \hat C),

    where r is fitted to draws of the guide in unconstrained space. The guide need not have a
    density. If all sites of the model lie in the same plates, every data point has a fit and a
    likelihood of its own; otherwise all latents together have one.

    The estimate is unbiased for :math:`p(x)`, so its logarithm is too low in expectation, by half
    of the squared ``error`` to first order. It says nothing of modes that the guide has missed: a
    region without samples has no weight in the sum, nor in :math:`\hat k`. Scales (KL annealing,
    subsampling) are left out.

    .. note:: A posterior whose tail on the reals falls exponentially, like that of the logarithm of
        a variance near 0, is heavier there than any Gaussian: :math:`\hat k` is then above 0.7
        also where ``ess`` is close to ``num_samples`` and the estimate good.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> estimate = log_likelihood(model, AutoNormal(model, init_scale=0.7), torch.zeros(3))
        >>> bool((estimate.value + 1.2655).abs().max() < 0.05)  # x ~ N(0, 2)
        True

    :param callable model: a Pyro model with continuous latents.
    :param callable guide: a guide of it, of any kind.
    :param args: arguments of both; keyword arguments by ``functools.partial``.
    :param int num_samples: importance samples K, at least 25. The bound tightens as K grows: state
        it beside every figure.
    :param int num_guide_samples: draws of the guide that the Gaussian is fitted to, at least twice
        the number D of latent dimensions; by default ``max(1000, 20 D)``.
    :param bool parallel: run guide and model once for many draws, in one more plate; set ``False``
        where one of them does not broadcast: it takes as long as the runs that it makes.
    :param int chunk_size: samples for which the model is evaluated at once: bounds the memory.
    :returns: estimates and what they are worth.
    :raises ValueError: for a discrete latent site, a subsampled plate, a guide that leaves out a
        site or gives non-finite draws, or a number out of its range.
    :raises RuntimeError: where model or guide fail in one more plate, with the advice to take
        ``parallel=False``.
    :warns UserWarning: where a Pareto :math:`\hat k` is above 0.7 or not a number.

    Reference: J. H. Lim, A. Courville, C. Pal, C.-W. Huang, "AR-DAE: Towards Unbiased Neural
    Entropy Gradient Estimation", ICML 2020, arXiv:2006.05164, on evaluation.
    """
    if num_samples < 25:
        raise ValueError(f"num_samples: expected at least 25, got {num_samples}")
    joint = UnconstrainedModel(model, *args, guide=guide, parallel=parallel)
    if num_guide_samples is None:
        num_guide_samples = max(1000, 20 * joint.dim)
    draws = guide_draws(
        guide, joint.sites, args, num_guide_samples, joint.max_plate_nesting, parallel=parallel
    )
    latent = joint.pack(joint.redraw_masked(draws)).reshape(num_guide_samples, -1, joint.dim)

    def log_joint(z: Tensor) -> Tensor:
        value = joint.log_joint(z.reshape(len(z), *joint.batch_shape, joint.dim))
        return value.reshape(len(z), -1)

    chunks = fitted_gaussian_log_weights(log_joint, latent, num_samples, chunk_size=chunk_size)
    log_weights = torch.cat(list(chunks)).double()
    log_mean = log_weights.logsumexp(0) - math.log(num_samples)
    log_ess = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)
    # Var(w) / (K mean^2) = 1 / ESS - 1 / K.
    error = ((-log_ess).exp() - 1 / num_samples).clamp_min(0).sqrt()
    khat = pareto_k(log_weights)
    bad = ~(khat <= PARETO_K_LIMIT)
    if bad.any():
        warnings.warn(
            f"log_likelihood: Pareto k above {PARETO_K_LIMIT} for {int(bad.sum())} of "
            f"{bad.numel()} (largest {float(khat.max()):.2f}): the weights' tail is too heavy for "
            "the estimate and its error to be trusted; it tends to be too low. Train the guide "
            "longer, or use one that covers the posterior's tails.",
            stacklevel=2,
        )

    def shaped(value: Tensor) -> Tensor:
        dtype = torch.promote_types(latent.dtype, torch.float32)
        return value.reshape(joint.batch_shape).to(dtype)

    return LogLikelihood(
        value=shaped(log_mean),
        error=shaped(error),
        pareto_k=shaped(khat),
        ess=shaped(log_ess.exp()),
        plates=joint.plates,
        num_samples=num_samples,
    )
