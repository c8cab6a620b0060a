# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""AR-DAE: the amortized residual denoising autoencoder, in whitened coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.energy import EnergyNetwork
from pyro_ardae.score.modulated import mean_square
from pyro_ardae.score.residual import ResidualNetwork
from pyro_ardae.score.student import Student
from pyro_ardae.score.whitened import WhitenedEstimator
from pyro_ardae.score.whitening import Mode

__all__ = ["ARDAE"]

#: The smallest sigma in units of delta: far below it, differences are lost in rounding.
_LEAST = 0.02


class ARDAE(WhitenedEstimator):
    r"""Amortized residual denoising autoencoder, the default score estimator.

    A network f learns from noised samples by

    .. math:: E_{z \sim q}\, E_{u \sim N(0, I)}\, E_{\sigma}
        \lVert u / \sigma + f(z + \sigma u; \sigma, c) \rVert^2,

    whose minimizer is :math:`f^* = \nabla \log (q * N(0, \sigma^2 I))` for every :math:`\sigma`
    (Lim et al. 2020, eq. 8; Vincent 2011). It is queried at :math:`\sigma = 0`.
    Differences from the paper's own setting (:class:`~pyro_ardae.score.paper.PaperARDAE`):

    - f acts on :math:`w = A_c (z - m_c)`, with moments of other draws of the same q, and is
      a network plus the score of what w would be for a Gaussian q, a Student's t, as the moments
      come from few draws. It starts there and learns how q deviates; :math:`\delta` is relative
      to q's own width.
    - The noise comes in pairs :math:`\pm u`, which cancels the part of the noise in the loss's
      gradient that grows as :math:`1 / \sigma`. So every :math:`\sigma` counts the same, uniform up
      to :math:`\delta`; with the paper's weights, :math:`\sigma^2`, and its normal law, small ones
      take part without teaching anything, at equal time with up to twice the error.
    - Many small optimizer steps, held-out whitening, and averages of the weights whose horizon
      follows how fast q moves: see :class:`~pyro_ardae.score.whitened.WhitenedEstimator`.

    The estimate is unbiased only if the network is exact; a finite one is not.

    :param dim: dimensions of z.
    :param context_dim: dimensions of the context; 0 for none.
    :param parametrization: ``"residual"`` (the field is the network's output) or ``"energy"``
        (minus the gradient of a scalar network, which also gives :meth:`log_prob`, at the price of
        a second backward pass).
    :param hidden_dim: width of the network, >= 1.
    :param depth: hidden layers of the network, >= 1.
    :param whitening: see :class:`~pyro_ardae.score.whitening.Whitening`.
    :param delta: largest :math:`\sigma`, in standard deviations of q (with ``whitening="none"``,
        in units of z), in (0, 1].
    :param num_folds: parts into which an update cuts the draws of every context, >= 2, or >= 1
        without context or with ``whitening`` "centered" or "none": by default as many as leave 512
        draws, over all contexts, to each, but 4 to 8.
    :param num_steps: optimizer steps per update, each on one part: by default on all. With fewer,
        the remaining draws serve the moments alone.
    :param learning_rate: Adam's step size, after ``warm_up`` steps.
    :param warm_up: optimizer steps over which the step size grows linearly.
    :param clip: bound on the norm of a gradient, in units of its running mean, >= 1.
    :param weight_decay: decoupled, per unit of step size, >= 0; it keeps the network from growing
        into a field that explodes between the draws of a long run.
    :param min_age: steps to which the memory of a moving q may shrink, >= 1.
    :param max_age: steps to which that of a fixed one may grow, >= ``min_age``.
    :param reference: score of a density near q, ``[..., dim]`` to ``[..., dim]``, e.g. that of the
        model whose posterior q approaches: the network learns the difference, which vanishes as q
        gets there, and its error with it. A small error relative to a steep score itself can hide
        for how much mass lies where. With ``whitening="none"`` and the residual parametrization
        only.
    :param ratio_weight: weight, >= 0, of a second loss in the energy parametrization: to tell draws
        of q from as many of the base by minus the energy. The denoising loss sees slopes alone, so
        hardly how mass is shared between separate modes; this one sees values, and normalizes.
    :param num_normalizer_samples: draws for the normalizing constant in :meth:`log_prob`; 0 to
        take the energy as normalized, with a positive ``ratio_weight`` only.
    :param quasi_random: take a randomly shifted Sobol sequence for them. In a few dimensions the
        error falls nearly as one over their number, not as one over its root.
    :raises ValueError: for a parameter out of range.

    Reference: Lim, Courville, Pal, Huang, "AR-DAE: Towards Unbiased Neural Entropy Gradient
    Estimation", ICML 2020.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        parametrization: Literal["residual", "energy"] = "residual",
        hidden_dim: int = 64,
        depth: int = 4,
        whitening: Mode = "pooled",
        delta: float = 0.1,
        num_folds: int | None = None,
        num_steps: int | None = None,
        learning_rate: float = 4e-3,
        warm_up: int = 50,
        clip: float = 2.0,
        weight_decay: float = 0.05,
        min_age: int = 100,
        max_age: int = 8000,
        reference: Callable[[Tensor], Tensor] | None = None,
        ratio_weight: float = 0.0,
        num_normalizer_samples: int = 128,
        quasi_random: bool = False,
    ) -> None:
        self._in_range("delta", delta, 0.0 < delta <= 1.0, "in (0, 1]")
        if parametrization not in ("residual", "energy"):
            raise ValueError(
                f"ARDAE: expected parametrization 'residual' or 'energy', got {parametrization!r}."
            )
        if reference is not None and (whitening, parametrization) != ("none", "residual"):
            raise ValueError(
                "ARDAE: expected whitening='none' and parametrization='residual' with a reference, "
                f"got {whitening!r} and {parametrization!r}."
            )
        self._in_range("ratio_weight", ratio_weight, ratio_weight >= 0, ">= 0")
        if ratio_weight > 0 and parametrization != "energy":
            raise ValueError(
                "ARDAE: expected parametrization='energy' with a ratio_weight, got "
                f"{parametrization!r}."
            )
        least = 0 if ratio_weight > 0 else 1
        self._in_range(
            "num_normalizer_samples",
            num_normalizer_samples,
            num_normalizer_samples >= least,
            f">= {least}",
        )
        super().__init__(
            dim,
            context_dim,
            EnergyNetwork if parametrization == "energy" else ResidualNetwork,
            hidden_dim=hidden_dim,
            depth=depth,
            num_folds=num_folds,
            num_steps=num_steps,
            whitening=whitening,
            learning_rate=learning_rate,
            warm_up=warm_up,
            clip=clip,
            weight_decay=weight_decay,
            min_age=min_age,
            max_age=max_age,
        )
        # A partial: a module would become a part of this one, and of its state.
        self.reference = None if reference is None else partial(reference)
        self.parametrization, self.delta = parametrization, delta
        self.ratio_weight = ratio_weight
        self.num_normalizer_samples, self.quasi_random = num_normalizer_samples, quasi_random

    def _base_score(self, base: Student, w: Tensor, square_sigma: Tensor | float) -> Tensor:
        if self.reference is None:
            return base.score(w, square_sigma)
        return self.reference(w).clone()  # the network sees sigma and corrects it

    def _noised(self, w: Tensor, base: Student) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Antithetic pairs about w, their sigma, what is left for the network to cancel, and the
        noise's part of it.
        """
        sigma = w.new_empty(*w.shape[:-1], 1).uniform_(_LEAST * self.delta, self.delta)
        u = torch.randn_like(w)
        u, sigma = torch.cat([u, -u]), torch.cat([sigma, sigma])
        noise = u / sigma
        x = u.mul_(sigma).unflatten(0, (2, -1)).add_(w).flatten(0, 1)
        return x, sigma, self._base_score(base, x, sigma.square()).add_(noise), noise

    def _loss(self, w: Tensor, features: Tensor, base: Student) -> tuple[Tensor, Tensor]:
        """Denoising loss over sigma squared, less the noise's own square."""
        x, sigma, target, noise = self._noised(w, base)
        if self.ratio_weight:
            assert isinstance(self.network, EnergyNetwork)
            contrast = w, base.sample(w.shape, w), self.ratio_weight
            loss, gradient = self.network.loss(
                self.weights, x, sigma, features, target, contrast=contrast
            )
        else:
            loss, gradient = self.network.loss(self.weights, x, sigma, features, target)
        return loss - mean_square(noise), gradient

    def _advantage(self, w: Tensor, features: Tensor, base: Student) -> Tensor:
        x, sigma, target, _ = self._noised(w, base)
        slow, fast = (self.network.field(a, x, sigma, features) for a in self.averages)
        # The difference of the squares of target + field.
        return ((slow - fast) * (2 * target + slow + fast)).mean()

    @torch.no_grad()
    def smoothed(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        sigma: float,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch dim"]:
        """The score of q with noise of covariance ``sigma ** 2`` times its own, as :meth:`forward`.

        :param sigma: in [0, ``delta``]; no other has been learned from.
        """
        return self._score(value, samples, context, center, sigma=sigma)

    @torch.no_grad()
    def log_prob(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch"]:
        r"""The normalized log density,

        .. math:: \log t(w) - E(w, 0, c) - \log \hat Z(c) + \log |\det A_c|.

        Z is estimated by ``num_normalizer_samples`` draws of the t, or of a logistic distribution
        with ``quasi_random``, the same for all values; with none it is taken for 1.

        :raises NotImplementedError: with the residual parametrization.
        """
        if not isinstance(self.network, EnergyNetwork):
            return super().log_prob(value, samples, context)
        frame, w, features = self._query(value, samples, context, center)
        energy = self.network.energy(self.averaged, w, w.new_zeros(*w.shape[:-1], 1), features)
        result = frame.log_base(w) - energy
        if self.num_normalizer_samples:
            result = result - self._log_z(frame.base, w, features, self.num_normalizer_samples)
        return result.reshape(value.shape[:-1])

    @torch.no_grad()
    def log_normalizer(
        self,
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        num_draws: int = 256,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        r"""An estimate of :math:`\log Z(c)` by fresh draws: near 0 if ``ratio_weight`` has done its
        part.

        :raises NotImplementedError: with the residual parametrization.
        """
        if not isinstance(self.network, EnergyNetwork):
            raise NotImplementedError(
                "ARDAE has no density with parametrization='residual': use 'energy'."
            )
        frame, w, features = self._query(samples, samples, context, center)
        return self._log_z(frame.base, w, features, num_draws).reshape(samples.shape[1:-1])

    def _log_z(self, base: Student, w: Tensor, features: Tensor, count: int) -> Tensor:
        """``[B]``, for rows like ``w [n, B, D]``."""
        assert isinstance(self.network, EnergyNetwork)
        draws, log_weight = self._normalizer_draws(base, w, count)
        sigma = draws.new_zeros(*draws.shape[:-1], 1)
        energy = self.network.energy(self.averaged, draws, sigma, features)
        return torch.logsumexp(log_weight - energy, 0) - math.log(count)

    @torch.no_grad()
    def score_and_log_prob(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> tuple[Float[Tensor, "N *batch dim"], Float[Tensor, "N *batch"]]:
        """What :meth:`forward` and :meth:`log_prob` give, by one pass if there is no normalizing
        constant to estimate.
        """
        if self.num_normalizer_samples or not isinstance(self.network, EnergyNetwork):
            score = self(value, samples, context, center=center)
            return score, self.log_prob(value, samples, context, center=center)
        frame, w, features = self._query(value, samples, context, center)
        level = w.new_zeros(*w.shape[:-1], 1)
        energy, r = self.network.energy_and_field(self.averaged, w, level, features)
        score = frame.pull_back(r + frame.base.score(w)).reshape(value.shape)
        return score, (frame.log_base(w) - energy).reshape(value.shape[:-1])

    def _normalizer_draws(
        self, base: Student, w: Tensor, count: int
    ) -> tuple[Tensor, Tensor | float]:
        """Draws ``[M, B, D]``, and the log of their density by the base over that they are from."""
        shape = (count, *w.shape[1:])
        if not self.quasi_random:
            return base.sample(torch.Size(shape), w), 0.0
        # The logistic has its quantiles in closed form, tails above a Gaussian's, and with this
        # scale a standard deviation of 1.09.
        scale = 0.6
        points = torch.quasirandom.SobolEngine(self.dim).draw(shape[0]).to(w).unsqueeze(1)
        shift = torch.rand(shape[1:], dtype=w.dtype, device=w.device)
        draws = scale * torch.logit((points + shift) % 1, 1e-6)
        log_density = -(draws / scale + 2 * F.softplus(-draws / scale)).sum(-1)
        return draws, base.log_prob(draws) - log_density + self.dim * math.log(scale)
