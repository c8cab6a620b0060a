# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Mixtures of Gaussians, whose score is known: fixed, with a context, moving, and continuous."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.densities import Target

__all__ = ["Components", "ConditionalMixture", "GaussianMixture", "Hierarchy", "Mixture"]


class Components(NamedTuple):
    """Components of a mixture of Gaussians, in coordinates x of z = frame x."""

    weights: Tensor
    """``[K]``, of sum 1."""
    means: Tensor
    """``[B or 1, K, D]``"""
    scales: Tensor
    """``[B or 1, K, D]``"""
    frame: Tensor
    """``[D, D]``, orthogonal."""


class Mixture(Target):
    """Mixture of Gaussians whose covariances are diagonal in one common frame."""

    @abstractmethod
    def components(self, context: Tensor) -> Components:
        """The components, with the dtype and device of ``context``."""

    def sample(
        self, num_samples: int, context: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Draws ``[num_samples, B, D]``."""
        weights, means, scales, frame = self.components(context)
        rows = len(context)
        means, scales = (x.expand(rows, -1, -1) for x in (means, scales))
        # With the cumulated weights: torch.multinomial is several times slower.
        uniform = torch.rand(num_samples, rows, generator=generator).to(weights)
        k = torch.searchsorted(weights.cumsum(0), uniform).clamp_max(len(weights) - 1)
        row = torch.arange(rows, device=context.device)
        noise = torch.randn(num_samples, rows, self.dim, generator=generator).to(context)
        return (means[row, k] + scales[row, k] * noise) @ frame.mT

    def log_prob(self, value: Tensor, context: Tensor) -> Tensor:
        """Normalized log density ``[N, B]``."""
        return self._log_joint(value, self.components(context))[0].logsumexp(-1)

    def score(self, value: Tensor, context: Tensor) -> Tensor:
        """Mean of the components' scores, weighted with their posterior probabilities."""
        components = self.components(context)
        log_joint, standard = self._log_joint(value, components)
        share = log_joint.softmax(-1).unsqueeze(-1)
        return -(share * standard / components.scales).sum(-2) @ components.frame.mT

    def moments(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Law of total variance."""
        weights, means, scales, frame = self.components(context)
        mean = torch.einsum("k,bki->bi", weights, means)
        centered = means - mean.unsqueeze(1)
        cov = torch.einsum("k,bki,bkj->bij", weights, centered, centered)
        cov = cov + torch.einsum("k,bki->bi", weights, scales.square()).diag_embed()
        rows = len(context)
        return (mean @ frame.mT).expand(rows, -1), (frame @ cov @ frame.mT).expand(rows, -1, -1)

    def _log_joint(self, value: Tensor, components: Components) -> tuple[Tensor, Tensor]:
        """``[N, B, K]``, and the standardized values ``[N, B, K, D]``."""
        weights, means, scales, frame = components
        standard = ((value @ frame).unsqueeze(-2) - means) / scales
        constant = scales.log().sum(-1) + 0.5 * self.dim * math.log(2 * math.pi)
        return weights.log() - constant - 0.5 * standard.square().sum(-1), standard


@dataclass(frozen=True, eq=False)
class GaussianMixture(Mixture):
    """Mixture without context.

    :param Tensor weights: ``[K]``, positive.
    :param Tensor means: ``[K, D]``.
    :param Tensor scales: ``[K, D]``.
    :param Tensor frame: ``[D, D]``, orthogonal; the axes by default.
    """

    weights: Tensor
    means: Tensor
    scales: Tensor
    frame: Tensor | None = None

    def components(self, context: Tensor) -> Components:
        """The same for every context."""
        frame = torch.eye(self.dim) if self.frame is None else self.frame
        weights = (self.weights / self.weights.sum()).to(context)
        means, scales = (x.to(context).unsqueeze(0) for x in (self.means, self.scales))
        return Components(weights, means, scales, frame.to(context))

    def smoothed(self, sigma: float) -> GaussianMixture:
        """This mixture plus independent noise of covariance ``sigma ** 2`` times its own.

        :raises ValueError: if its components are not isotropic.
        """
        if (self.scales != self.scales[:, :1]).any() or self.frame is not None:
            raise ValueError("smoothed: expected isotropic components and no frame.")
        variances, frame = torch.linalg.eigh(self.moments(self.means.new_zeros(1, 0))[1][0])
        scales = (self.scales.square() + sigma**2 * variances).sqrt()
        return replace(self, means=self.means @ frame, scales=scales, frame=frame)


@dataclass(frozen=True, eq=False)
class ConditionalMixture(Mixture):
    r"""Three Gaussians that depend smoothly on a context :math:`c \sim N(0, I_4)`.

    With fixed random matrices, in coordinates x of which z is a rotation or which z is,

    .. math:: x = 2 \sin(f A c + a) + e^{\sin(f B c + b) / 2 f}
        \odot \big(R_t (p_k + \tfrac12 \sin(f C_k c + c_k)) + s_k u\big), \quad u \sim N(0, I),

    with weights .25, .35, .4 and widths s_k = .8, 1, 1.25. Rows of A, B, C_k have norm 1 in the
    root of the mean square; the scale varies about e-fold between the 5th and the 95th
    percentile. The p_k are the corners of an equilateral triangle about 0 in a random plane.

    R_t is the identity unless ``drift`` is positive: then it turns all directions at one rate, such
    that the components move by ``drift`` units an update (of arc, before the scale, in the root of
    the mean square). Distances stay as they are, so the target is as hard after thousands of
    updates as at first. It is back after :math:`2 \pi \rho` ``/ drift`` updates, where
    :math:`\rho^2` = ``radius ** 2 + dim / 8``.

    :param float radius: norm of the p_k.
    :param float frequency: f.
    :param bool rotated: whether z is a fixed random rotation of x.
    :param float drift: see above.
    :param float angle: by how much R_t has turned.
    :raises ValueError: for a drift in an odd dimension, where some direction must stay.
    """

    radius: float
    frequency: float
    rotated: bool = False
    drift: float = 0.0
    angle: float = 0.0

    def __post_init__(self) -> None:
        if self.drift and self.dim % 2:
            raise ValueError(
                f"ConditionalMixture: expected an even dim with a drift, got dim={self.dim}; leave "
                "the drift out, or add a dimension."
            )

    def at(self, num_updates: int) -> ConditionalMixture:
        """The mixture turned by ``num_updates`` times ``drift``."""
        if not self.drift:
            return self
        speed = self.drift / math.sqrt(self.radius**2 + self.dim / 8)
        return replace(self, angle=num_updates * speed)

    def components(self, context: Tensor) -> Components:
        """The formula above."""
        fixed = _Constants(*(x.to(context) for x in _constants(self.dim, self.context_dim)))
        waves = (self.frequency * context @ fixed.frequencies.mT + fixed.phases).sin()
        waves = waves.reshape(len(context), 5, self.dim)
        location, scale = 2 * waves[:, :1], (waves[:, 1:2] / (2 * self.frequency)).exp()
        positions = self.radius * fixed.corners + 0.5 * waves[:, 2:]
        turned = math.cos(self.angle) * positions + math.sin(self.angle) * positions @ fixed.turn
        means = location + scale * turned
        scales = scale * fixed.widths.unsqueeze(-1)
        frame = fixed.rotation if self.rotated else torch.eye(self.dim).to(context)
        return Components(fixed.weights, means, scales, frame)


class _Constants(NamedTuple):
    """What is fixed in a conditional mixture of a dimension."""

    frequencies: Tensor
    """``[5 D, C]``: of location, scale, three positions; rows of root mean square norm 1."""
    phases: Tensor
    """``[5 D]``"""
    corners: Tensor
    """``[3, D]``: the triangle."""
    turn: Tensor
    """``[D, D]``: a quarter of a turn of every direction, if D is even."""
    rotation: Tensor
    """``[D, D]``"""
    weights: Tensor
    widths: Tensor


@cache
def _constants(dim: int, context_dim: int) -> _Constants:
    generator = Generator().manual_seed(dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frequencies, phases = normal(5 * dim, context_dim) / context_dim**0.5, math.pi * normal(5 * dim)
    plane, basis, rotation = (_orthogonal(normal(dim, dim)) for _ in range(3))
    angles = 2 * math.pi / 3 * torch.arange(3, dtype=torch.float64)
    corners = torch.stack([angles.cos(), angles.sin()], -1) @ plane[:, :2].mT
    first, second = basis[:, : dim // 2], basis[:, dim // 2 : 2 * (dim // 2)]
    turn = first @ second.mT - second @ first.mT
    weights = torch.tensor([0.25, 0.35, 0.4], dtype=torch.float64)
    widths = torch.tensor([0.8, 1.0, 1.25], dtype=torch.float64)
    return _Constants(frequencies, phases, corners, turn, rotation, weights, widths)


def _orthogonal(matrix: Tensor) -> Tensor:
    q, r = torch.linalg.qr(matrix)
    return torch.mul(q, r.diagonal().sign())  # unique, whatever signs the library chooses


@dataclass(frozen=True, eq=False)
class Hierarchy(Mixture):
    r"""Semi-implicit: z = (2 e, e^2 - 1) + s(e) u for noise :math:`e \sim N(0, 1)`, u ~ N(0, I).

    :math:`s(e) = 0.3 \exp(0.4 \sin 2 e)`. The density is an integral over e, taken by the
    trapezoidal rule with ``num_nodes`` nodes on [-6, 6]; draws are of the hierarchy itself.
    """

    num_nodes: int = 601

    def sample(
        self, num_samples: int, context: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Draws ``[num_samples, B, D]``."""
        shape = num_samples, len(context)
        e = torch.randn(*shape, generator=generator).to(context)
        u = torch.randn(*shape, self.dim, generator=generator).to(context)
        mean, scale = self._given(e)
        return mean + scale * u

    def components(self, context: Tensor) -> Components:
        """The nodes."""
        e = torch.linspace(-6, 6, self.num_nodes, dtype=torch.float64)
        weights = (-0.5 * e.square()).softmax(0).to(context)
        mean, scale = (x.to(context).unsqueeze(0) for x in self._given(e))
        return Components(weights, mean, scale.expand_as(mean), torch.eye(self.dim).to(context))

    @staticmethod
    def _given(e: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[..., 2]`` and scale ``[..., 1]`` of z given e."""
        mean = torch.stack([2 * e, e.square() - 1], -1)
        return mean, 0.3 * (0.4 * (2 * e).sin()).exp().unsqueeze(-1)
