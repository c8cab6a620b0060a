# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide for ArviZ: summaries, pair plots, predictive checks, cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ardae.implicit import unwrapped
from pyro_ardae.traces import guide_draws, joined, refuse_subsampling, unscaled_log_prob
from pyro_ardae.unconstrained import UnconstrainedModel

__all__ = ["to_arviz"]


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    parallel: bool = True,
) -> Any:
    """Draws of a guide and what follows from them, as ArviZ takes them.

    ===========================  ===================================================================
    group                        content
    ===========================  ===================================================================
    ``posterior``                the model's latent sites drawn from the guide, and its
                                 ``pyro.deterministic`` ones
    ``posterior_predictive``     the observed sites drawn anew, given each draw of the posterior
    ``log_likelihood``           their log-density at the data, pointwise, nats, unscaled
    ``observed_data``            the data
    ``prior``                    the latent sites drawn from the model
    ===========================  ===================================================================

    Dimensions are ``chain`` (1), ``draw``, one for each plate, with its name, and
    ``{site}_dim_{i}`` for those of an event. Draws of a guide are independent, so r-hat and
    effective sample sizes say nothing about the quality of the guide.

    Sites of the data whose values depend on the mask of a plate count 0 where masked.

    Example::

        >>> idata = to_arviz(model, guide, y, num_samples=2000)  # doctest: +SKIP
        >>> az.summary(idata), az.loo(idata)                     # doctest: +SKIP

    :param callable model: a Pyro model with continuous latents, not conditioned on draws.
    :param callable guide: a guide of it, of any kind.
    :param args: arguments of both, data included; keyword arguments by ``functools.partial``.
    :param int num_samples: draws, at least 2.
    :param bool prior: whether to draw the prior, which an improper one cannot be.
    :param coords: labels by dimension, e.g. ``{"school": names}``; integers from 0 where left out.
    :param dims: names of a site's dimensions, in place of those above.
    :param bool parallel: run guide and model once for all draws, in one more plate, for which they
        have to broadcast as for ``vectorize_particles=True``; ``False`` runs them once a draw.
    :returns: ``arviz.InferenceData`` (ArviZ 0.x), ``xarray.DataTree`` (ArviZ 1.x).
    :raises ModuleNotFoundError: if ArviZ is not installed.
    :raises ValueError: for a subsampled plate, a discrete latent site, a guide that leaves out a
        site, or a name of ``dims`` or ``coords`` that fits nothing.
    :raises RuntimeError: where model or guide fail in one more plate, with the advice to take
        ``parallel=False``.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2, got {num_samples}")
    joint = UnconstrainedModel(model, *args, guide=guide, parallel=parallel)
    refuse_subsampling(joint.trace)
    sites = {
        name: site
        for name, site in joint.trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not isinstance(site["fn"], Unit)
    }
    derived = [name for name, site in sites.items() if _is_derived(site)]
    observed = [name for name in sites if sites[name]["is_observed"] and name not in derived]
    names = _dims(sites, dims or {})
    unobserved = _Unobserved(observed)(model)

    draws = guide_draws(
        guide, joint.sites, args, num_samples, joint.max_plate_nesting, parallel=parallel
    )
    with torch.no_grad():
        given = joint.runs(model, draws, num_samples)
        values = {**draws, **{name: joined(_values(given, name), 0) for name in derived}}
        groups = {"posterior": _arrays(values, sites, num_samples)}
        if observed:
            anew = joint.runs(unobserved, draws, num_samples)
            values = {name: joined(_values(anew, name), 0) for name in observed}
            groups["posterior_predictive"] = _arrays(values, sites, num_samples)
            values = {
                name: joined([unscaled_log_prob(trace.nodes[name]) for trace in given], 0)
                for name in observed
            }
            groups["log_likelihood"] = _arrays(values, sites, num_samples, event=False)
            groups["observed_data"] = {name: _numpy(sites[name]["value"]) for name in observed}
        if prior:
            first = joint.runs(unobserved, {}, num_samples)
            values = {name: joined(_values(first, name), 0) for name in (*joint.sites, *derived)}
            groups["prior"] = _arrays(values, sites, num_samples)
    return _build(groups, names, _coords(groups, names, coords or {}))


def _values(traces: Sequence[poutine.Trace], name: str) -> list[Tensor]:
    return [trace.nodes[name]["value"] for trace in traces]


class _Unobserved(Messenger):
    """Draws observed sites anew.

    Unlike ``poutine.uncondition`` it leaves deterministic sites and factors as they are.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and msg["name"] in self._names:
            msg.update(is_observed=False, value=None, done=False)


