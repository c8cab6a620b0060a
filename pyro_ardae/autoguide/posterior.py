# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The implicit posterior of latents that are drawn together, as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyro_ardae.autoguide.sampler import ResidualSampler, TriangularMap
from pyro_ardae.implicit import Implicit

__all__ = ["RowPosterior"]

#: Numbers of noise that one pass of the networks takes at most, when many draws are made.
_CHUNK = 2**22


class RowPosterior(nn.Module):
    r"""Posterior of D latents on the reals, for every row of some plates.

    A row is described by a vector of 3 D + E numbers: where it starts, location, log scale, and an
    embedding by which the networks tell rows apart. The latents are
    :math:`z = T(y; \text{row}, u)`, :math:`y \sim` :class:`~pyro_ardae.Implicit` given embedding
    and u, where u are the globals' own y.

    All parameters are plain ones, so that a copy is a copy: a ``PyroParam`` of it would be that of
    Pyro's store.

    :param loc: where the latents start, ``[*rows, D]``.
    :param init_scale: their standard deviation then.
    :param condition_dim: width of u; 0 for none.
    :param embedding_dim: E.
    :param feature_dim: width of an encoder's features, from which a linear layer makes the
        vectors of the rows; ``None`` for a learned table of them.
    :param extra_noise: noise besides D dimensions.
    :param hidden_dims: as in :class:`~pyro_ardae.autoguide.sampler.ResidualSampler`, also for what
        follows.
    :param gain: speed of the network.
    :param input_scale: scale of the noise.
    """

    init_loc: Tensor

    def __init__(
        self,
        loc: Float[Tensor, "*rows D"],
        init_scale: float,
        *,
        condition_dim: int,
        embedding_dim: int,
        feature_dim: int | None,
        extra_noise: int,
        hidden_dims: Sequence[int],
        gain: float,
        input_scale: float,
    ) -> None:
        super().__init__()
        self.dim, self.embedding_dim = loc.shape[-1], embedding_dim
        self.noise_dim = self.dim + extra_noise
        self.init_scale = init_scale
        per_row = feature_dim is None  # an encoder sees rows that the prototype has not
        init_loc = loc if per_row else loc.flatten(0, -2).mean(0)
        self.register_buffer("init_loc", init_loc)
        start = torch.zeros_like(torch.cat([loc, loc], -1))
        if feature_dim is None:
            embedding = 0.1 * torch.randn(*loc.shape[:-1], embedding_dim).to(loc)
            start = torch.cat([start, embedding], -1)
            self.rows = nn.Parameter(start)
        else:
            head = nn.Linear(feature_dim, start.shape[-1] + embedding_dim)
            with torch.no_grad():
                head.weight[: start.shape[-1]].zero_()
                head.bias[: start.shape[-1]].copy_(start.flatten(0, -2).mean(0))
            self.head = head.to(loc)
        self.sampler = ResidualSampler(
            self.dim,
            embedding_dim + condition_dim,
            noise_dim=self.noise_dim,
            hidden_dims=hidden_dims,
            gain=gain,
            input_scale=input_scale,
        ).to(loc)
        self.map = TriangularMap(self.dim, condition_dim, embedding_dim).to(loc)

    def follow_store(self, name: str, *, take: bool = True) -> None:
        """Take the parameters from Pyro's store where it has others, and leave the start there.

        A module with its own would go on with these, while the optimizer moves those of the store.

        :param name: of this module in the store.
        :param take: whether to take them.
        :raises ValueError: if they have other shapes, as those of a guide of another model.
        """
        if pyro.settings.get("module_local_params"):
            return
        params = pyro.get_param_store()._params
        start = param_with_module_name(name, "init_loc")
        own = {param_with_module_name(name, n): p for n, p in self.named_parameters()}
        if take and any(params.get(full, p) is not p for full, p in own.items()):
            for full, p in (*own.items(), (start, self.init_loc)):
                found = params.get(full, p).shape
                if found != p.shape:
                    raise ValueError(
                        f"AutoImplicit: expected parameter '{full}' of shape {tuple(p.shape)}, got "
                        f"{tuple(found)} in Pyro's parameter store: of a guide of another model? "
                        "Call pyro.clear_param_store() before a new one."
                    )
            with poutine.block():
                pyro.module(name, self, update_module_params=True)
            if start in params:
                self.init_loc.copy_(params[start].detach())
        if start not in params:  # which is saved with the rest, but never moved
            with poutine.block(), torch.inference_mode(False):
                pyro.param(start, self.init_loc.clone())
            params[start].requires_grad_(False)

    def describe(
        self,
        features: Float[Tensor, "*rows C"] | None = None,
        *,
        subsample: bool = False,
    ) -> Float[Tensor, "*some K"]:
        """What tells rows apart.

        :param features: of the rows, where there is an encoder.
        :param subsample: whether only the rows in the subsample of the plates around are wanted.
        """

        def some(rows: Tensor) -> Tensor:
            return pyro.subsample(rows, event_dim=1) if subsample else rows

        if features is None:
            return torch.cat([some(self.init_loc), some(self.rows)], -1)
        learned = self.head(some(features))
        return torch.cat([self.init_loc.expand(*learned.shape[:-1], -1), learned], -1)

    def implicit(
        self, rows: Float[Tensor, "*rows K"], u: Float[Tensor, "*batch C"] | None
    ) -> Implicit:
        """The distribution of y."""
        zero = torch.zeros(self.noise_dim, dtype=rows.dtype, device=rows.device)
        noise = dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(1)
        context: Tensor | None = None
        if self.embedding_dim or u is not None:
            context = rows[..., 3 * self.dim :]
            if u is not None:
                shape = torch.broadcast_shapes(rows.shape[:-1], u.shape[:-1])
                context = torch.cat([context.expand(*shape, -1), u.expand(*shape, -1)], -1)
        return Implicit(self.sampler.bind(context), noise, context, (self.dim,))

    def transport(
        self,
        y: Float[Tensor, "*batch D"],
        rows: Float[Tensor, "*rows K"],
        u: Float[Tensor, "*batch C"] | None,
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Latents z, and the log of the Jacobian's diagonal."""
        start, loc, log_scale, embedding = rows.split([*[self.dim] * 3, self.embedding_dim], -1)
        rate = self.map.RATE
        log_scale = rate * log_scale + math.log(self.init_scale)
        loc = start + log_scale.exp() * rate * loc
        z, log_det = self.map(y, loc, log_scale, u, embedding)
        return z, log_det

    def draw(
        self,
        noise: Float[Tensor, "S *batch noise"],
        rows: Float[Tensor, "*batch K"],
        u: Float[Tensor, "S *batch C"] | None,
    ) -> tuple[Float[Tensor, "S *batch D"], Float[Tensor, "S *batch D"]]:
        """Many draws of y and z, in chunks that bound the memory."""
        size = max(1, _CHUNK // max(1, noise[0].numel()))
        ys, zs = [], []
        for start in range(0, len(noise), size):
            at = slice(start, start + size)
            given = None if u is None else u[at]
            ys.append(self.implicit(rows, given).sampler(noise[at]))
            zs.append(self.transport(ys[-1], rows, given)[0])
        return torch.cat(ys), torch.cat(zs)
