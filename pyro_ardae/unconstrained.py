# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model as a log-joint density of flat, unconstrained latents, for many draws at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_ardae.prototype import refuse_moving_supports
from pyro_ardae.random import fork_rng

__all__ = [
    "UnconstrainedModel",
    "guide_draws",
    "latent_sites",
    "plate_nesting",
    "refuse_subsampling",
    "run_many",
    "traces_of",
    "unscaled_log_prob",
]

_PLATE = "_pyro_ardae_draws"


class UnconstrainedModel:
    r"""The log-joint :math:`\log p(x, z(u)) + \log |\det \partial z / \partial u|` of a model.

    A draw u is the concatenation of all latent sites, each taken to the reals by
    ``biject_to(site's support).inv``. If all sites, latent and observed, lie in the same plates,
    these are the batch: every data point has latents and a log-joint of its own. Otherwise the
    whole model is one point, with an empty batch.

    Scales (of ``poutine.scale``, of subsampling) are left out, masks are kept. A latent that is
    masked out has no part in the model, so its u counts as standard normal: the integral over it
    is 1. The model runs inside of one more plate, so it has to broadcast, as for
    ``vectorize_particles=True``.

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
        self, model: Callable[..., Any], *args: Any, guide: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.args = model, args
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
        common = _common_plates(trace)
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
            counts = _mask(site)
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
        constrained = self._constrained(latent)
        values = {name: value for name, (value, *_) in constrained.items()}
        trace = run_many(
            poutine.condition(self.model, data=values),
            self.args,
            len(latent),
            self.max_plate_nesting,
        )
        terms = [unscaled_log_prob(site) for site in _samples(trace)]
        for name, (_, term, real) in constrained.items():
            counts = _mask(trace.nodes[name])
            if counts is not None:
                normal = self._by_element(-0.5 * (real.square() + math.log(2 * math.pi)))
                term = torch.where(counts, term, normal)
            terms.append(term)
        return torch.stack([self._sum(term, len(latent)) for term in terms]).sum(0)

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


def guide_draws(
    guide: Callable[..., Any],
    sites: Mapping[str, Any],
    args: tuple[Any, ...],
    num_samples: int,
    max_plate_nesting: int,
    *,
    parallel: bool = True,
) -> dict[str, Tensor]:
    """Draws of a guide, by site ``[num_samples, *plates, *event]``.

    :param callable guide: the guide.
    :param sites: the latent sites of the model, by name; all have to be drawn.
    :param args: arguments of the guide.
    :param int num_samples: number of draws.
    :param int max_plate_nesting: number of dimensions of plates in the result.
    :param bool parallel: run the guide once, inside of one more plate; otherwise once a draw.
    :raises ValueError: if the guide leaves out a site of the model, or draws are not finite.
    """
    with torch.no_grad(), poutine.block():
        # Automatic guides look at the model in their first call: not inside of another plate.
        first = poutine.trace(guide).get_trace(*args)
        if parallel:
            traces = [run_many(guide, args, num_samples, max_plate_nesting)]
        else:
            rest = (poutine.trace(guide).get_trace(*args) for _ in range(num_samples - 1))
            traces = [first, *rest]
    missing = [name for name in sites if name not in traces[0].nodes]
    if missing:
        raise ValueError(
            f"expected a guide that draws all latent sites of the model, got none for "
            f"{', '.join(repr(name) for name in missing)}: are model and guide a pair?"
        )
    result = {}
    for name, site in sites.items():
        event_dim = site["fn"].event_dim
        rank = (1 if parallel else 0) + max_plate_nesting + event_dim
        values = [trace.nodes[name]["value"] for trace in traces]
        values = [value.reshape((1,) * (rank - value.dim()) + value.shape) for value in values]
        value = values[0] if parallel else torch.stack(values)
        value = value.expand(num_samples, *value.shape[1:])
        if not torch.isfinite(value).all():
            raise ValueError(f"site '{name}': expected finite draws of the guide, got NaN or inf")
        result[name] = value.detach()
    return result


def run_many(
    fn: Callable[..., Any], args: tuple[Any, ...], num_samples: int, max_plate_nesting: int
) -> poutine.Trace:
    """A trace of ``fn`` inside of a plate of ``num_samples``, left of all its own plates."""
    with poutine.block(), pyro.plate(_PLATE, num_samples, dim=-1 - max_plate_nesting):
        return poutine.trace(fn).get_trace(*args)


def traces_of(
    model: Callable[..., Any], guide: Callable[..., Any] | None, args: tuple[Any, ...]
) -> list[poutine.Trace]:
    """A trace of the guide and one of the model with its draws; of the model alone, drawn from the
    prior, if there is no guide.
    """
    with torch.no_grad(), poutine.block():
        if guide is None:
            return [poutine.trace(model).get_trace(*args)]
        drawn = poutine.trace(guide).get_trace(*args)
        return [drawn, poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args)]


def unscaled_log_prob(site: Any) -> Tensor:
    """The log-density of a site by element, 0 where masked."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])


def _mask(site: Any) -> Tensor | None:
    """Where a site counts, if anywhere it does not."""
    masks = [site["mask"]]
    if isinstance(site["fn"], MaskedDistribution):
        masks.append(site["fn"]._mask)
    found = [
        torch.as_tensor(mask, device=site["value"].device) for mask in masks if mask is not None
    ]
    return None if not found else found[0] if len(found) == 1 else found[0] & found[1]


def plate_nesting(*traces: poutine.Trace) -> int:
    """The number of dimensions, counted from the right, that plates of the traces take."""
    frames = (frame for trace in traces for site in _samples(trace) for frame in _vectorized(site))
    return max((-frame.dim for frame in frames), default=0)


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The latent sites of a model's trace, in its order."""
    return {site["name"]: site for site in _samples(trace) if not site["is_observed"]}


def _samples(trace: poutine.Trace) -> list[Any]:
    return [
        site for site in trace.nodes.values() if site["type"] == "sample" and not _ignored(site)
    ]


def _ignored(site: Any) -> bool:
    """Indices of plates, and values that are not random."""
    return site_is_subsample(site) or site["infer"].get("_deterministic", False)


def _vectorized(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _common_plates(trace: poutine.Trace) -> list[Any]:
    """Frames of the plates that all sites are in, from left to right."""
    sites = _samples(trace)
    frames = {frame.name: frame for frame in _vectorized(sites[0])}
    for site in sites[1:]:
        frames = {frame.name: frame for frame in _vectorized(site) if frame.name in frames}
    return sorted(frames.values(), key=lambda frame: frame.dim)


def refuse_subsampling(trace: poutine.Trace, allowed: Iterable[str] = ()) -> None:
    """Refuse plates that hold a part of the data.

    :param trace: a trace of the model.
    :param allowed: names of plates that may be subsampled, by indices that are given: those drawn
        at random differ between two runs of the model.
    :raises ValueError: naming the plate.
    """
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        random = site_is_subsample(site) and len(site["value"]) < site["fn"].size
        frames = [f for f in _vectorized(site) if f.name not in allowed and f.size != f.full_size]
        if random or frames:
            name = site["name"] if random else frames[0].name
            raise ValueError(
                f"plate '{name}': expected all data, got a subsample. Evaluate the model with the "
                "plate at its full size."
            )
