# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A guide head with an auxiliary latent: two Normals whose marginal has no density."""

from __future__ import annotations

import math
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.guides import GaussianGuide
from models.networks import ConditionalMLP
from pyro_ardae import Implicit

__all__ = ["HierarchicalGuide", "ReverseGuide"]


class HierarchicalGuide(nn.Module):
    r"""The hierarchy :math:`q(z_0 \mid h)\, q(z \mid z_0, h)` of diagonal Normals.

    .. math:: z = \mu(h) + \sigma(h) \odot \big(\gamma\, a(z_0, h)
        + e^{\gamma\, b(z_0, h)} \odot \epsilon\big),
        \qquad z_0 \sim N(m(h), \operatorname{diag} s(h)^2),

    with a and b zero at the start. There are three ways of training it, with three objectives:

    - its marginal :math:`q(z \mid h)` as an implicit distribution, which :meth:`forward` returns;
    - the joint of z and :math:`z_0` against a model of the latter,
      :class:`models.auxiliary_vae.AuxiliaryVAE`;
    - a bound by further draws of :math:`z_0`,
      :class:`models.semi_implicit.SemiImplicitGuide`.

    :param int feature_dim: width of the features h.
    :param int latent_dim: width of z.
    :param int auxiliary_dim: width of :math:`z_0`.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers of a and b, at least one.
    :param GaussianGuide base: :math:`\mu` and :math:`\sigma`, the latter a triangular matrix with a
        :class:`~models.guides.FullCovarianceGuide`, for the implicit marginal alone; a diagonal one
        by default.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param float gain: :math:`\gamma`, positive.
    :param torch.dtype compute_dtype: see :class:`models.networks.Network`.
    """

    #: Bound on :math:`\gamma b`.
    MAX_LOG_SCALE = 3.0

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        *,
        auxiliary_dim: int,
        hidden_dims: tuple[int, ...],
        base: GaussianGuide | None = None,
        activation: type[nn.Module] = nn.SiLU,
        gain: float = 0.1,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim, self.auxiliary_dim, self.gain = latent_dim, auxiliary_dim, gain
        self.auxiliary = GaussianGuide(feature_dim, auxiliary_dim)
        self.base = GaussianGuide(feature_dim, latent_dim) if base is None else base
        self.net = ConditionalMLP(
            auxiliary_dim,
            feature_dim,
            sizes=(*hidden_dims, 2 * latent_dim),
            activation=activation,
            zero_output=True,
            compute_dtype=compute_dtype,
        )

    def deviation_parameters(self) -> list[nn.Parameter]:
        """Parameters of what deviates from the Gaussian.

        The auxiliary latent's are among them: against a decay of the network alone its scale grows
        without bound, until a draw overflows.
        """
        return [*self.net.parameters(), *self.auxiliary.parameters()]

    def mixing(self, features: Tensor) -> dist.TorchDistribution:
        r""":math:`q(z_0 \mid h)`."""
        return self.auxiliary(features)

    def conditional(self, features: Tensor, auxiliary: Tensor) -> dist.TorchDistribution:
        r""":math:`q(z \mid z_0, h)`.

        :param Tensor features: h, ``[*batch, C]``.
        :param Tensor auxiliary: :math:`z_0`, ``[*sample, *batch, A]``.
        :raises TypeError: if the base is not diagonal.
        """
        if type(self.base) is not GaussianGuide:
            raise TypeError(
                f"conditional: expected a diagonal base, GaussianGuide, got "
                f"{type(self.base).__name__}, with which q(z | z0, h) is no diagonal Normal"
            )
        loc, scale = self._inner(auxiliary, self.net.project(features))
        base_loc, base_scale = self.base.moments(features)
        loc = torch.addcmul(base_loc, base_scale, loc)
        return dist.Normal(loc, base_scale * scale, validate_args=False).to_event(1)

    @torch.no_grad()
    def conditional_draws(
        self,
        features: Tensor,
        sample_shape: torch.Size = torch.Size(),
        *,
        num_mixing: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draws of z and their log-densities given the auxiliary latent, with K others averaged
        over as in :meth:`models.guides.DeviatingGuide.conditional_draws`.
        """
        auxiliary = self.mixing(features).sample(torch.Size((1 + num_mixing, *sample_shape)))
        loc, scale = self._inner(auxiliary, self.net.project(features))
        inner = dist.Normal(loc, scale, validate_args=False).to_event(1)
        transform = self.base.transform(features)
        w = torch.addcmul(loc[0], scale[0], torch.randn_like(loc[0]))
        z = transform(w)
        log_q = inner.log_prob(w).logsumexp(0) - math.log(1 + num_mixing)
        return z, log_q - transform.log_abs_det_jacobian(w, z)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """The marginal of z."""
        loc, scale = self.auxiliary.moments(features)
        padding = (0, self.latent_dim)
        noise = dist.Normal(
            nn.functional.pad(loc, padding),
            nn.functional.pad(scale, padding, value=1.0),
            validate_args=False,
        ).to_event(1)
        sampler = partial(self._sample, projected=self.net.project(features))
        return self.base.place(features, Implicit(sampler, noise, features, (self.latent_dim,)))

    def _sample(self, noise: Tensor, _features: Tensor, *, projected: Tensor) -> Tensor:
        auxiliary, own = noise.split([self.auxiliary_dim, self.latent_dim], -1)
        loc, scale = self._inner(auxiliary, projected)
        return torch.addcmul(loc, scale, own)

    def _inner(self, auxiliary: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of z in units of the Gaussian."""
        loc, log_scale = (self.gain * self.net(auxiliary, projected)).chunk(2, -1)
        bounded = self.MAX_LOG_SCALE * torch.tanh(log_scale / self.MAX_LOG_SCALE)
        return loc, bounded.exp()


class ReverseGuide(nn.Module):
    r"""A diagonal Normal :math:`r(z_0 \mid z, x)` over the auxiliary latent of such a guide.

    :param int data_dim: width of x.
    :param int latent_dim: width of z.
    :param int auxiliary_dim: width of :math:`z_0`.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers, at least two.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param torch.dtype compute_dtype: see :class:`models.networks.Network`.
    :raises ValueError: for fewer hidden layers.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        auxiliary_dim: int,
        hidden_dims: tuple[int, ...],
        activation: type[nn.Module] = nn.SiLU,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(hidden_dims) < 2:
            raise ValueError(f"hidden_dims: expected at least two hidden layers, got {hidden_dims}")
        self.net = ConditionalMLP(
            latent_dim,
            data_dim,
            sizes=hidden_dims,
            activation=activation,
            activate_output=True,
            compute_dtype=compute_dtype,
        )
        self.head = GaussianGuide(hidden_dims[-1], auxiliary_dim)

    def forward(self, x: Tensor, latent: Tensor) -> dist.TorchDistribution:
        return self.head(self.net(latent, self.net.project(x)))
