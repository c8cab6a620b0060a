# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What an automatic guide's encoders make of the data, for the rows of local plates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.nn.module import PyroModule
from torch import Tensor, nn

from pyro_ardae.autoguide.layout import Group

__all__ = ["Encoder", "Encoders"]

Encoder = Callable[..., Tensor]
"""``encoder(*args, **kwargs)``, with what the model is called with, to features ``[*rows, C]``."""


class Encoders(PyroModule):
    """The encoders of an automatic guide: one for the local plate, or one for each of several.

    :param encoder: a callable, or a mapping from names of plates to such; ``None`` for none.
    :raises TypeError: if it is neither.
    """

    def __init__(self, encoder: Encoder | Mapping[str, Encoder] | None) -> None:
        super().__init__()
        self._names: dict[str | None, str] = {}
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
            self._names[plate] = name

    @property
    def plates(self) -> set[str | None]:
        """Names of plates with an encoder; ``None`` for the encoder of the only one."""
        return set(self._names)

    def of(self, group: Group) -> Encoder | None:
        """The encoder of a group of latents."""
        known = [self._names[key] for key in (None, *group.plates) if key in self._names]
        return getattr(self, known[-1]) if group.plates and known else None

    def features(self, group: Group, args: Any, kwargs: Any) -> Tensor | None:
        """What the group's encoder makes of the arguments, ``[*rows, C]``; ``None`` without one.

        :raises TypeError: if that is no tensor.
        :raises ValueError: if it has not one dimension for each plate and one for the features.
        """
        encoder = self.of(group)
        if encoder is None:
            return None
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
