# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of one global latent vector: implicit, normalizing flow, Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.flows import import_zuko
from models.networks import MLP
from pyro_ardae import Implicit

__all__ = ["FlowPosterior", "GaussianPosterior", "ImplicitPosterior"]


class ImplicitPosterior(nn.Module):
    r"""A Gaussian whose mean and factor are networks of further noise, then Metropolis moves.

    .. math::
        z_0 &= s\, \epsilon_{1:D} + \mu(c\, \epsilon) + (t I + L(c\, \epsilon))\, \epsilon_0 \\
        z' &= z_k + j\, \epsilon_{k + 1} \quad\text{(a jump), or} \quad
        z' = z_k - a_k\, \beta \nabla U(z_k) + \sqrt{2 a_k}\, \epsilon_{k + 1}
        \quad\text{(a Langevin step)}

    and :math:`z_{k + 1}` is z' or, refused by Metropolis and Hastings' rule, :math:`z_k`. The
    network distributes the mass, Langevin steps mend its shape, jumps carry what is left over from
    one ridge to another, whose shares a gradient hardly sees. Neither network nor moves have a
    density: a guide that need only be sampled may contain the model's own gradient. A move leaves
    the density exp(-β U) as it is, whatever its size, and brings any other closer to it. Every
    third is a jump; the sizes of the others go round in multiples of a, as wide ones get along a
    ridge and narrow ones are accepted where it bends.

    In the gradient the moves' derivative is taken for the identity: the network's draw is pulled to
    where the density is too low after the moves. This is not the gradient of the divergence, but
    vanishes with it. It takes no second derivatives, and no slope that shrinks by a factor with
    each step across a ridge and grows between two.

    :param int latent_dim: width D of the latent.
    :param int noise_dim: width of the noise :math:`\epsilon`, D at least.
    :param Sequence[int] hidden_dims: widths of the hidden layers.
    :param type[nn.Module] activation: activation of the hidden layers.
    :param float spread: s, the scale of the draws before training.
    :param float width: t, the scale of the Gaussian before training.
    :param float input_scale: c. Above 1 the network starts with the higher frequencies that narrow
        and winding densities take.
    :param Callable energy: U and its gradient, ``[*, D]`` to ``[*]`` and ``[*, D]``.
    :param int num_moves: number of moves; none without an energy.
    :param float step_size: a.
    :param float jump_scale: j.
    :raises ValueError: if the noise is too narrow, or moves are asked for without an energy.

    Reference for the steps: Roberts, Tweedie, "Exponential convergence of Langevin distributions
    and their discrete approximations", Bernoulli 1996.
    """

    #: Sizes of Langevin steps in units of a.
    SIZES = (0.25, 0.5, 1.0, 2.0)

    def __init__(
        self,
        latent_dim: int,
        *,
        noise_dim: int,
        hidden_dims: Sequence[int],
        activation: type[nn.Module] = nn.SiLU,
        spread: float = 1.0,
        width: float = 0.5,
        input_scale: float = 1.0,
        energy: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        num_moves: int = 0,
        step_size: float = 0.04,
        jump_scale: float = 2.0,
    ) -> None:
        super().__init__()
        if noise_dim < latent_dim:
            raise ValueError(
                f"noise_dim: expected at least latent_dim = {latent_dim}, got {noise_dim}"
            )
        if num_moves and energy is None:
            raise ValueError(f"num_moves: expected 0 without an energy, got {num_moves}")
        self.latent_dim = latent_dim
        self.noise_dim = noise_dim
        self.spread, self.width, self.input_scale = spread, width, input_scale
        outputs = latent_dim * (1 + latent_dim)
        self.net = MLP((noise_dim, *hidden_dims, outputs), activation=activation)
        self.energy, self.num_moves = energy, num_moves
        self.step_size, self.jump_scale = step_size, jump_scale

    def forward(self, beta: float = 1.0) -> dist.TorchDistribution:
        """The guide, whose moves lead to the density exp(-beta U)."""
        zero = next(self.net.parameters()).new_zeros(sum(self._widths))
        noise = dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(1)
        return Implicit(partial(self._transform, beta=beta), noise, None, (self.latent_dim,))

    @property
    def _widths(self) -> list[int]:
        """Of the noise: the network's, its Gaussian's, that of all moves, that of all choices."""
        moves = self.num_moves
        return [self.noise_dim, self.latent_dim, moves * self.latent_dim, moves * 2]

    def _transform(self, noise: Tensor, beta: float = 1.0) -> Tensor:
        noise, first, moves, choices = noise.split(self._widths, -1)
        start = self._start(noise, first)
        return self._move(start.detach(), moves, choices, beta) + (start - start.detach())

    @torch.no_grad()
    def _move(self, z: Tensor, moves: Tensor, choices: Tensor, beta: float) -> Tensor:
        if not self.num_moves or self.energy is None:
            return z
        moves = moves.unflatten(-1, (self.num_moves, self.latent_dim))
        # Half the square of two normal variables is exponential, minus the log of a uniform one.
        limits = choices.unflatten(-1, (self.num_moves, 2)).square().sum(-1).mul_(-0.5)
        value, slope = self.energy(z)
        for k, (noise, limit) in enumerate(zip(moves.unbind(-2), limits.unbind(-1), strict=True)):
            jump = k % 3 == 0
            if jump:
                new = torch.add(z, noise, alpha=self.jump_scale)
            else:
                size = self.step_size * self.SIZES[k % len(self.SIZES)]
                new = torch.add(z, slope, alpha=-beta * size).add_(noise, alpha=(2 * size) ** 0.5)
            new_value, new_slope = self.energy(new)
            log_ratio = beta * (value - new_value)
            if not jump:  # the moves there and back are not equally probable
                drift = beta * (0.5 * size) ** 0.5 * (slope + new_slope)
                log_ratio.add_((drift * torch.add(noise, drift, alpha=-0.5)).sum(-1))
            accepted = limit < log_ratio
            value = torch.where(accepted, new_value, value)
            accepted = accepted.unsqueeze(-1)
            slope, z = torch.where(accepted, new_slope, slope), torch.where(accepted, new, z)
        return z

    def _start(self, noise: Tensor, last: Tensor) -> Tensor:
        output = self.net(self.input_scale * noise)
        loc, factor = output.split([self.latent_dim, self.latent_dim**2], -1)
        factor = factor.unflatten(-1, (self.latent_dim, self.latent_dim))
        turned = (factor * last.unsqueeze(-2)).sum(-1)
        return self.spread * noise[..., : self.latent_dim] + loc + self.width * last + turned


