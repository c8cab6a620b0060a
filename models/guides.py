# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guide heads: from the features of a data point to the distribution of its latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.func import jacrev, vmap

from models.contraction import Contraction
from models.networks import ConditionalMLP, Network
from models.transforms import Below, UnitLowerAffine
from pyro_ardae import Implicit

__all__ = ["DeviatingGuide", "FullCovarianceGuide", "GaussianGuide", "ImplicitGuide"]


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

    def transform(self, features: Tensor) -> Transform:
        """What makes draws of this Normal of standard normal ones."""
        loc, scale = self.moments(features)
        return dist.transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1)

    def place(self, features: Tensor, deviation: Implicit) -> dist.TorchDistribution:
        """An implicit distribution in units of this Normal.

        Location and scale as a transform: their part of the entropy's gradient is exact and free
        of noise, as a Normal's is, and the score has to be learned for the deviation alone.
        """
        # The deviation that a draw was made of is kept, so that its score need not undo the rest.
        transforms = [self.transform(features)]
        return dist.TransformedDistribution(deviation, transforms, validate_args=False)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, scale = self.moments(features)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


class FullCovarianceGuide(GaussianGuide):
    r"""A Normal with full covariance.

    .. math:: z = \mu(h) + \sigma(h) \odot (I + \gamma L(h))\, \epsilon

    L is strictly lower triangular and starts at zero, so the guide starts as a diagonal one.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    :param float gain: :math:`\gamma`, positive.
    :param torch.dtype compute_dtype: precision of the product that gives L, see
        :class:`models.networks.Network`.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        *,
        gain: float = 0.1,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(feature_dim, latent_dim)
        self.gain = gain
        self.below = Below(latent_dim)
        factor = nn.Linear(feature_dim, self.below.count)
        nn.init.zeros_(factor.weight)
        nn.init.zeros_(factor.bias)
        self.factor = Network(factor, compute_dtype=compute_dtype)

    def transform(self, features: Tensor) -> Transform:
        """As the diagonal one's, with the lower triangular factor in place of the scale."""
        loc, scale = self.moments(features)
        entries = self.gain * self.factor(features)
        return UnitLowerAffine(loc, scale, entries, self.below, cache_size=1)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        # The transform keeps the noise of a draw; a MultivariateNormal would solve for it.
        shape = (*features.shape[:-1], self.loc.out_features)
        zeros, one = features.new_zeros(shape), features.new_ones(())
        noise = dist.Normal(zeros, one, validate_args=False).to_event(1)
        return dist.TransformedDistribution(noise, [self.transform(features)], validate_args=False)