def _is_derived(site: Any) -> bool:
    """Whether its value follows from other sites: deterministic, or reparameterized."""
    fixed = site["is_observed"] and isinstance(unwrapped(site["fn"]), Delta)
    return fixed or site["infer"].get("_deterministic", False)


def _arrays(
    values: Mapping[str, Tensor], sites: Mapping[str, Any], num_samples: int, *, event: bool = True
) -> dict[str, Any]:
    """``[chain = 1, draw, *shape of the site]``, without the dimensions of size 1 of plates."""
    result = {}
    for name, value in values.items():
        shape = sites[name]["value"].shape if event else _batch_shape(sites[name])
        if value.numel() == shape.numel():  # a deterministic site that no latent enters
            value = value.reshape(shape).expand(num_samples, *shape)
        result[name] = _numpy(value.reshape(1, num_samples, *shape))
    return result


def _numpy(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


def _batch_shape(site: Any) -> torch.Size:
    """Of the value, not of the distribution: ``pyro.deterministic`` takes all for an event where
    nothing else is said.
    """
    shape, event_dim = site["value"].shape, site["fn"].event_dim
    if site["infer"].get("_deterministic") and event_dim == len(shape):
        return shape
    return shape[: len(shape) - event_dim]


def _dims(sites: Mapping[str, Any], given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names of the dimensions of every site: its plates, then those of its event."""
    unknown = [name for name in given if name not in sites]
    if unknown:
        raise ValueError(
            f"dims: expected names of sites, {', '.join(sites)}, got {', '.join(unknown)}"
        )
    result = {}
    for name, site in sites.items():
        shape, batch = site["value"].shape, _batch_shape(site)
        label = [f"{name}_dim_{i}" for i in range(len(shape))]
        for frame in site["cond_indep_stack"]:
            at = len(batch) + frame.dim if frame.vectorized else -1
            if at >= 0 and batch[at] == frame.size:
                label[at] = frame.name
        wanted = list(given.get(name, label))
        if len(wanted) != len(label):
            raise ValueError(
                f"dims: expected {len(label)} names for site '{name}' of shape {tuple(shape)}, got "
                f"{wanted}"
            )
        result[name] = wanted
    return result


def _coords(
    groups: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Sequence[str]],
    given: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Labels of all dimensions."""
    sizes: dict[str, int] = {}
    for values in (groups.get("observed_data", {}), groups["posterior"]):
        for name, value in values.items():
            own = value.shape[value.ndim - len(names[name]) :]
            sizes.update(zip(names[name], own, strict=True))
    for name, labels in given.items():
        if len(labels) != sizes.get(name):
            raise ValueError(
                f"coords: expected labels of the dimensions {sizes}, got {len(labels)} for '{name}'"
            )
    return {name: np.asarray(given.get(name, np.arange(size))) for name, size in sizes.items()}


def _build(groups: dict[str, dict[str, Any]], dims: Any, coords: Any) -> Any:
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        data = arviz.from_dict(groups, dims=dims, coords=coords)
    else:
        data = arviz.from_dict(**groups, dims=dims, coords=coords)
    data["posterior"].attrs["inference_library"] = "pyro_ardae"
    return data