class FlowPosterior(nn.Module):
    """A neural spline flow of zuko, in the direction that is fast to sample.

    Its splines map ``[-5, 5]`` to itself and leave the rest alone, so they work in units of
    ``spread``.

    :param int latent_dim: width of the latent.
    :param int transforms: number of autoregressive transforms.
    :param Sequence[int] hidden_dims: widths of the hidden layers of each.
    :param int bins: pieces of each spline.
    :param float spread: the scale of the draws before training, roughly: zuko bounds scales softly,
        and makes 1.88 of 2.
    :param Tensor loc: their location, ``[latent_dim]``, as roughly; 0 by default.
    :raises ModuleNotFoundError: if zuko is not installed.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        transforms: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        bins: int = 8,
        spread: float = 1.0,
        loc: Tensor | None = None,
    ) -> None:
        super().__init__()
        zuko = import_zuko()
        shift = torch.zeros(latent_dim) if loc is None else -loc.detach() / spread
        unit = zuko.lazy.UnconditionalTransform(
            zuko.transforms.MonotonicAffineTransform,
            shift=shift,
            scale=torch.full((latent_dim,), -math.log(spread)),
        )
        splines = zuko.flows.NSF(
            latent_dim, transforms=transforms, hidden_features=[*hidden_dims], bins=bins
        )
        # Inverse autoregressive: a draw takes one pass per transform, not one per dimension.
        transform = zuko.lazy.LazyComposedTransform(unit, splines.transform.inv)
        self.flow = zuko.flows.Flow(transform, splines.base)

    def forward(self) -> dist.TorchDistribution:
        from pyro.contrib.zuko import ZukoToPyro

        return ZukoToPyro(self.flow())


class GaussianPosterior(nn.Module):
    """A Gaussian with full covariance.

    :param int latent_dim: width of the latent.
    :param float spread: standard deviation before training.
    """

    def __init__(self, latent_dim: int, *, spread: float = 1.0) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_diagonal = nn.Parameter(torch.full((latent_dim,), math.log(spread)))
        self.below = nn.Parameter(torch.zeros(latent_dim, latent_dim))

    def forward(self) -> dist.TorchDistribution:
        factor = self.below.tril(-1) + self.log_diagonal.exp().diag()
        return dist.MultivariateNormal(self.loc, scale_tril=factor, validate_args=False)
