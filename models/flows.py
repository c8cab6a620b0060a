# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A normalizing flow as a guide head, by zuko."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from models.guides import GaussianGuide

__all__ = ["FlowGuide", "ShiftedFlow", "import_zuko"]


def import_zuko() -> Any:
    """Imports zuko and leaves the validation of distributions as it was.

    :raises ModuleNotFoundError: if zuko is not installed.
    """
    validate = Distribution._validate_args
    import zuko

    # Importing zuko turns the validation of all distributions off.
    Distribution.set_default_validate_args(validate)
    return zuko


class ShiftedFlow(dist.TorchDistribution):
    r"""A flow y, and :math:`z = \mu + \sigma \odot y`, in the direction that is fast to sample.

    The density of the last draw comes with it. That of any other value takes one pass of each
    transform per dimension.

    :param Distribution flow: zuko's distribution of y, event shape ``[D]``.
    :param Tensor loc: :math:`\mu`, ``[*batch, D]``.
    :param Tensor log_scale: :math:`\log \sigma`, ``[*batch, D]``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Distribution, loc: Tensor, log_scale: Tensor) -> None:
        self.flow, self.loc, self.log_scale = flow, loc, log_scale
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ShiftedFlow:
        """A distribution of another batch shape, without the last draw."""
        shape = torch.Size(batch_shape)
        event = self.event_shape
        flow = self.flow.expand(shape)
        return ShiftedFlow(
            flow, self.loc.expand(shape + event), self.log_scale.expand(shape + event)
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``[*sample, *batch, D]``, one pass of each transform."""
        y, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        z = self.loc + self.log_scale.exp() * y
        self._last = z, log_prob - self.log_scale.sum(-1)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density ``[*sample, *batch]``."""
        if self._last is not None and value is self._last[0]:
            return self._last[1]
        y = (value - self.loc) / self.log_scale.exp()
        return self.flow.log_prob(y) - self.log_scale.sum(-1)


class FlowGuide(nn.Module):
    """An inverse autoregressive flow, conditional on the features, over a diagonal Normal.

    Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016.

    :param int feature_dim: width of the features.
    :param int latent_dim: width of the latent.
    :param int transforms: number of autoregressive transforms, of alternating order.
    :param Sequence[int] hidden_dims: widths of the hidden layers of each.
    :raises ModuleNotFoundError: if zuko is not installed.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        *,
        transforms: int,
        hidden_dims: Sequence[int],
    ) -> None:
        super().__init__()
        zuko = import_zuko()
        self.base = GaussianGuide(feature_dim, latent_dim)
        forward = zuko.flows.MAF(
            latent_dim,
            feature_dim,
            transforms=transforms,
            hidden_features=[*hidden_dims],
            activation=nn.SiLU,
        )
        # Inverse autoregressive: a draw takes one pass per transform, not one per dimension.
        self.flow = zuko.flows.Flow(forward.transform.inv, forward.base)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.base.loc(features), self.base.log_scale(features)
        return ShiftedFlow(self.flow(features), loc, log_scale)
