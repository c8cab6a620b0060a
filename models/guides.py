# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guide heads: from the features of a data point to the distribution of its latent."""

from __future__ import annotations

from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.networks import ConditionalMLP
from pyro_ardae import Implicit

__all__ = ["FullCovarianceGuide", "GaussianGuide", "ImplicitGuide"]


class GaussianGuide(nn.Module):
    """A diagonal Normal over the latent: the baseline.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    """

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Linear(feature_dim, latent_dim)
        self.log_scale = nn.Linear(feature_dim, latent_dim)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, ``[*batch, latent_dim]`` each."""
        return self.loc(features), self.log_scale(features).exp()

    def place(self, features: Tensor, deviation: Implicit) -> dist.TorchDistribution:
        """An implicit distribution in units of this Normal.

        Location and scale as a transform: their part of the entropy's gradient is exact and free
        of noise, as a Normal's is, and the score has to be learned for the deviation alone.
        """
        # The deviation that a draw was made of is kept, so that its score need not undo the rest.
        loc, scale = self.moments(features)
        affine = dist.transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1)
        return dist.TransformedDistribution(deviation, [affine], validate_args=False)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, scale = self.moments(features)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


class FullCovarianceGuide(nn.Module):
    r"""A Normal with full covariance.

    .. math:: z = \mu(h) + \sigma(h) \odot (I + \gamma L(h))\, \epsilon

    L is strictly lower triangular and starts at zero, so the guide starts as a diagonal one.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    :param float gain: :math:`\gamma`, positive.
    """

    def __init__(self, feature_dim: int, latent_dim: int, *, gain: float = 0.1) -> None:
        super().__init__()
        self.gain = gain
        self.base = GaussianGuide(feature_dim, latent_dim)
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        self.register_buffer("below", rows * latent_dim + columns, persistent=False)
        self.factor = nn.Linear(feature_dim, len(rows))
        nn.init.zeros_(self.factor.weight)
        nn.init.zeros_(self.factor.bias)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, scale = self.base.moments(features)
        dim = loc.shape[-1]
        factor = loc.new_zeros(*loc.shape[:-1], dim * dim)
        factor = factor.index_copy(-1, self.below, self.gain * self.factor(features))
        identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
        factor = factor.unflatten(-1, (dim, dim)) + identity
        scale_tril = scale.unsqueeze(-1) * factor
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


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
        self.latent_dim = latent_dim
        self.noise_dim = noise_dim
        self.gain = gain
        self.base = GaussianGuide(feature_dim, latent_dim) if gaussian_base else None
        self.net = ConditionalMLP(
            noise_dim,
            feature_dim,
            sizes=(*hidden_dims, latent_dim),
            activation=activation,
            zero_output=gaussian_base,
            compute_dtype=compute_dtype,
        )

    def deviation_parameters(self) -> list[nn.Parameter]:
        """Parameters of the network that deviates from the Gaussian."""
        return [*self.net.parameters()]

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        # What does not depend on the noise is computed here, once per data point, and bound to
        # the sampler: Implicit would hand it one copy of the features for each draw.
        sampler = partial(self._sample, projected=self.net.project(features))
        implicit = Implicit(sampler, self.noise_dim, features, (self.latent_dim,))
        return implicit if self.base is None else self.base.place(features, implicit)

    def _sample(self, noise: Tensor, _features: Tensor, *, projected: Tensor) -> Tensor:
        """Noise ``[*sample, B, noise_dim]`` to draws ``[*sample, B, latent_dim]``."""
        deviation = self.net(noise, projected)
        if self.base is None:
            return deviation
        return torch.add(noise[..., : self.latent_dim], deviation, alpha=self.gain)
