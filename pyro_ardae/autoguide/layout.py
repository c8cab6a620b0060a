# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Which latents of a model share an implicit site, and where each lies in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import biject_to, register_kl

from pyro_ardae.autoguide.prototype import unconstrain

__all__ = ["Group", "find_groups", "point_mass"]


@dataclass
class _Slot:
    """One site: its batch sizes outside of the group's plates, and its event on the reals."""

    name: str
    event_shape: tuple[int, ...]
    dtype: torch.dtype
    others: tuple[int, ...]  # sizes by batch dimension, 1 where the dimension is a plate's

    @property
    def rank(self) -> int:
        return len(self.others)

    @property
    def size(self) -> int:
        return torch.Size(self.event_shape + self.others).numel()


@dataclass
class Group:
    """Latents that are drawn together: one vector of size ``dim`` per row of the plates.

    Rows have ``nesting`` batch dimensions, of size 1 where no plate of the group is.

    :param plates: names of the local plates, from the outermost to the innermost dimension; none
        for the globals.
    :param local_dims: their dimensions, negative.
    :param sizes: their sizes, in the prototype and in full.
    """

    plates: tuple[str, ...] = ()
    local_dims: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    slots: list[_Slot] = field(default_factory=list)

    @property
    def name(self) -> str:
        """An attribute's name, which no attribute of a module has, whatever a plate is called."""
        return f"plate_{self.label}" if self.plates else "globals"

    @property
    def label(self) -> str:
        """The plates' names as one identifier."""
        return re.sub(r"\W", "_", "__".join(self.plates))

    @property
    def dim(self) -> int:
        return sum(slot.size for slot in self.slots)

    @property
    def dtype(self) -> torch.dtype:
        """That of the vectors as they are packed."""
        return reduce(torch.promote_types, (slot.dtype for slot in self.slots))

    @property
    def nesting(self) -> int:
        return -min(self.local_dims, default=0)

    @property
    def rows(self) -> tuple[int, ...]:
        """Batch shape of the rows in the prototype."""
        return self._shape(0)

    @property
    def full_rows(self) -> tuple[int, ...]:
        """Batch shape of all rows."""
        return self._shape(1)

    def _shape(self, which: int) -> tuple[int, ...]:
        shape = [1] * self.nesting
        for dim, size in zip(self.local_dims, self.sizes, strict=True):
            shape[dim] = size[which]
        return tuple(shape)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of the sites in the prototype to ``[*full_rows, dim]``, repeated to full size."""
        parts = []
        for slot in self.slots:
            value, rank = values[slot.name], slot.rank
            event = len(slot.event_shape)
            for dim, (_, full) in zip(self.local_dims, self.sizes, strict=True):
                value = periodic_repeat(value, full, dim - event)
            pairs: list[int] = []  # every batch dimension is a row's or another's
            for size, other in zip(value.shape[:rank], slot.others, strict=True):
                pairs += [size // other, other]
            value = value.reshape((*pairs, *slot.event_shape))
            order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
            value = value.permute((*order, *range(2 * rank, 2 * rank + event)))
            parts.append(value.reshape((*self.full_rows, slot.size)))
        return torch.cat(parts, -1).detach().clone()

    def unpack(self, latent: Tensor, particles: int | None = None) -> dict[str, Tensor]:
        """``[*particles, *rows, dim]`` to values ``[*particles, *batch, *event]`` by site.

        :param particles: their number, to flatten their dimensions into one.
        """
        result = {}
        sizes, packed = [slot.size for slot in self.slots], self.dtype
        for slot, part in zip(self.slots, latent.split(sizes, -1), strict=True):
            rank, event = slot.rank, len(slot.event_shape)
            batch = part.shape[:-1]
            batch = (1,) * (rank - len(batch)) + batch
            lead, rows = batch[: len(batch) - rank], batch[len(batch) - rank :]
            part = part.reshape((*batch, *slot.others, *slot.event_shape))
            part = part.to(slot.dtype) if latent.dtype == packed else part  # or moved since
            p = len(lead)
            order = [*range(p)]
            for k in range(rank):
                order += [p + k, p + rank + k]
            order += range(p + 2 * rank, p + 2 * rank + event)
            shape = [size * other for size, other in zip(rows, slot.others, strict=True)]
            lead = lead if particles is None else torch.Size([particles])
            result[slot.name] = part.permute(order).reshape((*lead, *shape, *slot.event_shape))
        return result


def point_mass(prior: Any, unconstrained: Tensor, log_det: Tensor) -> dist.Delta:
    """A latent's value with the Jacobians of its two maps, noise to reals to support, as density.

    :param log_det: logs of the first one's diagonal, in the shape of ``unconstrained``.
    """
    transform = biject_to(prior.support)
    value = transform(unconstrained)
    batch_dim = value.dim() - prior.event_dim
    log_density: Any = 0.0
    if poutine.get_mask() is not False:
        log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
        log_density = sum_rightmost(log_density, log_density.dim() - batch_dim)
        log_density = log_density - sum_rightmost(log_det, log_det.dim() - batch_dim)
    return _PointMass(value, log_density=log_density, event_dim=prior.event_dim)


class _PointMass(dist.Delta):
    """A Delta whose divergence from a prior keeps the log density, which Pyro's drops."""