class ImplicitGuide(nn.Module):
    r"""A distribution over the latent that can be sampled but has no density: a network throughout,

    .. math:: z = g(h, \epsilon),

    of features h and noise :math:`\epsilon`, for posteriors of several separated modes.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    :param int noise_dim: width of the standard normal noise.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers of g, at least one.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param torch.dtype compute_dtype: precision of the matrix products, see
        :class:`models.networks.MLP`.
    :raises ValueError: if there is no hidden layer.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        *,
        noise_dim: int,
        hidden_dims: tuple[int, ...],
        activation: type[nn.Module] = nn.SiLU,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim, self.noise_dim = latent_dim, noise_dim
        self.net = ConditionalMLP(
            noise_dim,
            feature_dim,
            sizes=(*hidden_dims, latent_dim),
            activation=activation,
            compute_dtype=compute_dtype,
        )

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        # What does not depend on the noise is computed here, once per data point, and bound to
        # the sampler: Implicit would hand it one copy of the features for each draw.
        sampler = partial(self._sample, projected=self.net.project(features))
        return Implicit(sampler, self.noise_dim, features, (self.latent_dim,))

    def _sample(self, noise: Tensor, _features: Tensor, *, projected: Tensor) -> Tensor:
        """Noise ``[*sample, B, noise_dim]`` to draws ``[*sample, B, latent_dim]``."""
        return self.net(noise, projected)


class DeviatingGuide(nn.Module):
    r"""An implicit distribution over the latent that starts as a Normal and deviates from it,

    .. math:: z = \mu(h) + A(h)\, (\epsilon_{1:D} + \gamma\, g(h, \epsilon)),

    where h are the features, :math:`\mu` and A location and scale (or triangular matrix) of the
    Normal, :math:`\epsilon` the noise, and g a network whose last layer starts at zero and that
    brings no two noises further apart than they are (:mod:`models.contraction`). As
    :math:`\gamma < 1`, noise and latent determine each other, given h and the rest of the noise. A
    guide that could fold or flatten its noise would do so where its score is not resolved.

    :param GaussianGuide base: the Normal.
    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent, that of the base.
    :param int noise_dim: width of the standard normal noise, ``latent_dim`` at least.
    :param tuple[int, ...] hidden_dims: widths of the hidden layers of g, at least one; they are
        SiLU layers.
    :param float gain: :math:`\gamma`, in (0, 1).
    :raises ValueError: if the noise is too narrow, the gain out of range or there is no hidden
        layer.
    """

    def __init__(
        self,
        base: GaussianGuide,
        feature_dim: int,
        latent_dim: int,
        *,
        noise_dim: int,
        hidden_dims: tuple[int, ...],
        gain: float = 0.8,
    ) -> None:
        super().__init__()
        if noise_dim < latent_dim:
            raise ValueError(
                f"noise_dim: expected at least latent_dim = {latent_dim}, got {noise_dim}"
            )
        if not 0 < gain < 1:
            raise ValueError(f"gain: expected a number in (0, 1), got {gain}")
        self.latent_dim, self.noise_dim, self.gain = latent_dim, noise_dim, gain
        self.base = base
        self.net = Contraction(noise_dim, feature_dim, sizes=(*hidden_dims, latent_dim))

    def deviation_parameters(self) -> list[nn.Parameter]:
        """Parameters of the network that deviates from the Gaussian."""
        return [*self.net.parameters()]

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        # All that the deviation depends on, and narrower than the features: a score network that is
        # told no more is cheaper, and no worse.
        context = self.net.project(features)
        sampler = partial(self._sample, matrices=self.net.matrices())
        deviation = Implicit(sampler, self.noise_dim, context, (self.latent_dim,))
        return self.base.place(features, deviation)

    @torch.no_grad()
    def conditional_draws(
        self,
        features: Tensor,
        sample_shape: torch.Size = torch.Size(),
        *,
        num_mixing: int = 0,
    ) -> tuple[Tensor, Tensor]:
        r"""Draws, and what log q is given a part of their noise.

        Given the rest r of the noise, own noise :math:`\epsilon_{1:D}` and latent determine each
        other:

        .. math:: \log q(z \mid r, h) = \log N(\epsilon_{1:D}; 0, I)
            - \log |\det(I + \gamma\, \partial g / \partial \epsilon_{1:D})| - \log |\det A|

        What is returned is the logarithm of its mean over the r that the draw came from and K
        others. Its expectation is above that of :math:`\log q(z \mid h)` and falls to it as K grows
        (Yin and Zhou 2018, `arXiv 1805.11183 <https://arxiv.org/abs/1805.11183>`_), so in place of
        this it gives a lower bound of the ELBO.

        :param Tensor features: ``[*batch, feature_dim]``.
        :param torch.Size sample_shape: shape of the draws for each.
        :param int num_mixing: K, >= 0. Each of the K has its own noise to be found, by iteration.
        :returns: draws ``[*sample, *batch, latent_dim]`` and log-densities ``[*sample, *batch]``.
        """
        matrices, projected = self.net.matrices(), self.net.project(features)
        shape = sample_shape + features.shape[:-1]
        projected = projected.expand(*shape, -1)
        rest_dim = self.noise_dim - self.latent_dim

        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=features.dtype, device=features.device)

        def deviation(own: Tensor, rest: Tensor, projected: Tensor) -> Tensor:
            return self.gain * self.net(torch.cat([own, rest], -1), projected, matrices)

        own, rest = normal(1, *shape, self.latent_dim), normal(1 + num_mixing, *shape, rest_dim)
        w = own + deviation(own, rest[:1], projected)
        if num_mixing:
            first = own.expand(num_mixing, *own.shape[1:])
            others = self._own_noise(w, lambda own: deviation(own, rest[1:], projected), first)
            own = torch.cat([own, others])
        rows = (part.flatten(0, -2) for part in (own, rest, projected.expand(len(own), *shape, -1)))
        slopes = vmap(jacrev(deviation), chunk_size=4096)(*rows)
        eye = torch.eye(self.latent_dim, dtype=own.dtype, device=own.device)
        log_det = torch.linalg.slogdet(eye + slopes)[1].view(own.shape[:-1])
        log_q = dist.Normal(0.0, 1.0).log_prob(own).sum(-1) - log_det
        transform = self.base.transform(features)
        z = transform(w[0])
        log_q = log_q.logsumexp(0) - math.log(1 + num_mixing)
        return z, log_q - transform.log_abs_det_jacobian(w[0], z)

    def _own_noise(self, w: Tensor, deviation: Callable[[Tensor], Tensor], guess: Tensor) -> Tensor:
        """The own noise whose deviation leads to w, by the fixed point of a contraction."""
        tolerance = 1e-5 * (1 - self.gain)  # a step is so much of what is left, at least
        for _ in range(math.ceil(math.log(1e-8) / math.log(self.gain))):
            guess, before = w - deviation(guess), guess
            if (guess - before).abs().max() < tolerance:
                break
        return guess

    def _sample(self, noise: Tensor, context: Tensor, *, matrices: Sequence[Tensor]) -> Tensor:
        """Noise ``[*sample, B, noise_dim]`` to draws ``[*sample, B, latent_dim]``, in units of the
        Normal.
        """
        deviation = self.net(noise, context, matrices)
        return torch.add(noise[..., : self.latent_dim], deviation, alpha=self.gain)
