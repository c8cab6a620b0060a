# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guide heads: from the features of a data point to the distribution of its latent."""

from __future__ import annotations

from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.networks import MLP
from pyro_ardae import Implicit

__all__ = ["GaussianGuide", "ImplicitGuide"]


class GaussianGuide(nn.Module):
    """A diagonal Normal over the latent: the baseline.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    """

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Linear(feature_dim, latent_dim)
        self.log_scale = nn.Linear(feature_dim, latent_dim)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, scale = self.loc(features), self.log_scale(features).exp()
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


class ImplicitGuide(nn.Module):
    r"""A distribution over the latent that can be sampled but has no density.

    With ``gaussian_base`` the sampler deviates from a diagonal Normal and starts as one,

    .. math:: z = \mu(h) + \sigma(h) \odot (\epsilon_{1:D} + g(h, \epsilon)),

    where :math:`h` are the features, :math:`\epsilon` the noise and :math:`g` a network whose last
    layer starts at zero. Without
    ``gaussian_base``, :math:`z = g(h, \epsilon)`, which finds posteriors of several separated modes
    more easily.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    :param int noise_dim: width of the standard normal noise; ``latent_dim`` at least with
        ``gaussian_base``.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers of the sampler, at least one.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param bool gaussian_base: whether the sampler deviates from a Normal.
    :param float gain: :math:`\gamma`, positive.
    :param torch.dtype compute_dtype: precision of the matrix products, see
        :class:`models.networks.MLP`.
    :raises ValueError: if the noise is too narrow or there is no hidden layer.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        *,
        noise_dim: int,
        hidden_dims: tuple[int, ...],
        activation: type[nn.Module] = nn.SiLU,
        gaussian_base: bool = True,
        gain: float = 0.1,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gaussian_base and noise_dim < latent_dim:
            raise ValueError(
                f"noise_dim: expected at least latent_dim = {latent_dim} with gaussian_base, "
                f"got {noise_dim}"
            )
        if not hidden_dims:
            raise ValueError("hidden_dims: expected at least one hidden layer, got none")
        self.latent_dim = latent_dim
        self.noise_dim = noise_dim
        self.gaussian_base = gaussian_base
        self.gain = gain
        self.base = GaussianGuide(feature_dim, latent_dim) if gaussian_base else None
        # The first layer is split in two, so that the features are projected once per data
        # point however many samples are drawn for it.
        self.from_features = nn.Linear(feature_dim, hidden_dims[0])
        self.from_noise = MLP((noise_dim, hidden_dims[0]), compute_dtype=compute_dtype)
        self.activation = activation()
        self.net = MLP(
            (*hidden_dims, latent_dim), activation=activation, compute_dtype=compute_dtype
        )
        if gaussian_base:
            nn.init.zeros_(self.net.last.weight)
            nn.init.zeros_(self.net.last.bias)

    def deviation_parameters(self) -> list[nn.Parameter]:
        """Parameters of the network that deviates from the Gaussian."""
        modules = (self.from_features, self.from_noise, self.net)
        return [p for module in modules for p in module.parameters()]

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        # What does not depend on the noise is computed here, once per data point, and bound to
        # the sampler: Implicit would hand it one copy of the features for each draw.
        shift = self.from_features(features)
        sampler = partial(self._sample, shift=shift)
        implicit = Implicit(sampler, self.noise_dim, features, (self.latent_dim,))
        if self.base is None:
            return implicit
        # Loc and scale as a transform: their part of the entropy's gradient is exact and free of
        # noise, as a Normal's is, and the score has to be learned for the deviation alone.
        loc, scale = self.base.loc(features), self.base.log_scale(features).exp()
        affine = dist.transforms.AffineTransform(loc, scale, event_dim=1)
        return dist.TransformedDistribution(implicit, [affine], validate_args=False)

    def _sample(self, noise: Tensor, _features: Tensor, *, shift: Tensor) -> Tensor:
        """Noise ``[*sample, B, noise_dim]`` to draws ``[*sample, B, latent_dim]``."""
        deviation = self.net(self.activation(self.from_noise(noise) + shift))
        if self.base is None:
            return deviation
        return torch.add(noise[..., : self.latent_dim], deviation, alpha=self.gain)
