# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Implicit distributions: sampled by reparameterization, without a density."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import (
    ExpandedDistribution,
    MaskedDistribution,
    Rejector,
    TorchDistribution,
)
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    Normal,
    TransformedDistribution,
    constraints,
)

__all__ = ["Implicit", "base_of", "find_implicit", "is_reparameterized", "unwrapped"]

Sampler = Callable[..., Tensor]
ScoreFunction = Callable[["Implicit", Tensor], Tensor]


class Implicit(TorchDistribution):
    r"""Distribution of :math:`z = g(\varepsilon, c)`: noise through a sampler, no density.

    Draws are reparameterized, so gradients flow from a value into the sampler, the context and the
    parameters of the noise. :meth:`log_prob` exists only inside the ELBOs of this package. There it
    returns the surrogate :math:`s^\top z - \mathrm{stop}(s^\top z)` with
    :math:`s = \mathrm{stop}(\nabla_z \log q(z \mid c))`: its value is 0 and its gradient is the
    path gradient of :math:`\log q`, so Pyro scales, masks, broadcasts and sums it as any other.

    .. warning:: ``context`` must hold everything that z depends on besides its own noise: the data,
        and every other random variable that the sampler reads. What is left out of it is averaged
        over, and the estimated score is then that of another distribution.

    Example::

        >>> net = torch.nn.Linear(3 + 5, 2)
        >>> q = Implicit(lambda eps, c: net(torch.cat([eps, c], -1)), 3, torch.randn(7, 5), (2,))
        >>> q.batch_shape, q.event_shape, q.rsample((4,)).shape
        (torch.Size([7]), torch.Size([2]), torch.Size([4, 7, 2]))

    :param sampler: ``sampler(noise, context)``, or ``sampler(noise)`` without context. Maps noise
        ``[*sample, *batch, *noise_event]`` and context ``[*sample, *batch, C]`` to
        ``[*sample, *batch, *event_shape]``. Rows must not influence each other (no batch norm).
    :param noise: an ``int`` (standard normal of that size, with dtype and device of the context, or
        without one of the sampler's first parameter) or a reparameterized distribution; a
        hierarchical guide puts its auxiliary variable here.
    :param context: ``[*batch, C]``, or ``None`` for an unconditional distribution.
    :param event_shape: shape of one draw; that of the noise if left out.
    :raises TypeError: if the sampler is not callable or the noise is not reparameterized.
    :raises ValueError: if shapes do not fit each other.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        sampler: Sampler,
        noise: int | Distribution,
        context: Float[Tensor, "*batch C"] | None = None,
        event_shape: Size | tuple[int, ...] | None = None,
    ) -> None:
        if not callable(sampler):
            raise TypeError(
                f"Implicit: expected `sampler` to be a callable of (noise, context), got "
                f"{type(sampler).__name__}."
            )
        if context is not None and (not isinstance(context, Tensor) or context.dim() == 0):
            got = "a scalar tensor" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"Implicit: expected `context` to be a tensor [*batch, C], got {got}. Concatenate "
                "all that z depends on along the last dimension."
            )
        if context is not None and not context.is_floating_point():
            raise ValueError(
                f"Implicit: expected a `context` of floating-point numbers, got {context.dtype}. "
                "Call .float() on it."
            )
        if isinstance(event_shape, int):
            raise TypeError(
                f"Implicit: expected `event_shape` to be a tuple, got {event_shape}. Pass "
                f"({event_shape},)."
            )
        noise = _noise_distribution(noise, context, sampler)
        event_shape = noise.event_shape if event_shape is None else Size(event_shape)
        batch_shape = noise.batch_shape
        if context is not None:
            try:
                batch_shape = broadcast_shape(noise.batch_shape, context.shape[:-1])
            except ValueError as error:
                raise ValueError(
                    f"Implicit: batch shape {tuple(noise.batch_shape)} of the noise does not "
                    f"broadcast with {tuple(context.shape[:-1])} of the context. Did you mean "
                    "noise.to_event(1)?"
                ) from error
        self._set(sampler, noise, context, Size(batch_shape), event_shape)
        self.expanded_from: Implicit | None = None
        self.score: ScoreFunction | None = None
        self.density: ScoreFunction | None = None
        self.paired_dim: int | None = None

    def _set(
        self,
        sampler: Sampler,
        noise: Distribution,
        context: Tensor | None,
        batch_shape: Size,
        event_shape: Size,
    ) -> None:
        self.sampler = sampler
        self.noise = noise.expand(batch_shape)
        self.context = None if context is None else context.expand(batch_shape + context.shape[-1:])
        super().__init__(batch_shape, event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """The reals; wrap in a ``TransformedDistribution`` for another support."""
        dims = len(self.event_shape)
        return constraints.independent(constraints.real, dims) if dims else constraints.real

    def expand(self, batch_shape: Any, _instance: Any = None) -> Implicit:
        """Expand noise and context to ``batch_shape``: new rows get noise of their own.

        What was expanded stays at hand as ``expanded_from``: its rows are distinct, so a score is
        learned there, however many particles there are.
        """
        new: Implicit = type(self).__new__(type(self))
        shape = Size(batch_shape)
        new._set(self.sampler, self.noise, self.context, shape, self.event_shape)
        new.expanded_from, new.score = self.expanded_from or self, self.score
        new.density, new.paired_dim = self.density, self.paired_dim
        return new

    def distinct(self) -> Implicit:
        """A distribution with this one's rows, each once where a leading dimension repeats them."""
        source = self.expanded_from
        if source is None:
            return self
        shape = source.batch_shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        repeats = self.batch_shape[len(self.batch_shape) - len(shape) :] == shape
        return source if repeats else self

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        """Draw ``[*sample_shape, *batch, *event]``, differentiable.

        :raises ValueError: if the sampler returns another shape.
        :raises TypeError: if it returns no tensor.
        :raises RuntimeError, TypeError, ValueError: what it raises, with how it was called.
        """
        sample_shape = Size(sample_shape)
        noise = self.noise.rsample(sample_shape)
        if self.paired_dim is not None and len(self.batch_shape) >= -self.paired_dim:
            noise = _paired(self.noise, noise, self.paired_dim - len(self.noise.event_shape))
        return self._push(noise, sample_shape)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        """Draw ``[*sample_shape, *batch, *event]`` without a graph."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def flat_draws(self, count: int, *, center: bool) -> tuple[Tensor, Tensor | None]:
        """What an estimator takes, without a graph: draws ``[count, *batch, D]``, and the value
        for zero noise ``[*batch, D]``, by which the paper centers z, if ``center`` is wanted; by
        one pass of the sampler; by none, if there is nothing to draw.
        """
        if not center and not count:
            shape = (0, *self.batch_shape, self.event_shape.numel())
            return self.noise.sample(Size((0,))).new_empty(shape), None
        if not center:
            return self.flat(self.sample(Size((count,)))), None
        with torch.no_grad():
            noise = self.noise.sample(Size((count,)))
            noise = torch.cat([noise, noise.new_zeros(1, *noise.shape[1:])])
            value = self.flat(self._push(noise, Size((count + 1,))))
        return value[:count], value[count]

    def flat(self, value: Tensor) -> Tensor:
        """Draws ``[*sample, *batch, *event]`` with one dimension for the event."""
        dims = len(self.event_shape)
        return value.flatten(-dims) if dims else value.unsqueeze(-1)

    def _push(self, noise: Tensor, sample_shape: Size) -> Tensor:
        inputs = {"noise": noise}
        if self.context is not None:
            inputs["context"] = self.context.expand(sample_shape + self.context.shape)
        try:
            value = self.sampler(*inputs.values())
        except (RuntimeError, TypeError, ValueError) as error:
            if type(error) not in (RuntimeError, TypeError, ValueError):  # such as lack of memory
                raise
            given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
            advice = "for any number of draws: what differs by row has to be part of the context."
            if "dtype" in str(error):
                advice += (
                    f" The noise is {noise.dtype}; pass a distribution for another, such as "
                    "noise=dist.Normal(torch.zeros(8, dtype=…), 1.0).to_event(1)."
                )
            raise type(error)(
                f"Implicit: sampler({given}) failed. Expected sampler(noise, context), or "
                f"sampler(noise) without a context, {advice} {error}"
            ) from error
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Implicit: expected the sampler to return a tensor, got a {type(value).__name__}."
            )
        expected = sample_shape + self.batch_shape + self.event_shape
        if value.shape != expected:
            raise ValueError(
                f"Implicit: expected the sampler to return shape {tuple(expected)} (sample, batch, "
                f"event), got {tuple(value.shape)} from noise {tuple(noise.shape)}. Pass "
                "event_shape=… if a draw's shape is not that of its noise."
            )
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Inside an ELBO of this package, 0 with the gradient of log q; an error elsewhere.

        Inside :func:`~pyro_ardae.elbo_estimate`, an estimate of log q itself.

        :raises NotImplementedError: where no score is attached.
        """
        if self.density is not None:
            return self.density(self, value)
        if self.score is None:
            raise NotImplementedError(
                "An Implicit distribution has no density: log_prob() exists only inside "
                "TraceImplicit_ELBO and its variants, which supply its gradient. Train with "
                "SVI(model, guide, optim, loss=TraceImplicit_ELBO()); losses and diagnostics that "
                "need the value of log q (Trace_ELBO, RenyiELBO, Importance, …) cannot be used. "
                "Inside those losses it exists for the guide's sites, bare or under bijections: "
                "a mixture, and a site of the model, need its value."
            )
        surrogate = self.score(self, value.detach()) * value
        if self.event_shape:
            surrogate = surrogate.flatten(-len(self.event_shape)).sum(-1)
        return surrogate - surrogate.detach()

    def entropy(self) -> Tensor:
        """Not available.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            "An Implicit distribution has no tractable entropy; its gradient is what the ELBOs of "
            "this package estimate."
        )


def find_implicit(fn: Any) -> Implicit | None:
    """The :class:`Implicit` under what adds to its log-density: ``Independent``,
    ``TransformedDistribution`` by bijections and the like. Others, such as mixtures, need its
    value.
    """
    while not isinstance(fn, Implicit):
        bijective = all(transform.bijective for transform in getattr(fn, "transforms", ()))
        if not isinstance(fn, _WRAPPERS) or not bijective:
            return None
        fn = fn.base_dist
    return fn


_WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution, TransformedDistribution)


def is_reparameterized(fn: Any) -> bool:
    """Whether the gradient along a draw is the whole one. That of rejection sampling is not."""
    fn = unwrapped(fn)
    return fn.has_rsample and not isinstance(fn, Rejector)


def unwrapped(fn: Any) -> Any:
    """The distribution under ``Independent``, masks, expansions and transforms."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def base_of(noise: Distribution) -> Distribution:
    """The distribution whose dimensions ``Independent`` has made those of an event."""
    while isinstance(noise, Independent):
        noise = noise.base_dist
    return noise


