# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Reference draws of a posterior: NUTS, or exact ones where they can be had; made once, then read.

- ``nuts``: 4 chains of Pyro's NUTS, run again with twice the draws while the largest split r-hat
  of a coordinate is 1.01 or more, three times at most.
- ``ancestral``: the model has no data, so its own draws are exact.
- ``grid``: a posterior of two dimensions, tabulated in unconstrained space in cells 0.05 wide:
  exact but for a uniform law within each cell (0.5 % of the variance for a scale of 0.2). NUTS does
  not mix between two separated modes.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from inference.shared import grid
from inference.shared.errors import UserError
from inference.shared.files import read_arrays, write_arrays
from inference.shared.randomness import forked_rng
from inference.shared.run import make_folder
from models.energies import Energy
from models.posteriors import Draws, Posterior
from pyro_ardae.traces import run_many
from pyro_ardae.unconstrained import UnconstrainedModel

__all__ = ["R_HAT_LIMIT", "Reference", "flatten", "reference"]

R_HAT_LIMIT = 1.01
_CHAINS = 4


@dataclass(frozen=True)
class Reference:
    """Draws that guides are compared with."""

    draws: Tensor
    """``[chains, draws, dim]``, float64, constrained."""
    labels: tuple[str, ...]
    """Names of the coordinates, like ``theta[0]``."""
    source: str
    """``"nuts"``, ``"ancestral"`` or ``"grid"``."""
    r_hat: float
    """Largest split r-hat of a coordinate."""
    ess: float
    """Smallest effective sample size of a coordinate."""

    def __str__(self) -> str:
        chains, count, _ = self.draws.shape
        return (
            f"{self.source}, {chains} x {count} draws, r-hat {self.r_hat:.4f}, "
            f"effective sample size {self.ess:.0f}"
        )


def flatten(draws: Draws) -> tuple[Tensor, tuple[str, ...]]:
    """Draws by site to ``[num_draws, dim]`` and the names of the coordinates, sites by name."""
    parts, labels = [], list[str]()
    for name in sorted(draws):
        value = draws[name].detach()
        rows = value.reshape(len(value), -1).double()
        parts.append(rows)
        scalar = value.dim() == 1
        labels += [name] if scalar else [f"{name}[{i}]" for i in range(rows.shape[1])]
    return torch.cat(parts, -1), tuple(labels)


def reference(
    posterior: Posterior, folder: Path, *, num_draws: int = 1000, warm_up: int = 500, seed: int = 0
) -> Reference:
    """The reference of a posterior, from the folder if it is there, else made and put there.

    :param Posterior posterior: the posterior.
    :param Path folder: folder of the files ``NAME.npz``.
    :param int num_draws: draws per chain, 4 chains.
    :param int warm_up: steps of NUTS before them.
    :param int seed: seed of the first chain.
    :raises UserError: if the folder cannot be written, or the file is damaged.
    """
    model = posterior.reference_model or posterior.model
    settings = json.dumps({"num_draws": num_draws, "warm_up": warm_up, "seed": seed})
    path = folder / f"{model.__name__}.npz"
    draws = _read(path, settings)
    if draws is None:
        draws = _make(posterior, num_draws, warm_up, seed)
        _write(path, draws, settings)
    translate = posterior.translate or (lambda chain: chain)
    chains = [flatten(translate(chain)) for chain in _chains(draws)]
    stacked = torch.stack([rows for rows, _ in chains])
    return Reference(
        draws=stacked,
        labels=chains[0][1],
        source=posterior.reference,
        r_hat=float(split_gelman_rubin(stacked, 0, 1).max()),
        ess=float(effective_sample_size(stacked, 0, 1).min()),
    )


def _make(posterior: Posterior, num_draws: int, warm_up: int, seed: int) -> Draws:
    """Draws by site, ``[chains, draws, *event]``."""
    pyro.clear_param_store()
    if posterior.reference == "nuts":
        for _ in range(3):
            draws = _nuts(posterior, num_draws, warm_up, seed)
            stacked = torch.stack([flatten(chain)[0] for chain in _chains(draws)])
            if float(split_gelman_rubin(stacked, 0, 1).max()) < R_HAT_LIMIT:
                break
            num_draws *= 2
        return draws
    total = _CHAINS * num_draws
    with forked_rng(seed):
        joint = UnconstrainedModel(posterior.model, *posterior.args)
        if posterior.reference == "ancestral":
            trace = run_many(posterior.model, posterior.args, total, joint.max_plate_nesting)
            flat = {name: trace.nodes[name]["value"] for name in joint.sites}
        else:

            def energy(u: Tensor) -> Tensor:
                chunks = [-joint.log_joint(chunk.float()) for chunk in u.split(20_000)]
                return torch.cat(chunks).double()

            with torch.no_grad():
                found = Energy(posterior.name, energy)
                u = grid.sample(found, total, torch.Generator().manual_seed(seed))
                flat = joint.unpack(u)
    shapes = {name: site["value"].shape for name, site in joint.sites.items()}
    return {name: flat[name].reshape(_CHAINS, num_draws, *shapes[name]) for name in joint.sites}


def _nuts(posterior: Posterior, num_draws: int, warm_up: int, seed: int) -> Draws:
    model = posterior.reference_model or posterior.model
    args = posterior.args if posterior.reference_args is None else posterior.reference_args
    chains: list[Draws] = []
    for chain in range(_CHAINS):
        pyro.set_rng_seed(1000 * seed + chain)
        with warnings.catch_warnings():
            # torch.jit is deprecated; NUTS is three to four times as fast by it.
            warnings.simplefilter("ignore")
            kernel = NUTS(
                model,
                full_mass=posterior.full_mass,
                jit_compile=True,
                ignore_jit_warnings=True,
            )
            mcmc = MCMC(kernel, num_draws, warm_up, disable_progbar=True)
            mcmc.run(*args)
        chains.append(mcmc.get_samples())
    return {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}


def _chains(draws: Draws) -> list[Draws]:
    return [{name: value[i] for name, value in draws.items()} for i in range(_CHAINS)]


def _read(path: Path, settings: str) -> Draws | None:
    """The draws of a file that was made with these settings; ``None`` without one.

    :raises UserError: if it is damaged, or no such file.
    """
    if not path.exists():
        return None
    try:
        arrays = read_arrays(path)
        if str(arrays.pop("settings")) != settings:
            return None
        return {name: torch.as_tensor(value) for name, value in arrays.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected reference draws that this program made, found: {error!r}. Delete "
            "the file, and they are made anew"
        ) from None


def _write(path: Path, draws: Draws, settings: str) -> None:
    make_folder(path.parent)
    arrays = {name: value.detach().numpy() for name, value in draws.items()}
    write_arrays(path, settings=np.asarray(settings), **arrays)
