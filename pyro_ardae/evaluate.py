# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Estimates of the log-marginal likelihood :math:`\log p(x)` by importance sampling.

A guide without a density cannot be its own proposal, so a Gaussian is fitted to its samples. All
estimates are lower bounds in expectation that tighten as the number of samples grows; state that
number beside every figure, and compare guides at the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

__all__ = [
    "elbo",
    "fit_gaussian",
    "fitted_gaussian_log_marginal",
    "fitted_gaussian_log_weights",
    "log_marginal_from_guide",
]

LogJoint = Callable[[Tensor], Tensor]


@torch.no_grad()
def fitted_gaussian_log_marginal(
    log_joint: LogJoint,
    guide_samples: Float[Tensor, "guide_samples batch dim"],
    num_samples: int,
    *,
    prior_weight: float = 0.0,
    jitter: float = 1e-6,
    chunk_size: int = 64,
) -> Float[Tensor, " batch"]:
    r"""Estimates :math:`\log p(x)` per data point with a Gaussian fitted to guide samples.

    .. math:: \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{r(z_k)}, \qquad
        r = (1 - w)\, N(\hat m, \hat C) + w\, N(0, I),

    with mean and full covariance estimated per data point from ``guide_samples``. The estimate is
    unbiased for :math:`p(x)`, so its logarithm is a lower bound in expectation, whatever the guide.

    With a posterior of several separated modes, or a guide that missed one, the Gaussian alone
    makes the estimate erratic or far too low: set ``prior_weight`` then, e.g. to 0.5. It mixes in
    the prior (defensive importance sampling), which must be the standard normal for that, and
    bounds the weights by :math:`p(x \mid z) / w`. Draws are allotted to the two components in
    proportion, not at random.

    .. note:: The fit needs some 10 times as many guide samples as dimensions to be a good proposal
        (512 for 32 latents in the project's figures). On binarized MNIST, 32 latents, it lies 0.9
        nats below annealed importance sampling with 1000 samples and 0.6 with 5000.

    Example::

        >>> import torch
        >>> from torch.distributions import Normal
        >>> x = torch.zeros(3, 2)  # z ~ N(0, I), x ~ N(z, I), so x ~ N(0, 2 I)
        >>> def log_joint(z):
        ...     return (Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)).sum(-1)
        >>> z = torch.randn(4000, 3, 2) * 0.5**0.5
        >>> estimate = fitted_gaussian_log_marginal(log_joint, z, 500)
        >>> bool((estimate + 2.5310).abs().max() < 0.05)
        True

    :param log_joint: maps latents ``[S, B, D]`` to ``log p(x, z)`` ``[S, B]`` in nats, for the
        ``B`` data points it closes over.
    :param Tensor guide_samples: draws of the guide, ``[S0, B, D]``; ``S0 >= 2 * D``.
    :param int num_samples: number ``K`` of importance samples, at least 1.
    :param float prior_weight: weight ``w`` of the prior in the proposal, in ``[0, 1)``.
    :param float jitter: added to the diagonal of the covariance, relative to it; keeps it
        positive definite for a guide that has collapsed in a direction.
    :param int chunk_size: samples for which ``log_joint`` is evaluated at once: bounds the memory.
    :returns: estimates in nats, ``[B]``.
    :raises ValueError: for too few guide samples, a wrong shape, non-finite samples, or an
        argument out of its range.

    **References**

    [1] J. H. Lim, A. Courville, C. Pal, C.-W. Huang, "AR-DAE: Towards Unbiased Neural Entropy
    Gradient Estimation", ICML 2020, arXiv:2006.05164, section on evaluation.

    [2] A. Owen, Y. Zhou, "Safe and effective importance sampling", JASA 2000.
    """
    weights = fitted_gaussian_log_weights(
        log_joint,
        guide_samples,
        num_samples,
        prior_weight=prior_weight,
        jitter=jitter,
        chunk_size=chunk_size,
    )
    return _log_sum(weights) - math.log(num_samples)


def fit_gaussian(
    samples: Float[Tensor, "samples batch dim"], *, jitter: float = 1e-6
) -> MultivariateNormal:
    """The Gaussian with the moments of draws, separately for each data point.

    :param Tensor samples: draws, ``[S, B, D]``; more than ``D`` for a covariance of full rank.
    :param float jitter: as in :func:`fitted_gaussian_log_marginal`.
    :returns: batch shape ``[B]``, event shape ``[D]``.
    """
    # Moments in float64: the covariance of a thin posterior loses its smallest eigenvalues else.
    wide = samples.double()
    loc = wide.mean(0)
    centred = wide - loc
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / (len(samples) - 1)
    # The jitter is relative to each latent's own width: their scales may differ by any factor.
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt().unsqueeze(-1)
    identity = torch.eye(samples.shape[-1], dtype=wide.dtype, device=wide.device)
    correlation = covariance / (scale * scale.mT)
    scale_tril = scale * torch.linalg.cholesky(correlation + jitter * identity)
    return MultivariateNormal(
        loc.to(samples), scale_tril=scale_tril.to(samples), validate_args=False
    )


