# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A variational autoencoder whose guide has an auxiliary latent."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch import Tensor, nn

from models.chain import Chain
from models.hierarchical_guide import HierarchicalGuide, ReverseGuide
from models.vae import VAE, LogJoint, with_fantasies

__all__ = ["AuxiliaryVAE"]


class AuxiliaryVAE(VAE):
    r"""A hierarchical variational model: the joint guide against a model of the auxiliary latent.

    The guide is :math:`q(z_0 \mid x)\, q(z \mid z_0, x)`, and the model is extended by a density of
    :math:`z_0`, :math:`p(x, z)\, r(z_0 \mid z, x)`, which leaves its marginal p(x) as it is. The
    ELBO of the pair lies below that of the guide's marginal by the divergence of
    :math:`q(z_0 \mid z, x)` from r (Ranganath et al., "Hierarchical variational models", 2016;
    Maaløe et al., "Auxiliary deep generative models", 2016).

    :param nn.Module trunk: see :class:`~models.vae.VAE`.
    :param HierarchicalGuide head: the guide's head.
    :param nn.Module decoder: see :class:`~models.vae.VAE`.
    :param ReverseGuide reverse: r.
    :param int latent_dim: width of z.
    :param str name: see :class:`~models.vae.VAE`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: HierarchicalGuide,
        decoder: nn.Module,
        *,
        reverse: ReverseGuide,
        latent_dim: int,
        name: str = "vae",
    ) -> None:
        super().__init__(trunk, head, decoder, latent_dim=latent_dim, name=name)
        self.reverse = reverse

    def model(self, x: Tensor, beta: float = 1.0, fantasies: Tensor | None = None) -> None:
        """The Pyro model, with the auxiliary latent."""
        pyro.module(f"{self.name}.decoder", self.decoder)
        pyro.module(f"{self.name}.reverse", self.reverse)
        rows = self.rows(x, fantasies)
        with rows, poutine.scale(scale=beta):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("z0", self.reverse(with_fantasies(x, fantasies), z))
        self.observe(x, fantasies, z, rows)

    def guide(self, x: Tensor, beta: float = 1.0, fantasies: Tensor | None = None) -> None:
        """The Pyro guide, with the arguments of :meth:`model`."""
        pyro.module(f"{self.name}.trunk", self.trunk)
        pyro.module(f"{self.name}.head", self.head)
        features = self.trunk(with_fantasies(x, fantasies))
        with self.rows(x, fantasies), poutine.scale(scale=beta):
            auxiliary = pyro.sample("z0", self.head.mixing(features))
            pyro.sample("z", self.head.conditional(features, auxiliary))

    def explicit(self, x: Tensor) -> tuple[LogJoint, dist.TorchDistribution]:
        r"""The extended model and the guide, both over :math:`(z_0, z)`."""
        features = self.trunk(x)
        guide = Chain(
            self.head.mixing(features),
            partial(self.head.conditional, features),
            second_dim=self.latent_dim,
        )

        def log_joint(latents: Tensor) -> Tensor:
            auxiliary, z = latents.split([self.head.auxiliary_dim, self.latent_dim], -1)
            return self.log_joint(x, z) + self.reverse(x, z).log_prob(auxiliary)

        return log_joint, guide
