# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The posteriors of an automatic guide's groups of latents, built one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyro.nn.module import PyroModule
from torch import Tensor

from pyro_ardae.autoguide.layout import Group
from pyro_ardae.autoguide.posterior import RowPosterior

__all__ = ["Networks", "add_parts"]


@dataclass(frozen=True)
class Networks:
    """What the networks of all groups have in common: see :class:`~pyro_ardae.AutoImplicit`.

    :raises ValueError: for an option out of range.
    """

    init_scale: float
    extra_noise: int
    hidden_dims: tuple[int, ...]
    gain: float
    input_scale: float
    embedding_dim: int

    def __post_init__(self) -> None:
        if not self.init_scale > 0:
            raise ValueError(f"init_scale: expected a number > 0, got {self.init_scale}.")
        if self.extra_noise < 0:
            raise ValueError(f"extra_noise: expected an integer >= 0, got {self.extra_noise}.")
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected an integer >= 1, got {self.embedding_dim}.")


def add_parts(
    posterior: PyroModule,
    groups: Sequence[Group],
    networks: Networks,
    start: Mapping[str, Tensor],
    features: Mapping[str, Tensor],
) -> int:
    """Adds the posterior of every group to a module, under the group's name.

    :param posterior: the module, an attribute of the guide.
    :param groups: the globals first, if there are any.
    :param networks: options.
    :param start: initial values on the reals, by site.
    :param features: what encoders make of the rows, by the group's name.
    :returns: dimensions of the globals.
    """
    global_dim = 0
    for group in groups:
        rows = features.get(group.name)
        part = RowPosterior(
            group.pack(start),
            networks.init_scale,
            condition_dim=global_dim if group.plates else 0,
            embedding_dim=networks.embedding_dim if group.plates else 0,
            feature_dim=None if rows is None else rows.shape[-1],
            extra_noise=networks.extra_noise,
            hidden_dims=networks.hidden_dims,
            gain=networks.gain,
            input_scale=networks.input_scale,
        )
        setattr(posterior, group.name, part)
        part.follow_store(f"{posterior._pyro_name}.{group.name}")
        if not group.plates:
            global_dim = group.dim
    return global_dim


def check_rows(
    group: Group, features: Tensor | None, hidden: Sequence[str], *, part_of_list: bool
) -> None:
    """Refuse a group of rows that the guide does not know.

    :param features: what the encoder makes of them, if there is one.
    :param hidden: plates of the group whose subsample the model's caller determines.
    :param part_of_list: whether an AutoGuideList makes the plates.
    :raises ValueError: for such a plate, without an encoder of those rows.
    """
    if not hidden:
        return
    if features is None or part_of_list:
        remedy = "." if part_of_list else ", or an encoder=… that tells rows apart by their data."
        raise ValueError(
            f"AutoImplicit: the model's plate '{hidden[0]}' is given its subsample by the caller, "
            "so the guide does not know which rows it is about. Pass create_plates=…, which "
            f"returns that plate with the same subsample{remedy}"
        )
    if features.shape[:-1] != group.rows:
        raise ValueError(
            f"encoder: the model's plate '{hidden[0]}' is given its subsample by the caller; "
            f"expected features of those rows, {group.rows}, got {tuple(features.shape[:-1])}. "
            "Encode the subsample, or pass create_plates=…."
        )
