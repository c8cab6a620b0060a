# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What an automatic guide has to know of its model before it is built."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_ardae.random import fork_rng
from pyro_ardae.traces import mask_of, plate_nesting

__all__ = ["check_structure", "plate_frames", "refuse_moving_supports", "unconstrain"]

#: Runs of the model, on values drawn from the prior, by which a varying structure is found out.
_NUM_RUNS = 4


class _SubsampleMessenger(Messenger):
    """Records the plates whose subsample is handed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.explicit: set[str] = set()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.explicit.add(msg["name"])


def unconstrain(site: Mapping[str, Any]) -> Tensor:
    """Value of a site on the reals.

    :raises ValueError: if it is not finite.
    """
    value: Tensor = biject_to(site["fn"].support).inv(site["value"].detach())
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"init_loc_fn: expected a value inside the support of site '{site['name']}', got "
            "one that is not finite on the reals. Check it, and the data for NaN."
        )
    return value


def check_structure(
    prototype: Any, model: Any, initialized: Any, *args: Any, **kwargs: Any
) -> tuple[set[str], int]:
    """Run the model some more times on values drawn from the prior, and compare.

    :param prototype: a trace of ``initialized``.
    :param model: the model.
    :param initialized: the same with its latents at the values where the guide starts: a model with
        an improper prior has no other run.
    :returns: names of the plates whose subsample the caller determines, and the number of batch
        dimensions that plates take, observed sites included.
    :raises ValueError: for discrete latents, empty plates, or a structure that varies.
    :raises RuntimeError: for no latents.
    """
    expected, latents = {}, dict(prototype.iter_stochastic_nodes())
    for name, site in latents.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"AutoImplicit: site '{name}' is discrete. Sum it out: hide it from the guide by "
                f"AutoImplicit(poutine.block(model, hide=['{name}'])) and train with "
                "TraceImplicitEnum_ELBO, the model under config_enumerate."
            )
        expected[name] = tuple(site["value"].shape)
        counts = mask_of(site)
        if counts is not None and not bool(counts.all()):
            warnings.warn(
                f"AutoImplicit: elements of site '{name}' are masked out. Nothing but their "
                "entropy acts on them, so the guide makes them ever wider, and what it shares "
                "between latents suffers. Where drawing the site from the model will do, as for "
                f"missing observations, hide it from both: hidden = poutine.block(model, "
                f"hide=['{name}']), guide = AutoImplicit(hidden), SVI(hidden, guide, ...).",
                stacklevel=2,
            )
    if not expected:
        raise RuntimeError("AutoImplicit found no latent variables; use an empty guide instead.")
    recorder, nesting = _SubsampleMessenger(), 0
    with fork_rng(), torch.no_grad(), poutine.block():
        for run in (initialized, *[model] * _NUM_RUNS):
            try:
                trace = poutine.trace(recorder(run)).get_trace(*args, **kwargs)
            except (ValueError, RuntimeError):
                if run is initialized:
                    raise
                continue  # a draw far from the data is no fault of the model
            nesting = max(nesting, plate_nesting(trace))
            _check_run(trace, expected)
            refuse_moving_supports(latents, trace)
    return recorder.explicit, nesting


def plate_frames(model: Any, initialized: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The plates around the latents in a run of the model, by name; the run leaves nothing.

    :param model: the model, run on values drawn from the prior.
    :param initialized: the same with its latents at the values where the guide starts, for a prior
        that cannot be drawn from. These may be values for other rows.
    """
    with fork_rng(), torch.no_grad(), poutine.block():
        try:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        except (ValueError, RuntimeError, NotImplementedError):
            trace = poutine.trace(initialized).get_trace(*args, **kwargs)
    sites = (site for _, site in trace.iter_stochastic_nodes())
    return {frame.name: frame for site in sites for frame in site["cond_indep_stack"]}


def refuse_moving_supports(latents: Mapping[str, Any], again: Any) -> None:
    """Compare the supports of the latents in two runs of a model.

    All maps to the reals are those of the first run: with other bounds they are wrong.

    :param latents: the latent sites of a run, by name.
    :param again: a trace of another run.
    :raises ValueError: if one differs.
    """
    for name, site in latents.items():
        other = again.nodes.get(name)
        if other is not None and not _same(site["fn"].support, other["fn"].support):
            raise ValueError(
                f"site '{name}': expected the same support in every run of the model, got one that "
                f"varies, of a {type(site['fn']).__name__}: do its bounds depend on another latent "
                "or on a subsample? Sample it on a fixed support and transform it, e.g. "
                "width * pyro.sample(…, Uniform(0, 1))."
            )


def _same(first: Any, second: Any) -> bool:
    """Whether two constraints, or what they are made of, are equal."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    if isinstance(first, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, Constraint):
        return _same([*vars(first).items()], [*vars(second).items()])
    return bool(first == second)


def _check_run(trace: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare one run with the shapes of the prototype."""
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not site["is_observed"]:
            found[name] = tuple(site["value"].shape)
        elif site["infer"].get("_deterministic"):
            continue  # a value of this run, not of the data
        elif bool(torch.isnan(torch.as_tensor(site["value"])).any()):
            raise ValueError(
                f"AutoImplicit: the data of site '{name}' have NaN. Drop those rows, or put finite "
                "numbers there and mask them: a masked NaN still makes gradients NaN."
            )
    if found != expected:
        names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise ValueError(
            "AutoImplicit: expected the same latents in every run of the model, but "
            f"{names} came with another shape, or not at all, in one of them. Fix the "
            "structure, for instance by masking, or write the guide by hand."
        )
