# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""The ELBO of a guide per data point, also where the guide has no density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_ardae.evaluate import fit_gaussian
from pyro_ardae.score import ARDAE

__all__ = ["EnergyFit", "fit_energy", "implicit_elbo"]

#: Data points and draws of each in an update of the energy network.
_BATCH, _DRAWS = 128, 16

#: Draws of every data point that the model sees at once, which bounds the memory.
_AT_ONCE = 64


def fit_energy(
    posterior_of: Callable[[Tensor], Distribution],
    features_of: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n X"],
    *,
    num_updates: int = 600,
) -> ARDAE:
    """Learns the guide's density at the data points with an energy network.

    :param posterior_of: the guide, data ``[B, X]`` to a distribution of batch shape ``[B]``.
    :param features_of: data to what the network is told of them, ``[B, C]``.
    :param Tensor x: the data points that the density is wanted at.
    :param int num_updates: updates, each of 128 data points with 16 draws.
    :returns: the estimator, for :func:`implicit_elbo`.
    """
    with torch.no_grad():
        features = features_of(x[:1])
        dim = posterior_of(x[:1]).sample().shape[-1]
    energy = ARDAE(
        dim, features.shape[-1], parametrization="energy", num_normalizer_samples=1024
    ).to(x)
    for _ in range(num_updates):
        chosen = x[torch.randint(len(x), (min(_BATCH, len(x)),), device=x.device)]
        with torch.no_grad():
            samples = posterior_of(chosen).sample(torch.Size((_DRAWS,)))
            context = features_of(chosen)
        energy.update(samples, context)
    return energy


@dataclass(frozen=True)
class EnergyFit:
    """ELBO estimates of an implicit guide, one for each data point, in nats."""

    energy: Float[Tensor, " B"]
    """With the entropy by the energy network."""
    gaussian: Float[Tensor, " B"]
    """With the entropy of the Gaussian of the same moments."""


@torch.no_grad()
def implicit_elbo(
    log_joint: Callable[[Tensor], Tensor],
    posterior: Distribution,
    context: Float[Tensor, "B C"],
    energy: ARDAE,
    *,
    num_samples: int = 64,
    guide_samples: int = 512,
) -> EnergyFit:
    r"""Estimates the ELBO of a guide without a density.

    .. math:: E_q[\log p(x, z) - \log \hat q(z)] = \mathrm{ELBO} + KL(q \,\|\, \hat q)

    for two :math:`\hat q`: the energy network of :func:`fit_energy`, and the Gaussian with the
    moments of ``guide_samples`` draws, other ones than those that are averaged over. **Both are too
    high**, by how much q differs from the fit; the lower one in the mean over data points is the
    nearer. What is derived from it, the posterior gap, is too small by the same. (The network's
    normalizing constant is estimated by 1,024 draws, whose logarithm is too low in expectation;
    this takes half of that estimate's relative variance off the former.)

    :param log_joint: latents ``[S, B, D]`` to ``log p(x, z)`` ``[S, B]``.
    :param Distribution posterior: the guide's distribution, batch shape ``[B]``.
    :param Tensor context: features of the data points.
    :param ARDAE energy: of :func:`fit_energy`.
    :param int num_samples: draws averaged over.
    :param int guide_samples: draws for the moments.
    :returns: the two estimates.
    """
    fitted = posterior.sample(torch.Size((guide_samples,)))
    z = posterior.sample(torch.Size((num_samples,)))
    joint = torch.cat([log_joint(part) for part in z.split(_AT_ONCE)]).mean(0)
    return EnergyFit(
        energy=joint - energy.log_prob(z, fitted, context).mean(0),
        gaussian=joint - fit_gaussian(fitted).log_prob(z).mean(0),
    )
