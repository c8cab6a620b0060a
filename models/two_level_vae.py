# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A variational autoencoder with two levels of latents."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from models.chain import Chain
from models.guides import GaussianGuide
from models.networks import MLP, ConditionalMLP
from models.vae import VAE, held_fixed, with_fantasies

__all__ = ["TwoLevelDecoder", "TwoLevelVAE"]


class TwoLevelDecoder(nn.Module):
    r"""The generative networks: :math:`p(z_1 \mid z_2)`, a Normal, and :math:`p(x \mid z_1)`.

    :param nn.Module decoder: :math:`z_1` to a distribution over the data.
    :param MLP prior_net: :math:`z_2` to features.
    :param int feature_dim: their width.
    :param int latent_dim: width of :math:`z_1`.
    """

    def __init__(
        self, decoder: nn.Module, prior_net: MLP, *, feature_dim: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.decoder, self.latent_dim = decoder, latent_dim
        #: :math:`p(z_1 \mid z_2)`, a function of :math:`z_2`.
        self.prior = nn.Sequential(prior_net, GaussianGuide(feature_dim, latent_dim))

    def forward(self, latents: Tensor) -> dist.TorchDistribution:
        r""":math:`p(x \mid z_1)` for latents :math:`(z_1, z_2)` or :math:`z_1` alone."""
        return self.decoder(latents[..., : self.latent_dim])


class TwoLevelVAE(VAE):
    r"""Two levels of latents, :math:`p(z_2)\, p(z_1 \mid z_2)\, p(x \mid z_1)`.

    The guide runs from below, :math:`q(z_1 \mid x)\, q(z_2 \mid z_1, x)`; each of the two may be
    implicit, and has a score of its own then: what the second is drawn from, features of
    :math:`(x, z_1)`, is its context. The tensor methods see one latent :math:`(z_1, z_2)` of width
    ``2 * latent_dim``.

    :param nn.Module trunk: see :class:`~models.vae.VAE`.
    :param nn.Module head: features to a distribution of :math:`z_1`.
    :param ConditionalMLP second_trunk: :math:`z_1`, and the data's features as the condition, to
        features.
    :param nn.Module second_head: those features to a distribution of :math:`z_2`.
    :param TwoLevelDecoder decoder: the generative networks.
    :param int latent_dim: width of each level.
    :param str name: see :class:`~models.vae.VAE`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        decoder: TwoLevelDecoder,
        *,
        second_trunk: ConditionalMLP,
        second_head: nn.Module,
        latent_dim: int,
        name: str = "vae",
    ) -> None:
        super().__init__(trunk, head, decoder, latent_dim=latent_dim, name=name)
        self.second_trunk, self.second_head = second_trunk, second_head

    def prior(self, like: Tensor) -> dist.TorchDistribution:
        r""":math:`p(z_2)\, p(z_1 \mid z_2)` over :math:`(z_1, z_2)`."""
        return Chain(
            super().prior(like),
            self.decoder.prior,
            second_dim=self.latent_dim,
            second_in_front=True,
        )

    def model(self, x: Tensor, beta: float = 1.0, fantasies: Tensor | None = None) -> None:
        """The Pyro model, with a site for each level."""
        pyro.module(f"{self.name}.decoder", self.decoder)
        rows = self.rows(x, fantasies)
        with rows, poutine.scale(scale=beta):
            second = pyro.sample("z2", super().prior(x))
            prior = self.decoder.prior(second[..., : len(x), :])
            if fantasies is not None:
                # One site of the guide, so one of the model.
                fixed = held_fixed(self.decoder.prior, second[..., len(x) :, :])
                loc = torch.cat([prior.base_dist.loc, fixed.base_dist.loc], -2)
                scale = torch.cat([prior.base_dist.scale, fixed.base_dist.scale], -2)
                prior = dist.Normal(loc, scale, validate_args=False).to_event(1)
            first = pyro.sample("z1", prior)
        self.observe(x, fantasies, first, rows)

    def guide(self, x: Tensor, beta: float = 1.0, fantasies: Tensor | None = None) -> None:
        """The Pyro guide, with the arguments of :meth:`model`."""
        for part in ("trunk", "head", "second_trunk", "second_head"):
            pyro.module(f"{self.name}.{part}", getattr(self, part))
        features = self.trunk(with_fantasies(x, fantasies))
        with self.rows(x, fantasies), poutine.scale(scale=beta):
            first = pyro.sample("z1", self.head(features))
            pyro.sample("z2", self.second(features, first))

    def second(self, features: Tensor, first: Tensor) -> dist.TorchDistribution:
        r""":math:`q(z_2 \mid z_1, x)` given the data's features."""
        return self.second_head(self.second_trunk(first, self.second_trunk.project(features)))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        r"""The guide's distribution of :math:`(z_1, z_2)`: batch shape ``[B]``."""
        features = self.trunk(x)
        return Chain(
            self.head(features),
            lambda first: self.second(features, first),
            second_dim=self.latent_dim,
        )

    @torch.no_grad()
    def conditional_draws(
        self, x: Tensor, sample_shape: torch.Size, *, num_mixing: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Of both levels, as :meth:`models.vae.VAE.conditional_draws`."""
        features = self.trunk(x)
        first, log_q = self.head.conditional_draws(features, sample_shape, num_mixing=num_mixing)
        by_second = self.second_trunk(first, self.second_trunk.project(features))
        second, log_q_second = self.second_head.conditional_draws(by_second, num_mixing=num_mixing)
        return torch.cat([first, second], -1), log_q + log_q_second
