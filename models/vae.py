# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A variational autoencoder as a pair of Pyro model and guide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Size, Tensor, nn
from torch.func import functional_call

__all__ = ["LogJoint", "VAE", "held_fixed", "with_fantasies"]

LogJoint = Callable[[Tensor], Tensor]


def held_fixed(module: nn.Module, value: Tensor) -> dist.TorchDistribution:
    """``module(value)``, a distribution, through which the module's parameters do not learn."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found: dist.TorchDistribution = functional_call(module, parameters, (value,))
    return found


def with_fantasies(x: Tensor, fantasies: Tensor | None) -> Tensor:
    """Data ``[B, X]`` and fantasies ``[F, X]``, if there are any, in one: ``[B + F, X]``."""
    return x if fantasies is None else torch.cat([x, fantasies])


class VAE(nn.Module):
    r"""Composes an encoder trunk, a guide head and a decoder.

    The model is :math:`p(x, z) = N(z; 0, I)\, p(x \mid z)`, one latent per data point. The trunk
    runs once per data point, the head turns its features into a distribution over the latent.
    ``vae.model`` and ``vae.guide`` are the two callables for :class:`pyro.infer.SVI`; the tensor
    methods never touch Pyro's parameter store.

    Both take ``fantasies`` too, draws of the model by which the guide alone learns: the trunk sees
    the same images again and again, and what it has learned of them by heart it gets wrong for
    others (Zhang, Hayes, Barber 2022, `arXiv 2205.11640 <https://arxiv.org/abs/2205.11640>`_).

    :param nn.Module trunk: data ``[B, X]`` to features ``[B, C]``.
    :param nn.Module head: features to a distribution with batch shape ``[B]`` and event shape
        ``[latent_dim]``, e.g. :class:`~models.guides.GaussianGuide`.
    :param nn.Module decoder: latents ``[*, latent_dim]`` to a distribution over the data.
    :param int latent_dim: width of the latent.
    :param str name: prefix of the parameters' names in Pyro's store; two models trained side by
        side need different ones.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        decoder: nn.Module,
        *,
        latent_dim: int,
        name: str = "vae",
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.name = name

    def prior(self, like: Tensor) -> dist.TorchDistribution:
        """The standard normal prior, with the dtype and device of ``like``."""
        loc = like.new_zeros(self.latent_dim)
        return dist.Normal(loc, like.new_ones(()), validate_args=False).to_event(1)

    def model(self, x: Tensor, beta: float = 1.0, fantasies: Tensor | None = None) -> None:
        """The Pyro model.

        :param Tensor x: data, ``[B, X]``.
        :param float beta: weight of the latent's terms (the KL divergence), in ``(0, 1]`` while it
            is annealed.
        :param Tensor fantasies: draws of the model, ``[F, X]``, observed beside the data by a
            decoder that is held fixed.
        """
        pyro.module(f"{self.name}.decoder", self.decoder)
        rows = self.rows(x, fantasies)
        with rows, poutine.scale(scale=beta):
            z = pyro.sample("z", self.prior(x))
        self.observe(x, fantasies, z, rows)

    def guide(self, x: Tensor, beta: float = 1.0, fantasies: Tensor | None = None) -> None:
        """The Pyro guide, with the arguments of :meth:`model`."""
        pyro.module(f"{self.name}.trunk", self.trunk)
        pyro.module(f"{self.name}.head", self.head)
        with self.rows(x, fantasies), poutine.scale(scale=beta):
            pyro.sample("z", self.posterior(with_fantasies(x, fantasies)))

    def rows(self, x: Tensor, fantasies: Tensor | None) -> pyro.plate:
        """The plate of the latents: data first, then fantasies."""
        return pyro.plate("data", len(x) if fantasies is None else len(x) + len(fantasies))

    def observe(
        self, x: Tensor, fantasies: Tensor | None, latents: Tensor, rows: pyro.plate
    ) -> None:
        """The sites of data and fantasies, given the latents ``[*, B + F, D]`` of both."""
        of_data = latents[..., : len(x), :]
        with rows if fantasies is None else pyro.plate("observed", len(x)):
            pyro.sample("x", self.decoder(of_data), obs=x)
        if fantasies is not None:
            with pyro.plate("fantasies", len(fantasies)):
                of_fantasies = held_fixed(self.decoder, latents[..., len(x) :, :])
                pyro.sample("fantasy", of_fantasies, obs=fantasies)

    @torch.no_grad()
    def draw(self, count: int, like: Tensor) -> Tensor:
        """Draws of the model, ``[count, X]``, with the dtype and device of ``like``."""
        drawn: Tensor = self.decoder(self.prior(like).sample(Size((count,)))).sample()
        return drawn

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """The guide's distribution of the latents of ``x``: batch shape ``[B]``."""
        return self.head(self.trunk(x))

    def conditional_draws(
        self, x: Tensor, sample_shape: Size, *, num_mixing: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Latents ``[*sample, B, D]`` of a guide without a density, and log-densities ``[*sample,
        B]`` given a part of their noise, see
        :meth:`models.guides.DeviatingGuide.conditional_draws`.
        """
        return self.head.conditional_draws(self.trunk(x), sample_shape, num_mixing=num_mixing)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """``log p(x, z)`` for data ``[B, X]`` and latents ``[*sample, B, latent_dim]``.

        :returns: tensor of shape ``[*sample, B]``, in nats.
        """
        return self.prior(z).log_prob(z) + self.decoder(z).log_prob(x)

    def explicit(self, x: Tensor) -> tuple[LogJoint, dist.TorchDistribution]:
        """A log-joint and a guide with a density, over the same latents: what has an ELBO.

        :param Tensor x: data, ``[B, X]``.
        :returns: latents ``[*sample, B, D]`` to log-joint ``[*sample, B]``, whose marginal is p(x),
            and a distribution of batch shape ``[B]``.
        """
        return partial(self.log_joint, x), self.posterior(x)
