# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of an implicit site: that its context holds what its sampler depends on, that its noise is
wide enough, and that the sampler is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Normal

from pyro_ardae.implicit import Implicit, base_of
from pyro_ardae.random import fork_rng

__all__ = ["check_context", "check_noise", "check_trained"]

#: Floats of an earlier site that are looked for in the context, at most.
_SEARCHED = 4096


def check_context(name: str, fn: Implicit, earlier: Mapping[str, Any]) -> None:
    """Warn if a site's draws depend on something, besides its noise, that its context lacks.

    Two things are looked for, at the cost of four calls of the sampler on one draw:

    - An **earlier site** of the guide that the graph of a draw reaches without passing through
      the context, and whose value is not in the context literally. Sites without a gradient
      (discrete ones, or without parameters) are not seen.
    - A **dependence by row**: for the same noise, moving the rows of the context must move the
      draws along; without a context, the rows of a plate must have one law. If it is not so, the
      sampler or the noise reads something else that differs by row, say the features of another
      encoder. What is computed from the context outside of the sampler, with a gradient to it, is
      recognized.

    What is the same for all rows and comes from no site, such as a scalar of the data that changes
    from step to step, is not found.

    :param name: the site.
    :param fn: its distribution.
    :param earlier: values of the guide's earlier sites by name.
    """
    with fork_rng(), poutine.block():
        value = fn.rsample()  # not the site's value: a transform of it may depend on anything
    if value.grad_fn is None:
        return
    through, base = _context_nodes(fn)
    reached = _walk(value.grad_fn, stop=through)
    read = [site for site, other in earlier.items() if _node(other) in reached]
    missing = [site for site in read if not _holds(fn, earlier[site])]
    if missing:
        sites = ", ".join(f"'{site}'" for site in missing)
        _warn(
            f"implicit site '{name}': its draws depend on {sites}, sampled before, which its "
            "context lacks. The score is then that of the draws averaged over it. Put it into the "
            f"context: Implicit(sampler, noise, torch.cat([…, {missing[0]}], -1))."
        )
        return
    outside = base is not None and base in _walk(value.grad_fn, stop=through - {base})
    # Without a context the rows are those of the plates around the site.
    if not read and not outside and _rows_differ(fn if fn.context is None else fn.distinct()):
        _warn(
            f"implicit site '{name}': for equal noise and context its rows come out different, so "
            "the sampler or the noise depends on something by row that its context lacks. The "
            "score is then that of the rows averaged over it. Put it into the context, or, if it "
            "is a function of the context, compute it inside of the sampler."
        )


def check_noise(name: str, fn: Implicit) -> None:
    """Warn if noise is narrower than the draws that are made of it, which lie on a surface then:
    they have no density, and no score.

    A sampler that has noise of its own, which is seen by two calls, may know better.

    :param name: the site.
    :param fn: its distribution.
    """
    width, dim = fn.noise.event_shape.numel(), fn.event_shape.numel()
    if width >= dim:
        return
    with fork_rng(), torch.no_grad(), poutine.block():
        noise = fn.noise.sample()
        inputs = (noise,) if fn.context is None else (noise, fn.context)
        if not torch.equal(fn.sampler(*inputs), fn.sampler(*inputs)):
            return
    _warn(
        f"implicit site '{name}': its noise has {width} dimensions and a draw has {dim}, so the "
        "draws lie on a surface, where no score exists. Take noise as wide as a draw or wider."
    )


def check_trained(name: str, sampler: nn.Module, trained: Iterable[Tensor]) -> None:
    """Warn if a sampler has parameters that ask for a gradient, and none of them is trained.

    :param name: the site.
    :param sampler: its sampler.
    :param trained: the parameters that are trained.
    """
    of_sampler = {id(parameter) for parameter in sampler.parameters() if parameter.requires_grad}
    if of_sampler and of_sampler.isdisjoint(map(id, trained)):
        _warn(
            f"implicit site '{name}': the parameters of its sampler are none of Pyro's, so SVI "
            f'does not train them. If it should, pyro.module("{name}", sampler) in the guide.'
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _node(value: Any) -> Any:
    return getattr(value, "grad_fn", None)


def _context_nodes(fn: Implicit) -> tuple[set[Any], Any]:
    """Nodes of the graph that are the context, and the one that the user made."""
    nodes: set[Any] = set()
    node = None if fn.context is None else fn.context.grad_fn
    while node is not None:
        nodes.add(node)
        if not node.name().startswith("Expand"):
            break
        node = node.next_functions[0][0]
    return nodes, node


def _walk(start: Any, stop: Iterable[Any]) -> set[Any]:
    """Nodes that ``start`` depends on, up to those of ``stop`` and without them."""
    blocked, seen, todo = set(stop), {start}, [start]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node not in seen and node not in blocked:
                seen.add(node)
                todo.append(node)
    return seen


def _holds(fn: Implicit, other: Tensor) -> bool:
    """Whether every number of ``other`` is among those of the context."""
    if fn.context is None:
        return False
    if other.numel() > _SEARCHED:
        return True  # for all that is known
    numbers = fn.context.detach().flatten()
    return bool(torch.isin(other.detach().to(numbers.dtype).flatten(), numbers).all())


def _rows_differ(fn: Implicit) -> bool:
    dims = [dim for dim, size in enumerate(fn.batch_shape) if size > 1]
    if not dims:
        return False
    base = base_of(fn.noise)
    if fn.context is None and isinstance(base, Normal):
        parts = (part.detach().expand(base.batch_shape) for part in (base.loc, base.scale))
        if any(not torch.equal(part, part.roll(1, dim)) for part in parts for dim in dims):
            return True
    shape = fn.noise.event_shape
    with fork_rng(), torch.no_grad(), poutine.block():
        like = fn.noise.sample() if fn.context is None else fn.context
        noise = torch.linspace(-1.0, 1.0, max(1, shape.numel())).to(like).reshape(shape)
        noise = noise.expand(fn.batch_shape + shape)

        def draw(context: Tensor | None) -> Tensor:
            z: Tensor = fn.sampler(noise) if context is None else fn.sampler(noise, context)
            return z

        z = draw(fn.context)
        tolerance = 1e-3 * float(z.abs().max()) + 1e-12
        if not bool((draw(fn.context) - z).abs().max() <= 1e-3 * tolerance):
            return False  # it has noise of its own, and rows cannot be compared
        for dim in dims:
            moved = None if fn.context is None else fn.context.roll(1, dim)
            if bool((draw(moved) - z.roll(1, dim)).abs().max() > tolerance):
                return True
    return False