@register_kl(_PointMass, dist.Distribution)
def _kl_point_mass(p: Any, q: Any) -> Tensor:
    result: Tensor = p.log_density - q.log_prob(p.v)
    return result


def find_groups(
    prototype: Any, local: set[str], encoded: set[str | None], created: Mapping[str, Any]
) -> list[Group]:
    """Globals first, then one group for each set of local plates in which there are latents.

    :param local: names of plates that are local whether subsampled or not.
    :param encoded: names of plates with an encoder; ``None`` for an encoder of the only one.
    :param created: plates that the user creates for the guide.
    """
    frames = {
        frame.name: frame
        for _, site in prototype.iter_stochastic_nodes()
        for frame in site["cond_indep_stack"]
    }
    local = local | {name for name in encoded if name is not None}
    if not local <= frames.keys():
        raise ValueError(
            f"expected plates that hold latents, {sorted(frames)}, got "
            f"{sorted(local - frames.keys())}."
        )
    for name, frame in frames.items():
        plate = created.get(name)
        if _full(frame) != frame.size or (plate and plate.subsample_size != plate.size):
            local = local | {name}
    if None in encoded:
        candidates = local or set(frames)
        if len(candidates) != 1:
            raise ValueError(
                f"encoder: expected one plate with local latents, got {sorted(candidates)}. Pass a "
                "mapping from plates to encoders."
            )
        local = candidates
    groups: dict[tuple[str, ...], Group] = {}
    for name, site in prototype.iter_stochastic_nodes():
        inside = sorted(
            (f for f in site["cond_indep_stack"] if f.name in local), key=lambda f: f.dim
        )
        key = tuple(frame.name for frame in inside)
        if key not in groups:
            groups[key] = Group(
                key,
                tuple(frame.dim for frame in inside),
                tuple((frame.size, _full(frame)) for frame in inside),
            )
        value = unconstrain(site)
        event_dim = site["fn"].event_dim + value.dim() - site["value"].dim()
        batch = list(value.shape[: value.dim() - event_dim])
        for frame in inside:
            batch[frame.dim] = 1
        groups[key].slots.append(
            _Slot(name, tuple(value.shape[value.dim() - event_dim :]), value.dtype, tuple(batch))
        )
    labels: dict[str, tuple[str, ...]] = {}
    for key, group in groups.items():
        if labels.setdefault(group.label, key) != key:
            raise ValueError(
                f"expected names of plates that differ as identifiers, got {list(key)} and "
                f"{list(labels[group.label])}, which are both '{group.label}'. Rename one."
            )
    return sorted(groups.values(), key=lambda group: len(group.plates) > 0)


def _full(frame: Any) -> int:
    return int(frame.full_size or frame.size)