def _paired(noise: Distribution, draws: Tensor, dim: int) -> Tensor:
    """The first half of the draws along a dimension, and in place of the second its mirror image.

    :raises ValueError: for noise that is not normal.
    """
    base = base_of(noise)
    if not isinstance(base, Normal):
        raise ValueError(
            f"antithetic=True: expected normal noise of an Implicit site, got "
            f"{type(base).__name__}. Leave antithetic out."
        )
    half = draws.shape[dim] // 2
    loc, scale = (x.expand(draws.shape) for x in (base.loc, base.scale))
    unit = (draws.narrow(dim, 0, half) - loc.narrow(dim, 0, half)) / scale.narrow(dim, 0, half)
    image = loc.narrow(dim, half, half) - scale.narrow(dim, half, half) * unit
    return torch.cat([draws.narrow(dim, 0, half), image], dim)


def _noise_distribution(
    noise: int | Distribution, context: Tensor | None, sampler: Sampler
) -> Distribution:
    if isinstance(noise, Integral) and not isinstance(noise, bool):
        if noise < 1:
            raise ValueError(f"Implicit: expected noise of size >= 1, got {noise}.")
        size = int(noise)
        like = context
        if like is None and isinstance(sampler, nn.Module):
            like = next(sampler.parameters(), None)
        like = torch.zeros(()) if like is None else like.detach()
        normal = dist.Normal(like.new_zeros(size), like.new_ones(size), validate_args=False)
        return normal.to_event(1)
    if not isinstance(noise, Distribution):
        raise TypeError(
            f"Implicit: expected `noise` to be an int or a reparameterized distribution, got "
            f"{type(noise).__name__}."
        )
    if not is_reparameterized(noise):
        raise TypeError(
            f"Implicit: expected reparameterized noise, got {type(noise).__name__}, which is not. "
            "Use a Normal, or make the discrete variable a site of its own."
        )
    return noise
