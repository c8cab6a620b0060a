# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide without a density, for any Pyro model of continuous latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.nn.module import PyroModule
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_ardae.layout import Group, find_groups, point_mass
from pyro_ardae.posterior import RowPosterior
from pyro_ardae.prototype import check_structure, unconstrain

__all__ = ["AutoImplicit"]

Encoder = Callable[..., Tensor]

#: Numbers that a table of draws for quantiles holds at most.
_TABLE = 2**25


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
    :param gain: see :class:`~pyro_ardae.sampler.ResidualSampler`, also for ``input_scale``.
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
    :raises NotImplementedError: at the first call, for sequential plates.

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
        gain: float = 0.4,
        input_scale: float = 1.0,
        encoder: Encoder | Mapping[str, Encoder] | None = None,
        embedding_dim: int = 4,
        local_plates: Sequence[str] = (),
        create_plates: Callable[..., Any] | None = None,
        num_quantile_draws: int = 8192,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}.")
        if not init_scale > 0:
            raise ValueError(f"init_scale: expected a number > 0, got {init_scale}.")
        if extra_noise < 0:
            raise ValueError(f"extra_noise: expected an integer >= 0, got {extra_noise}.")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected an integer >= 1, got {embedding_dim}.")
        if num_quantile_draws < 2:
            raise ValueError(f"num_quantile_draws: expected >= 2, got {num_quantile_draws}.")
        if isinstance(local_plates, str):
            raise TypeError(f"local_plates: expected a sequence of names, got {local_plates!r}.")
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self._plain = (model,)  # in a tuple, since it is no submodule of the guide
        self.init_loc_fn = init_loc_fn
        self.init_scale = float(init_scale)
        self.extra_noise = extra_noise
        self.hidden_dims = tuple(hidden_dims)
        self.gain, self.input_scale = gain, input_scale
        self.embedding_dim = embedding_dim
        self.local_plates = tuple(local_plates)
        self.num_quantile_draws = num_quantile_draws
        self._encoder_names: dict[str | None, str] = {}
        self._groups: list[Group] = []
        self.latent_dim = 0
        self._add_encoders(encoder)

    def _add_encoders(self, encoder: Encoder | Mapping[str, Encoder] | None) -> None:
        if encoder is None:
            return
        if isinstance(encoder, Mapping) and not isinstance(encoder, nn.Module):
            given: list[tuple[str | None, Any]] = list(encoder.items())
        else:
            given = [(None, encoder)]
        for i, (plate, function) in enumerate(given):
            if not callable(function):
                raise TypeError(
                    f"encoder: expected a callable of the model's arguments, or a mapping from "
                    f"plates to such, got {type(function).__name__}."
                )
            name = "encoder" if plate is None else f"encoder_{i}"
            setattr(self, name, function)
            self._encoder_names[plate] = name

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model, which may not be picklable and is not needed any more."""
        state = dict(self.__dict__)
        state["_model"] = state["_plain"] = state["master"] = None
        return state

    # ---- structure ---------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise RuntimeError(
                "AutoImplicit was copied or unpickled before its first call, and its model is not "
                "part of the copy. Call the guide once, with the model's arguments, before."
            )
        try:
            super()._setup_prototype(*args, **kwargs)
            self._build(*args, **kwargs)
        except Exception as error:
            self.prototype_trace = None  # half a guide must not be taken for a whole one
            if isinstance(error, ZeroDivisionError):
                raise ValueError("AutoImplicit: a plate is empty; expected data.") from error
            raise

    def _build(self, *args: Any, **kwargs: Any) -> None:
        explicit, self._nesting = check_structure(
            self.prototype_trace, self._plain[0], *args, **kwargs
        )
        created = self._created_plates(*args, **kwargs)
        self._groups = find_groups(
            self.prototype_trace, set(self.local_plates), set(self._encoder_names), created
        )
        start = {name: unconstrain(site) for name, site in self._latents()}
        self._own_nesting = max(
            (-frame.dim for _, site in self._latents() for frame in site["cond_indep_stack"]),
            default=0,
        )
        self.posterior = PyroModule()
        self.latent_dim = 0
        for group in self._groups:
            feature_dim = None
            hidden = sorted(set(group.plates) & explicit - set(created))
            if self._encoder_of(group) is not None:
                with torch.no_grad(), poutine.block():
                    features = self._features(group, args, kwargs)
                feature_dim = features.shape[-1]
                if features.shape[:-1] != group.rows and hidden:
                    raise ValueError(
                        f"encoder: the model's plate '{hidden[0]}' is given its subsample by the "
                        f"caller; expected features of those rows, {group.rows}, got "
                        f"{tuple(features.shape[:-1])}. Encode the subsample, or pass "
                        "create_plates=…."
                    )
            elif hidden:
                raise ValueError(
                    f"AutoImplicit: the model's plate '{hidden[0]}' is given its subsample by the "
                    "caller, so the guide does not know which rows it is about. Pass "
                    "create_plates=…, which returns that plate with the same subsample, or an "
                    "encoder=… that tells rows apart by their data."
                )
            part = RowPosterior(
                group.pack(start),
                self.init_scale,
                condition_dim=self.latent_dim if group.plates else 0,
                embedding_dim=self.embedding_dim if group.plates else 0,
                feature_dim=feature_dim,
                extra_noise=self.extra_noise,
                hidden_dims=self.hidden_dims,
                gain=self.gain,
                input_scale=self.input_scale,
            )
            setattr(self.posterior, group.name, part)
            part.load_from_store()
            if not group.plates:
                self.latent_dim = group.dim

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
        features = {
            group.name: self._features(group, args, kwargs)
            for group in self._groups
            if self._encoder_of(group) is not None
        }
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
        if self._nesting > self._own_nesting:
            # Predictive(parallel=True) takes the number of batch dimensions from guide plates.
            with IndepMessenger(f"_{self._pyro_name}_nesting", 1, dim=-self._nesting):
                zero = dist.Delta(y.new_zeros(()))
                pyro.sample(f"_{self._pyro_name}_zero", zero, infer={"is_auxiliary": True})
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
        if features is not None and features.shape[:-1] == group.full_rows:
            features = pyro.subsample(features, event_dim=1)
        rows = part.describe(features)
        name = f"_{group.name}" if group.plates else ""
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

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Pairs of site and value on the reals, of globals ``[*batch, latent_dim]``."""
        if self.latent_dim:
            for name, value in self._groups[0].unpack(latent).items():
                yield self.prototype_trace.nodes[name], value

    def _encoder_of(self, group: Group) -> Encoder | None:
        names = self._encoder_names
        known = [names[key] for key in (None, *group.plates) if key in names]
        return getattr(self, known[-1]) if group.plates and known else None

    def _features(self, group: Group, args: Any, kwargs: Any) -> Tensor:
        """What the encoder makes of the arguments, ``[*rows, C]``."""
        encoder = self._encoder_of(group)
        assert encoder is not None
        features = encoder(*args, **kwargs)
        if not isinstance(features, Tensor):
            got = type(features).__name__
            raise TypeError(f"encoder: expected it to return a tensor, got {got}.")
        if features.dim() != len(group.plates) + 1 or 0 in features.shape:
            raise ValueError(
                f"encoder: expected features [{', '.join(group.plates)}, C] with at least one row, "
                f"got shape {tuple(features.shape)}."
            )
        shape = [1] * group.nesting
        for size, dim in zip(features.shape, group.local_dims, strict=False):
            shape[dim] = size
        return features.reshape(*shape, features.shape[-1])

    def _plates(self, features: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plates by name; those of encoded rows as large as the features of this call."""
        guide = self if self.master is None else self.master()
        for group in self._groups:
            if group.name not in features or guide.create_plates is not None:
                continue
            for name, dim in zip(group.plates, group.local_dims, strict=True):
                size, frame = features[group.name].shape[dim - 1], self._prototype_frames[name]
                if size in (frame.size, frame.full_size):
                    continue
                if self.master is not None:
                    raise ValueError(
                        f"encoder: expected {frame.size} rows of plate '{name}', as at the first "
                        f"call, got {size}. Pass create_plates=… to the AutoGuideList."
                    )
                full = frame.full_size if frame.full_size != frame.size else size
                self._prototype_frames[name] = frame._replace(size=size, full_size=full)
        plates: dict[str, Any] = self._create_plates(*args, **kwargs)
        return plates

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
        depth = max(self._nesting, self._own_nesting)
        result: dict[str, Tensor] = {}
        u: Tensor | None = None
        for group in self._groups:
            part = getattr(self.posterior, group.name)
            encoded = self._encoder_of(group) is not None
            rows = part.describe(self._features(group, args, kwargs) if encoded else None)
            rows = rows.reshape(1, *[1] * (depth - group.nesting), *rows.shape)
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
        of the latent. The noise is the same in every call, and comes in pairs
        :math:`\pm \epsilon`. The standard error at p is
        :math:`\sqrt{p (1 - p) / S} / q(z_p)`: with 8192 draws of a Gaussian, 0.014 standard
        deviations for the median and 0.023 at p = 0.05.

        :param quantiles: numbers in [0, 1].
        :param args: what the model is called with, also ``kwargs``.
        :returns: constrained values ``[len(quantiles), *shape]`` by site name.
        :raises ValueError: for numbers outside of [0, 1].
        """
        levels = torch.as_tensor(quantiles, dtype=torch.float64).flatten()
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles: expected numbers in [0, 1], got {levels.tolist()}.")
        generator = torch.Generator().manual_seed(0)

        def noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
            half = torch.randn(shape[0] // 2, *shape[1:], generator=generator, dtype=like.dtype)
            return torch.cat([half, -half]).to(like.device)

        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        total = sum(group.dim * torch.Size(group.full_rows).numel() for group in self._groups)
        count = min(self.num_quantile_draws, max(256, _TABLE // total)) // 2 * 2
        draws = self._draw(count, noise, args, kwargs)
        return {
            name: biject_to(site["fn"].support)(_quantiles(draws[name], levels))
            for name, site in self._latents()
        }

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


def _quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of draws along the first dimension, linearly interpolated."""
    ordered = draws.sort(0).values  # torch.quantile takes at most 2**24 elements
    at = levels * (len(draws) - 1)
    below = at.floor().long().clamp(max=len(draws) - 2).to(draws.device)
    weight = (at.to(draws.device) - below).to(draws.dtype)
    weight = weight.reshape(-1, *[1] * (draws.dim() - 1))
    return ordered[below].lerp(ordered[below + 1], weight)
