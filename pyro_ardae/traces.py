# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of models and guides, and what is read off their traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ardae.random import fork_rng

__all__ = [
    "OR_EACH",
    "advised",
    "common_plates",
    "guide_draws",
    "joined",
    "latent_sites",
    "mask_of",
    "plate_nesting",
    "refuse_dimensions",
    "refuse_subsampling",
    "run_each",
    "run_many",
    "sample_sites",
    "traces_of",
    "unscaled_log_prob",
]

_PLATE = "_pyro_ardae_draws"

#: What helps where model or guide do not broadcast over a plate of draws.
OR_EACH = (
    "Write model and guide so that they broadcast over one more plate, or pass parallel=False."
)


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
            traces = [first, *run_each(guide, args, num_samples - 1)]
    missing = [name for name in sites if name not in traces[0].nodes]
    if missing:
        raise ValueError(
            f"expected a guide that draws all latent sites of the model, got none for "
            f"{', '.join(repr(name) for name in missing)}: are model and guide a pair? A site of "
            "the data is latent where they are left out of the arguments."
        )
    result = {}
    for name, site in sites.items():
        values = [trace.nodes[name]["value"] for trace in traces]
        value = joined(values, max_plate_nesting + site["fn"].event_dim)
        value = value.expand(num_samples, *value.shape[1:])
        if not torch.isfinite(value).all():
            raise ValueError(f"site '{name}': expected finite draws of the guide, got NaN or inf")
        result[name] = value.detach()
    return result


def run_many(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    num_samples: int,
    max_plate_nesting: int,
    alone: Callable[..., Any] | None = None,
) -> poutine.Trace:
    """A trace of ``fn`` inside of a plate of ``num_samples``, left of all its own plates.

    :param alone: what runs without that plate, if not ``fn``.
    :raises RuntimeError: if it fails there.
    :raises ValueError: for a site that has more dimensions than these plates.
    """
    dim = -1 - max_plate_nesting
    once = partial(run_each, alone or fn, args, 1)
    with advised(num_samples, once), poutine.block(), pyro.plate(_PLATE, num_samples, dim=dim):
        trace = poutine.trace(fn).get_trace(*args)
    refuse_dimensions([trace], 1 + max_plate_nesting, OR_EACH)
    return trace


@contextmanager
def advised(num_samples: int, alone: Callable[[], object], advice: str = OR_EACH) -> Iterator[None]:
    """Errors of what runs in a plate of so many draws say what to do, if it runs without.

    :param alone: runs it without.
    :raises RuntimeError: of torch or Pyro, with the advice.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError or not _succeeds(alone):  # or lacks memory, say
            raise
        text = f"failed in a plate of {num_samples} draws. {advice} {error}"
        raise RuntimeError(text) from error


def _succeeds(run: Callable[[], object]) -> bool:
    """Whether it does. Random states and the names in Pyro's store of parameters stay the same."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        with fork_rng(), torch.no_grad():
            run()
    except Exception:
        return False
    finally:
        for name in set(store.keys()) - before:
            del store[name]
    return True


def refuse_dimensions(traces: Iterable[poutine.Trace], nesting: int, advice: str) -> None:
    """Refuse sites with dimensions left of all plates: what does not broadcast over draws has their
    number twice, and would count as often.

    :param traces: of a model, a guide, or both.
    :param int nesting: number of dimensions of plates, that of the draws included.
    :raises ValueError: naming the site.
    """
    for site in (site for trace in traces for site in sample_sites(trace)):
        shape = tuple(site["fn"].batch_shape)
        if len(shape) > nesting:
            raise ValueError(
                f"site '{site['name']}': expected {nesting} dimensions at most in a plate of "
                f"draws, got the batch shape {shape}. {advice}"
            )


def run_each(
    fn: Callable[..., Any], args: tuple[Any, ...], num_samples: int
) -> list[poutine.Trace]:
    """As many traces of ``fn``."""
    with poutine.block():
        return [poutine.trace(fn).get_trace(*args) for _ in range(num_samples)]


def joined(values: list[Tensor], rank: int) -> Tensor:
    """One tensor ``[draws or 1, …]`` of what a run in a plate of all draws has given, or a run for
    each.

    :param values: of each run.
    :param int rank: number of dimensions, besides that of the draws.
    """
    if len(values) > 1:
        values = [torch.stack([_padded(value, rank) for value in values])]
    return _padded(values[0], 1 + rank)


def _padded(value: Tensor, rank: int) -> Tensor:
    return value.reshape((1,) * (rank - value.dim()) + value.shape)


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


def mask_of(site: Any) -> Tensor | None:
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
    frames = (
        frame for trace in traces for site in sample_sites(trace) for frame in _vectorized(site)
    )
    return max((-frame.dim for frame in frames), default=0)


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The latent sites of a model's trace, in its order."""
    return {site["name"]: site for site in sample_sites(trace) if not site["is_observed"]}


def sample_sites(trace: poutine.Trace) -> list[Any]:
    """Its sites that are random or observed, in order."""
    return [
        site for site in trace.nodes.values() if site["type"] == "sample" and not _ignored(site)
    ]


def _ignored(site: Any) -> bool:
    """Indices of plates, and values that are not random."""
    return site_is_subsample(site) or site["infer"].get("_deterministic", False)


def _vectorized(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def common_plates(trace: poutine.Trace) -> list[Any]:
    """Frames of the plates that all sites are in, from left to right."""
    sites = sample_sites(trace)
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
                "plate at its full size; if it is the guide that makes the subsample, give it "
                "create_plates=…, with a size from the arguments."
            )
