# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide without a density, for any Pyro model of continuous latents."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.nn.module import PyroModule
from torch import Tensor
from torch.distributions import biject_to

from pyro_ardae.autoguide.build import Networks, add_parts, check_rows
from pyro_ardae.autoguide.encoders import Encoder, Encoders
from pyro_ardae.autoguide.layout import Group, find_groups, point_mass
from pyro_ardae.autoguide.prototype import check_structure, plate_frames, unconstrain
from pyro_ardae.autoguide.quantiles import (
    checked_levels,
    decreases,
    fixed_noise,
    num_draws,
    quantiles_of,
)

__all__ = ["AutoImplicit"]


def _of_pyro(error: Exception) -> bool:
    """Whether it was raised in Pyro's own code."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("pyro.")


class AutoImplicit(AutoGuide):
    r"""A guide whose posterior is a network of noise: a drop-in for Pyro's ``AutoNormal``.

    Train it with :class:`~pyro_ardae.TraceImplicit_ELBO` or one of its variants. All latents are
    mapped to the reals, and

    - those outside of subsampled plates form one :class:`~pyro_ardae.Implicit` site, so their joint
      posterior has whatever shape the network gives it;
    - those of a subsampled plate form one such site inside that plate, whose rows are told apart by
      a learned vector per index, or by what an ``encoder`` makes of the data. Given the globals, if
      there are any, rows are independent: :math:`q(g) \prod_n q(z_n \mid c_n, g)`.

    Before training, every latent is a Normal of standard deviation ``init_scale`` around
    ``init_loc_fn``, on the reals.

    Example::

        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, tau), obs=x)
        >>> guide = AutoImplicit(model)
        >>> draws = guide.sample_posterior(100, torch.randn(8))
        >>> draws["tau"].shape, bool((draws["tau"] > 0).all())
        (torch.Size([100]), True)

    :param model: a Pyro model whose latents are continuous and whose structure is fixed.
    :param init_loc_fn: per-site initialization, as in Pyro's automatic guides.
    :param init_scale: standard deviation of every latent on the reals before training, > 0.
    :param extra_noise: dimensions of noise, >= 0, besides as many as the latents have.
    :param hidden_dims: widths of the hidden layers of each network.
    :param gain: see :class:`~pyro_ardae.autoguide.sampler.ResidualSampler`, also for
        ``input_scale``.
    :param input_scale: scale of the noise where it enters the network.
    :param encoder: ``encoder(*args, **kwargs) -> [*rows, C]``, called with what the model is called
        with, for the rows of the local plate (all of them, or those of the subsample); or a mapping
        from names of plates to encoders. It replaces the vectors per index.
    :param embedding_dim: width, >= 1, of what tells the rows of a local plate apart besides their
        locations and scales.
    :param local_plates: names of further plates whose latents form a site of their own although the
        plate is not subsampled.
    :param create_plates: as in ``AutoNormal``: ``create_plates(*args, **kwargs)`` returns the plate
        or plates whose subsample the caller determines.
    :param num_quantile_draws: draws by which :meth:`median` and :meth:`quantiles` are estimated.
    :raises ValueError: for an argument out of range; at the first call, for discrete latents, a
        structure that varies, an empty plate, or a subsampled plate whose index the guide cannot
        see (pass ``create_plates`` or ``encoder``).
    :raises TypeError: for a model that is no callable, and for ``local_plates`` that are a string.
    :raises NotImplementedError: at the first call, for sequential plates.
    :raises RuntimeError: at the first call, for a model without latents, and for a guide that was
        copied before.

    .. note:: Nothing but samples comes out: no density, and no bijection from a simple
        distribution, so ``NeuTraReparam`` cannot be used and :meth:`get_transform` raises.
    """

    prototype_trace: Any

    def __init__(
        self,
        model: Any,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        extra_noise: int = 8,
        hidden_dims: Sequence[int] = (64, 64),
        gain: float = 0.2,
        input_scale: float = 3.0,
        encoder: Encoder | Mapping[str, Encoder] | None = None,
        embedding_dim: int = 4,
        local_plates: Sequence[str] = (),
        create_plates: Callable[..., Any] | None = None,
        num_quantile_draws: int = 8192,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}.")
        if num_quantile_draws < 2:
            raise ValueError(f"num_quantile_draws: expected >= 2, got {num_quantile_draws}.")
        if isinstance(local_plates, str):
            raise TypeError(f"local_plates: expected a sequence of names, got {local_plates!r}.")
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self._plain = (model,)  # in a tuple, since it is no submodule of the guide
        self.init_loc_fn = init_loc_fn
        self.networks = Networks(
            init_scale=float(init_scale),
            extra_noise=extra_noise,
            hidden_dims=tuple(hidden_dims),
            gain=gain,
            input_scale=input_scale,
            embedding_dim=embedding_dim,
        )
        self.local_plates = tuple(local_plates)
        self.num_quantile_draws = num_quantile_draws
        self._groups: list[Group] = []
        self.latent_dim = 0
        self._snapshot = False
        self.encoders = Encoders(encoder)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model, which may not be picklable and is seldom needed any more."""
        state = dict(self.__dict__)
        state["_model"] = state["_plain"] = state["master"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoImplicit:
        """A snapshot: it keeps its parameters, whatever becomes of those in Pyro's store."""
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other.__dict__.update(_model=self._model, _plain=self._plain, _snapshot=True)
        return other

    # ---- structure ---------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise RuntimeError(
                "AutoImplicit was copied or unpickled before its first call, and its model is not "
                "part of the copy. Call the guide once, with the model's arguments, before."
            )
        grad = torch.is_grad_enabled()
        try:
            # What is built in inference mode could not be trained later.
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                super()._setup_prototype(*args, **kwargs)
                self._build(*args, **kwargs)
        except Exception as error:
            self.prototype_trace = None  # half a guide must not be taken for a whole one
            if isinstance(error, ZeroDivisionError) and _of_pyro(error):
                raise ValueError("AutoImplicit: a plate is empty; expected data.") from error
            raise

    def _build(self, *args: Any, **kwargs: Any) -> None:
        explicit, self._nesting = check_structure(
            self.prototype_trace, self._plain[0], self.model, *args, **kwargs
        )
        created = self._created_plates(*args, **kwargs)
        self._groups = find_groups(
            self.prototype_trace, set(self.local_plates), self.encoders.plates, created
        )
        start = {name: unconstrain(site).clone() for name, site in self._latents()}
        self.posterior = PyroModule()
        with torch.no_grad(), poutine.block():
            features = self._features(args, kwargs)
        self._num_rows = dict(self._rows_of(features))
        frames = self._prototype_frames
        self._subsampled = {n for n in self._num_rows if frames[n].size != frames[n].full_size}
        for group in self._groups:
            check_rows(
                group,
                features.get(group.name),
                sorted((explicit - set(created)) & {*group.plates}),
                part_of_list=self.master is not None,
            )
        self.latent_dim = add_parts(self.posterior, self._groups, self.networks, start, features)

    def _features(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """What encoders make of the rows, by the group's name."""
        found = ((g.name, self.encoders.features(g, args, kwargs)) for g in self._groups)
        return {name: rows for name, rows in found if rows is not None}

    def _rows_of(self, features: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
        """Plates whose rows an encoder sees, and how many."""
        for group in self._groups:
            if group.name in features:
                for name, dim in zip(group.plates, group.local_dims, strict=True):
                    yield name, features[group.name].shape[dim - 1]

    def _latents(self) -> Iterator[tuple[str, Any]]:
        sites: Iterator[tuple[str, Any]] = self.prototype_trace.iter_stochastic_nodes()
        return sites

    def _created_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plates that the user's ``create_plates`` returns."""
        guide = self if self.master is None else self.master()
        if guide.create_plates is None:
            return {}
        with poutine.block():
            plates = guide.create_plates(*args, **kwargs)
        plates = [plates] if isinstance(plates, pyro.plate) else plates
        return {plate.name: plate for plate in plates}

    # ---- the guide ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latents of the model, as a Pyro guide.

        :returns: constrained values by site name.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        for name, part in self.posterior._modules.items():
            part.follow_store(f"{self.posterior._pyro_name}.{name}", take=not self._snapshot)
        features = self._features(args, kwargs)
        plates = self._plates(features, *args, **kwargs)
        values: dict[str, Tensor] = {}
        log_dets: dict[str, Tensor] = {}
        u: Tensor | None = None
        for group in self._groups:
            with ExitStack() as stack:
                for name in group.plates:
                    stack.enter_context(plates[name])
                y, z, log_det = self._sample(group, features.get(group.name), u)
            u = u if group.plates else y
            values.update(group.unpack(z))
            log_dets.update(group.unpack(log_det))
        result = {}
        for name, site in self._latents():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                delta = point_mass(site["fn"], values[name], log_dets[name])
                result[name] = pyro.sample(name, delta)
        return result

    def _sample(
        self, group: Group, features: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A group's implicit site y, its latents on the reals, and the log of the Jacobian."""
        part = getattr(self.posterior, group.name)
        # Rows that are those of the subsample already are taken as they are.
        frames = [self._prototype_frames[name] for name in group.plates]
        full = [frame.full_size or frame.size for frame in frames]
        given = [] if features is None else [features.shape[dim - 1] for dim in group.local_dims]
        rows = part.describe(features, subsample=features is None or given == full)
        name = f"_{group.label}" if group.plates else ""
        y = pyro.sample(
            f"_{self._pyro_name}{name}_latent",
            part.implicit(rows, u),
            infer={"is_auxiliary": True},
        )
        return y, *part.transport(y, rows, u)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the globals ``[*particles, latent_dim]`` on the reals.

        :raises ValueError: if the model has none.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if not self.latent_dim:
            raise ValueError("AutoImplicit: the model has no latents outside of local plates.")
        return self._sample(self._groups[0], None, None)[1]

    def _plates(self, features: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plates by name; those of encoded rows as large as in the model of this call."""
        guide = self if self.master is None else self.master()
        hidden = []
        if guide.create_plates is None:
            rows = dict(self._rows_of(features))
            changed = {name: n for name, n in rows.items() if n != self._num_rows[name]}
            if changed:
                self._follow(changed, args, kwargs)
            # The model would take the index from the guide, in place of one that it is given.
            hidden = [name for name, n in rows.items() if n == self._prototype_frames[name].size]
        with poutine.block(hide=hidden):
            plates: dict[str, Any] = self._create_plates(*args, **kwargs)
        return plates

    def _follow(self, rows: Mapping[str, int], args: Any, kwargs: Any) -> None:
        """Take the sizes of plates from the model, where there are other numbers of rows now.

        The features do not tell: a plate of as many rows may be all of the data or a subsample.
        """
        frames = dict(self._prototype_frames)
        advice = " Pass create_plates=… to the AutoGuideList."
        if self.master is None:
            advice = ""
            if self._model is not None:
                frames |= plate_frames(self._plain[0], self.model, *args, **kwargs)
            else:  # unpickled: what has been a subsample is one, what has been all is all
                for name, count in rows.items():
                    full = frames[name].full_size if name in self._subsampled else count
                    frames[name] = frames[name]._replace(size=count, full_size=full)
        for name, count in rows.items():
            size, full = frames[name].size, frames[name].full_size
            if count not in (size, full):
                raise ValueError(
                    f"encoder: expected features of the {size} rows of plate '{name}', got "
                    f"{count}.{advice}"
                )
            self._prototype_frames[name] = frames[name]
            self._num_rows[name] = count
            self._subsampled |= {name} if size != full else set()

    # ---- draws and quantiles -----------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of all latents, computed together.

        Latents of a subsampled plate come for all its rows; with an encoder, for the rows that it
        returns.

        :param num_samples: number S of draws, >= 1.
        :param args: what the model is called with, also ``kwargs``.
        :returns: constrained values ``[S, *shape]`` by site name.
        :raises ValueError: for less than one draw.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}.")

        def noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device)

        draws = self._draw(num_samples, noise, args, kwargs)
        return {name: biject_to(site["fn"].support)(draws[name]) for name, site in self._latents()}

    def _draw(
        self, num: int, noise: Callable[..., Tensor], args: Any, kwargs: Any
    ) -> dict[str, Tensor]:
        """Latents on the reals ``[num, *shape]`` by site name."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        result: dict[str, Tensor] = {}
        u: Tensor | None = None
        for group in self._groups:
            part = getattr(self.posterior, group.name)
            rows = part.describe(self.encoders.features(group, args, kwargs))
            rows = rows.reshape(1, *[1] * (self._nesting - group.nesting), *rows.shape)
            eps = noise((num, *rows.shape[1:-1], part.noise_dim), rows)
            y, z = part.draw(eps, rows, u)
            u = u if group.plates else y
            result.update(group.unpack(z, particles=num))
        return result

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior medians: :meth:`quantiles` of 0.5.

        :returns: constrained values by site name.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        r"""Posterior quantiles of every coordinate, from ``num_quantile_draws`` draws.

        As in Pyro's automatic guides they are those of the coordinates on the reals, mapped to the
        support. For supports that are transformed coordinate by coordinate, they are the quantiles
        of the latent, also where the transform decreases (Pyro's are in reverse there). The noise
        is the same in every call, and comes in pairs :math:`\pm \epsilon`. The standard error at
        p is
        :math:`\sqrt{p (1 - p) / S} / q(z_p)`: with 8192 draws of a Gaussian, 0.014 standard
        deviations for the median and 0.023 at p = 0.05.

        :param quantiles: numbers in [0, 1].
        :param args: what the model is called with, also ``kwargs``.
        :returns: constrained values ``[len(quantiles), *shape]`` by site name.
        :raises ValueError: for numbers outside of [0, 1].
        """
        levels = checked_levels(quantiles)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        total = sum(group.dim * torch.Size(group.full_rows).numel() for group in self._groups)
        count = num_draws(self.num_quantile_draws, total)
        draws = self._draw(count, fixed_noise(), args, kwargs)
        result = {}
        for name, site in self._latents():
            transform = biject_to(site["fn"].support)
            at = 1 - levels if decreases(transform) else levels
            result[name] = transform(quantiles_of(draws[name], at))
        return result

    # ---- what cannot be right ----------------------------------------------------------------

    def get_base_dist(self) -> NoReturn:
        """Not available.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TRANSFORM)

    def get_transform(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TRANSFORM)


_NO_TRANSFORM = (
    "AutoImplicit is not the image of a simple distribution under a bijection: its sampler is not "
    "invertible, and NeuTraReparam cannot be used. Take a normalizing flow, such as AutoIAFNormal."
)
