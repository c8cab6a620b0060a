# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model as a log-joint density of flat, unconstrained latents, for many draws at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_ardae.autoguide.prototype import refuse_moving_supports
from pyro_ardae.random import fork_rng
from pyro_ardae.traces import (
    common_plates,
    joined,
    latent_sites,
    mask_of,
    plate_nesting,
    refuse_subsampling,
    run_each,
    run_many,
    sample_sites,
    traces_of,
    unscaled_log_prob,
)

__all__ = ["UnconstrainedModel"]


class UnconstrainedModel:
    r"""The log-joint :math:`\log p(x, z(u)) + \log |\det \partial z / \partial u|` of a model.

    A draw u is the concatenation of all latent sites, each taken to the reals by
    ``biject_to(site's support).inv``. If all sites, latent and observed, lie in the same plates,
    these are the batch: every data point has latents and a log-joint of its own. Otherwise the
    whole model is one point, with an empty batch.

    Scales (of ``poutine.scale``, of subsampling) are left out, masks are kept. A latent that is
    masked out has no part in the model, so its u counts as standard normal: the integral over it
    is 1. The model runs inside of one more plate, so it has to broadcast, as for
    ``vectorize_particles=True``; or, if it does not, once for each draw.

    Example::

        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> joint = UnconstrainedModel(model, torch.zeros(7))
        >>> joint.dim, joint.batch_shape, joint.log_joint(torch.zeros(5, 7, 1)).shape
        (1, torch.Size([7]), torch.Size([5, 7]))

    :param callable model: a Pyro model with continuous latent sites.
    :param args: its arguments.
    :param callable guide: a guide of it, from whose draws the model's structure is found out; the
        prior's by default, which an improper prior does not have.
    :param bool parallel: whether to run the model once for all draws.
    :ivar int dim: dimensions of u, for every element of the batch.
    :ivar torch.Size batch_shape: sizes of the plates that hold all sites, ``()`` for none.
    :ivar tuple plates: their names.
    :ivar dict sites: the latent sites of a trace of the model, by name.
    :ivar int max_plate_nesting: plates' dimensions, counted from the right.
    :ivar trace: a trace of the model.
    :raises ValueError: without latent sites, for a discrete one, for one whose support varies, as
        with bounds that depend on other latents, and for a subsampled plate where the data points
        that are left out would count.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        guide: Callable[..., Any] | None = None,
        parallel: bool = True,
    ) -> None:
        self.model, self.args, self.parallel = model, args, parallel
        *_, trace = traces_of(model, guide, args)
        with fork_rng():  # the stream goes on as after one run
            *_, again = traces_of(model, guide, args)
        self.trace = trace
        self.sites = latent_sites(trace)
        if not self.sites:
            raise ValueError(
                "expected a model with latent sites, got none: is everything observed?"
            )
        for name, site in self.sites.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"site '{name}': expected continuous latents, got a discrete "
                    f"{type(site['fn']).__name__}. Sum it out in the model (e.g. with "
                    "MixtureSameFamily) to evaluate the model."
                )
        refuse_moving_supports(self.sites, again)
        self.max_plate_nesting = plate_nesting(trace)
        common = common_plates(trace)
        refuse_subsampling(trace, {frame.name for frame in common})
        self.plates: tuple[str, ...] = tuple(frame.name for frame in common)
        self.batch_shape = torch.Size(frame.size for frame in common)
        # Positions of dimensions of [draws, *plates]: those of the batch, and the rest.
        nesting = self.max_plate_nesting
        self._batch_dims = [1 + nesting + frame.dim for frame in common]
        self._other_dims = [d for d in range(1, 1 + nesting) if d not in self._batch_dims]
        self._shapes: dict[str, torch.Size] = {}  # [other plates of the site, event]
        for name, site in self.sites.items():
            value = site["value"]
            event = value.dim() - site["fn"].event_dim
            plates = (1,) * (nesting - event) + value.shape[:event]
            real = biject_to(site["fn"].support).inv(value)
            # A transform may change the number of event dimensions: [4] of a simplex is [3].
            others = torch.Size(plates[d - 1] for d in self._other_dims)
            self._shapes[name] = others + real.shape[event:]
        self.dim = sum(shape.numel() for shape in self._shapes.values())

    def pack(self, values: Mapping[str, Tensor]) -> Float[Tensor, "draws *batch dim"]:
        """Latents to the reals.

        :param values: by site, ``[draws, *plates, *event]`` with ``max_plate_nesting`` dimensions
            of plates, as :func:`guide_draws` gives them.
        """
        parts = []
        for name, site in self.sites.items():
            real = biject_to(site["fn"].support).inv(values[name])
            first = 1 + self.max_plate_nesting
            order = [0, *self._batch_dims, *self._other_dims, *range(first, real.dim())]
            real = real.permute(order)
            parts.append(real.reshape(len(real), *self.batch_shape, self._shapes[name].numel()))
        return torch.cat(parts, -1)

    def redraw_masked(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents, those that are masked out drawn anew as they count: whatever a guide makes of
        them says nothing of the model.

        :param values: as for :meth:`pack`.
        """
        result = dict(values)
        for name, site in self.sites.items():
            counts = mask_of(site)
            if counts is not None:
                transform = biject_to(site["fn"].support)
                real = transform.inv(values[name])
                event = real.dim() - 1 - self.max_plate_nesting
                counts = counts.reshape(counts.shape + (1,) * event)
                result[name] = transform(torch.where(counts, real, torch.randn_like(real)))
        return result

    def unpack(self, latent: Float[Tensor, "draws *batch dim"]) -> dict[str, Tensor]:
        """The inverse of :meth:`pack`."""
        return {name: value for name, (value, *_) in self._constrained(latent).items()}

    def log_joint(self, latent: Float[Tensor, "draws *batch dim"]) -> Float[Tensor, "draws *batch"]:
        """The log-joint density of unconstrained latents, in nats; differentiable."""
        constrained, nesting = self._constrained(latent), self.max_plate_nesting
        values = {name: value for name, (value, *_) in constrained.items()}
        traces = self.runs(self.model, values, len(latent))
        terms = [
            joined([unscaled_log_prob(trace.nodes[site["name"]]) for trace in traces], nesting)
            for site in sample_sites(traces[0])
        ]
        for name, (_, term, real) in constrained.items():
            counts = mask_of(traces[0].nodes[name])
            if counts is not None:
                normal = self._by_element(-0.5 * (real.square() + math.log(2 * math.pi)))
                term = torch.where(counts, term, normal)
            terms.append(term)
        return torch.stack([self._sum(term, len(latent)) for term in terms]).sum(0)

    def runs(
        self, model: Callable[..., Any], values: Mapping[str, Tensor], num_draws: int
    ) -> list[poutine.Trace]:
        """Runs of the model, or of one with its sites, given draws of latents: one in a plate of
        all, or one for each.

        :param callable model: the model.
        :param values: by site, as for :meth:`pack`; those that are left out are drawn.
        :param int num_draws: number of draws.
        """

        def given(index: int) -> Callable[..., Any]:
            own = {
                name: value[index].reshape(self.sites[name]["value"].shape)
                for name, value in values.items()
            }
            conditioned: Callable[..., Any] = poutine.condition(model, data=own)
            return conditioned

        if self.parallel:
            fn = poutine.condition(model, data=values)
            return [run_many(fn, self.args, num_draws, self.max_plate_nesting, given(0))]
        return [run_each(given(index), self.args, 1)[0] for index in range(num_draws)]

    def _constrained(self, latent: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By site, its value, log |det dz/du| and u, ``[draws, *plates, …]``."""
        result = {}
        parts = latent.split([shape.numel() for shape in self._shapes.values()], -1)
        order = [0, *self._batch_dims, *self._other_dims]
        back = [order.index(d) for d in range(len(order))]
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            real = part.reshape(*latent.shape[:-1], *self._shapes[name])
            real = real.permute(*back, *range(len(back), real.dim()))
            transform = biject_to(site["fn"].support)
            value = transform(real)
            jacobian = transform.log_abs_det_jacobian(real, value)
            result[name] = (value, self._by_element(jacobian), real)
        return result

    def _by_element(self, term: Tensor) -> Tensor:
        """Sum over the dimensions of an event."""
        rank = 1 + self.max_plate_nesting
        return term.flatten(rank).sum(-1) if term.dim() > rank else term

    def _sum(self, term: Tensor, num_draws: int) -> Tensor:
        """Sum over everything but draws and batch."""
        rank = 1 + self.max_plate_nesting
        term = term.reshape((1,) * (rank - term.dim()) + term.shape)
        if self._other_dims:
            term = term.sum(self._other_dims)
        return term.expand(num_draws, *self.batch_shape)
