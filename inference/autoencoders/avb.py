# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Adversarial variational Bayes: the density of an implicit guide by a discriminator."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ardae.score.energy import EnergyNetwork
from pyro_ardae.score.student import Student
from pyro_ardae.score.whitened import WhitenedEstimator
from pyro_ardae.score.whitening import Mode

__all__ = ["AdversarialScore"]


class AdversarialScore(WhitenedEstimator):
    r"""Adversarial variational Bayes with adaptive contrast, as a score estimator.

    A discriminator T tells draws w of the guide, in whitened coordinates, from those of a Gaussian
    r:

    .. math:: \max_T\; E_{q(w \mid c)} \log \operatorname{sigm} T(w, c)
        + E_{r(w)} \log (1 - \operatorname{sigm} T(w, c)),

    whose optimum is :math:`T^* = \log q - \log r`, so that :math:`\log q = T^* + \log r`. Guide and
    model are trained on :math:`\log p(x, z) - T(z, x) - \log r(z)`, T held fixed, which is what
    :class:`~pyro_ardae.TraceImplicit_ELBO` does with the gradient of :math:`T + \log r` as score.

    Whitening by the guide's own moments is the paper's adaptive contrast: against the prior
    instead, draws of a narrow q are told apart at once, and T says little of their density.
    Like the other estimators with a network it has an optimizer of its own, answers with a running
    average of the weights, and takes ``num_steps`` optimizer steps an update.

    :param int dim: dimensions of z.
    :param int context_dim: dimensions of the context; 0 for none.
    :param int hidden_dim: width of the discriminator.
    :param int depth: its hidden layers.
    :raises ValueError: as for ARDAE.

    Other parameters are those of :class:`~pyro_ardae.ARDAE`.

    Reference: L. Mescheder, S. Nowozin, A. Geiger, "Adversarial Variational Bayes", ICML 2017,
    arXiv:1701.04722.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        hidden_dim: int = 64,
        depth: int = 3,
        whitening: Mode = "pooled",
        num_folds: int = 4,
        num_steps: int | None = None,
        learning_rate: float = 4e-3,
        warm_up: int = 50,
        clip: float = 2.0,
        weight_decay: float = 0.05,
        min_age: int = 100,
        max_age: int = 8000,
    ) -> None:
        super().__init__(
            dim,
            context_dim,
            EnergyNetwork,
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

    def _loss(self, w: Tensor, features: Tensor, base: Student) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the discriminator: 2 log 2 where the two cannot be told apart."""
        return self.network.ratio_loss(self.weights, w, base.sample(w.shape, w), features)

    def _advantage(self, w: Tensor, features: Tensor, base: Student) -> Tensor:
        contrast = base.sample(w.shape, w)
        slow, fast = (
            self.network.ratio_loss(average, w, contrast, features)[0] for average in self.averages
        )
        return slow - fast

    @torch.no_grad()
    def log_prob(
        self,
        value: Float[Tensor, "N *batch dim"],
        samples: Float[Tensor, "S *batch dim"],
        context: Float[Tensor, "*batch C"] | None = None,
        *,
        center: Float[Tensor, "*batch dim"] | None = None,
    ) -> Float[Tensor, "N *batch"]:
        r""":math:`T + \log r`, the log-density if the discriminator is optimal."""
        frame, w, features = self._query(value, samples, context, center)
        energy = self.network.energy(self.averaged, w, torch.zeros_like(w[..., :1]), features)
        return (frame.log_base(w) - energy).reshape(value.shape[:-1])