def fitted_gaussian_log_weights(
    log_joint: LogJoint,
    guide_samples: Float[Tensor, "guide_samples batch dim"],
    num_samples: int,
    *,
    prior_weight: float = 0.0,
    jitter: float = 1e-6,
    chunk_size: int = 64,
) -> Iterator[Float[Tensor, "chunk batch"]]:
    r"""The logarithms of the weights of :func:`fitted_gaussian_log_marginal`, chunk by chunk.

    Parameters and errors are the same.

    :returns: an iterator over :math:`\log p(x, z_k) - \log r(z_k)`, ``[chunk, B]``,
        ``num_samples`` in all.
    """
    if guide_samples.dim() != 3:
        raise ValueError(
            f"guide_samples: expected shape [samples, batch, dim], got {tuple(guide_samples.shape)}"
        )
    num_guide_samples, batch, dim = guide_samples.shape
    if num_guide_samples < 2 * dim:
        raise ValueError(
            f"guide_samples: expected at least 2 * dim = {2 * dim} draws per data point to fit a "
            f"full covariance, got {num_guide_samples}; draw more from the guide"
        )
    if not bool(guide_samples.isfinite().all()):
        raise ValueError("guide_samples: expected finite draws, got inf or nan")
    if not 0.0 <= prior_weight < 1.0:
        raise ValueError(f"prior_weight: expected a value in [0, 1), got {prior_weight}")
    _check_counts(num_samples, chunk_size)
    num_prior = round(prior_weight * num_samples)
    if num_prior == num_samples or (prior_weight > 0 and num_prior == 0):
        raise ValueError(
            f"num_samples: expected enough for both components of the proposal, got {num_samples} "
            f"with prior_weight {prior_weight}"
        )
    # The proposal is in single precision at least, also where the model is in half.
    wide = guide_samples.to(torch.promote_types(guide_samples.dtype, torch.float32))
    full_precision = partial(torch.autocast, wide.device.type, enabled=False)
    with full_precision():
        fitted = fit_gaussian(wide, jitter=jitter)
    identity = torch.eye(dim, dtype=wide.dtype, device=wide.device)
    prior = MultivariateNormal(
        identity.new_zeros(batch, dim), scale_tril=identity, validate_args=False
    )
    log_prior_share = math.log(num_prior / num_samples) if num_prior else -math.inf
    log_fitted_share = math.log1p(-num_prior / num_samples)

    def log_weight(component: MultivariateNormal, size: int) -> Tensor:
        with full_precision():
            latent = component.sample(torch.Size((size,))).to(guide_samples.dtype)
            at = latent.to(wide.dtype)
            log_proposal = fitted.log_prob(at)
            if num_prior:
                log_proposal = torch.logaddexp(
                    log_fitted_share + log_proposal, log_prior_share + prior.log_prob(at)
                )
        return log_joint(latent) - log_proposal

    # A generator of its own, so that errors come with the call and not with the first chunk.
    def weights() -> Iterator[Tensor]:
        for component, count in ((fitted, num_samples - num_prior), (prior, num_prior)):
            for size in _chunks(count, chunk_size):
                with torch.no_grad():
                    yield log_weight(component, size)

    return weights()


@torch.no_grad()
def log_marginal_from_guide(
    log_joint: LogJoint,
    posterior: Distribution,
    num_samples: int,
    *,
    chunk_size: int = 64,
) -> Float[Tensor, " batch"]:
    r"""Estimates :math:`\log p(x)` per data point with an explicit guide as its own proposal.

    .. math:: \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad
        z_k \sim q(\cdot \mid x).

    A lower bound in expectation; with ``num_samples = 1`` it is a one-sample ELBO.

    :param log_joint: as in :func:`fitted_gaussian_log_marginal`.
    :param Distribution posterior: the guide's distribution, batch shape ``[B]``, event shape
        ``[D]``, with a density.
    :param int num_samples: number ``K`` of importance samples, at least 1.
    :param int chunk_size: samples for which ``log_joint`` is evaluated at once.
    :returns: estimates in nats, ``[B]``.
    :raises ValueError: if a count is below 1.
    :raises NotImplementedError: if the posterior has no density.
    """
    weights = _log_weights(log_joint, posterior, num_samples, chunk_size)
    return _log_sum(weights) - math.log(num_samples)


@torch.no_grad()
def elbo(
    log_joint: LogJoint,
    posterior: Distribution,
    num_samples: int,
    *,
    chunk_size: int = 64,
) -> Float[Tensor, " batch"]:
    r"""Estimates the evidence lower bound per data point.

    .. math:: E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)]

    :param log_joint: as in :func:`fitted_gaussian_log_marginal`.
    :param Distribution posterior: an explicit guide's distribution, as in
        :func:`log_marginal_from_guide`.
    :param int num_samples: number of draws averaged over, at least 1.
    :param int chunk_size: samples for which ``log_joint`` is evaluated at once.
    :returns: unbiased estimates in nats, ``[B]``.
    :raises ValueError: if a count is below 1.
    :raises NotImplementedError: if the posterior has no density.
    """
    weights = _log_weights(log_joint, posterior, num_samples, chunk_size)
    return reduce(torch.add, (chunk.sum(0) for chunk in weights)) / num_samples


def _log_weights(
    log_joint: LogJoint, posterior: Distribution, num_samples: int, chunk_size: int
) -> Iterator[Tensor]:
    """Log of p(x, z) over q(z | x) for draws of the posterior, ``[chunk, B]`` at a time."""
    _check_counts(num_samples, chunk_size)
    for size in _chunks(num_samples, chunk_size):
        latent = posterior.sample(torch.Size((size,)))
        yield log_joint(latent) - posterior.log_prob(latent)


def _log_sum(chunks: Iterable[Tensor]) -> Tensor:
    """Log of the sum of exponentials over the first dimension of all chunks."""
    return reduce(torch.logaddexp, (chunk.logsumexp(0) for chunk in chunks))


def _check_counts(num_samples: int, chunk_size: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")


def _chunks(count: int, chunk_size: int) -> list[int]:
    full, rest = divmod(count, chunk_size)
    return [chunk_size] * full + ([rest] if rest else [])
