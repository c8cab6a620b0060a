# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Semi-implicit distributions: mixtures of infinitely many explicit ones, by a finite bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from models.hierarchical_guide import HierarchicalGuide

__all__ = ["SemiImplicit", "SemiImplicitGuide"]


class SemiImplicit(dist.TorchDistribution):
    r"""The mixture :math:`q(z) = E_{q(\psi)}\, q(z \mid \psi)`, reparameterized.

    For its last draw, :math:`z \sim q(\cdot \mid \psi_0)`, the log-density is that of a finite
    mixture of the component it came from and of K fresh ones,

    .. math:: \log \frac{1}{K + 1} \sum_{k=0}^{K} q(z \mid \psi_k),
        \qquad \psi_1, \ldots, \psi_K \sim q(\psi).

    Its expectation lies above that of :math:`\log q(z)` and falls to it as K grows. So
    :class:`pyro.infer.Trace_ELBO` with this distribution is the bound of SIVI, eq. 8, below the
    ELBO, and :math:`p(x, z)` over the density an unbiased estimate of p(x) at every K.
    For other values there is no such bound, and an error.

    :param TorchDistribution mixing: :math:`q(\psi)`, reparameterized.
    :param Callable conditional: :math:`\psi` ``[*sample, *batch, A]`` to
        :math:`q(\cdot \mid \psi)`, reparameterized.
    :param int num_mixing: K, at least 1.
    :param int event_dim: width of z.
    :raises ValueError: if K is below 1.

    Reference: M. Yin, M. Zhou, "Semi-Implicit Variational Inference", ICML 2018, arXiv:1805.11183.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        mixing: dist.TorchDistribution,
        conditional: Callable[[Tensor], dist.TorchDistribution],
        *,
        num_mixing: int,
        event_dim: int,
    ) -> None:
        if num_mixing < 1:
            raise ValueError(f"num_mixing: expected at least 1, got {num_mixing}")
        self.mixing, self.conditional, self.num_mixing = mixing, conditional, num_mixing
        self._last: tuple[Tensor, dist.TorchDistribution] | None = None
        super().__init__(mixing.batch_shape, torch.Size([event_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SemiImplicit:
        """A distribution of another batch shape, without the last draw."""
        return SemiImplicit(
            self.mixing.expand(torch.Size(batch_shape)),
            self.conditional,
            num_mixing=self.num_mixing,
            event_dim=self.event_shape[0],
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``[*sample, *batch, D]``."""
        component = self.conditional(self.mixing.rsample(torch.Size(sample_shape)))
        value: Tensor = component.rsample()
        self._last = value, component
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The bound for the last draw, ``[*sample, *batch]``; the K fresh components are shared by
        its sample dimensions.

        :raises ValueError: for any other value.
        """
        if self._last is None or value is not self._last[0]:
            raise ValueError(
                "SemiImplicit.log_prob: expected the last draw of this distribution, whose "
                "component is known, got another value; the density of that is intractable"
            )
        own = self._last[1].log_prob(value)
        psi = self.mixing.rsample(torch.Size([self.num_mixing]))
        lead = value.dim() - 1 - len(self.batch_shape)
        components = self.conditional(psi[(slice(None),) + (None,) * lead])
        # The K components in front, sample dimensions after them.
        others = components.log_prob(value).logsumexp(0)
        return torch.logaddexp(own, others) - math.log(self.num_mixing + 1)


class SemiImplicitGuide(nn.Module):
    """The marginal of a hierarchical guide, trained by the bound of SIVI.

    :param HierarchicalGuide guide: the guide.
    :param int num_mixing: K of :class:`SemiImplicit`.
    """

    def __init__(self, guide: HierarchicalGuide, *, num_mixing: int) -> None:
        super().__init__()
        self.guide, self.num_mixing = guide, num_mixing

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        return SemiImplicit(
            self.guide.mixing(features),
            partial(self.guide.conditional, features),
            num_mixing=self.num_mixing,
            event_dim=self.guide.latent_dim,
        )
