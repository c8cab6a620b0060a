# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

r"""Tight log p(x) and the posterior gap of a VAE, image by image, so that runs can be compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inference.autoencoders.ais import annealed_importance_sampling, refine_gaussian
from inference.autoencoders.entropy import fit_energy, implicit_elbo
from inference.autoencoders.options import Config
from inference.shared.errors import UserError, check_options, positive
from inference.shared.files import read_arrays, write_arrays
from inference.shared.randomness import forked_rng
from models.vae import VAE
from pyro_ardae.evaluate import elbo, fit_gaussian

__all__ = [
    "FILE_NAME",
    "Tight",
    "check_tight",
    "load",
    "paired",
    "save",
    "summary",
    "tight_evaluation",
]

#: File of a run folder that holds the figures of each image.
FILE_NAME = "ais.npz"

#: Data points treated at once: bounds the memory, and keeps the activations near the cache.
POINTS_AT_ONCE = 100

#: Draws of an image treated at once for the lower bound of an implicit guide's ELBO.
BOUND_DRAWS_AT_ONCE = 4


@dataclass(frozen=True)
class Tight:
    """Options of the tight evaluation."""

    points: int = 1000
    """Test images, a random subset."""
    points_seed: int = 0
    """Seed of that subset and of all draws; the same for runs that are to be compared."""
    chains: int = 4
    """Chains of an image."""
    temperatures: int = 30
    """Temperatures of a chain."""
    leapfrog: int = 3
    """Leapfrog steps at a temperature."""
    refinement_steps: int = 20
    """Steps by which the starting Gaussian moves to the posterior; 0 keeps the guide's own."""
    start_samples: int = 512
    """Draws of the guide that the starting Gaussian has its moments from."""
    elbo_samples: int = 256
    """Draws of the guide for its ELBO."""
    energy_updates: int = 600
    """Updates of the energy network, for guides without a density."""
    bound_samples: int = 16
    """Draws of the guide for the lower bound of its ELBO, where it has no density; 16 of each of
    1,000 images leave an error of 0.02 nats."""
    bound_mixing: int = 64
    """Others whose noise the density of each of these draws is averaged over."""


def check_tight(options: Tight, config: Config) -> None:
    """Refuses options out of range.

    :param Tight options: options of the estimate.
    :param Config config: those of the run that it is for.
    :raises UserError: naming the first of them.
    """
    names = ("temperatures", "leapfrog", "start_samples", "elbo_samples")
    names += ("energy_updates", "bound_samples")
    not_negative = ("points_seed", "refinement_steps", "bound_mixing")
    conditions = positive(options, *names)
    for name in ("points", "chains"):  # of fewer there is no error to report
        conditions.append((getattr(options, name) >= 2, name, "2 at least"))
    for name in not_negative:
        conditions.append((getattr(options, name) >= 0, name.replace("_", "-"), "0 at least"))
    # A Gaussian is fitted to draws of the guide.
    least = config.least_guide_samples
    conditions.append((options.start_samples >= least, "start-samples", f"two a latent, {least}"))
    check_options(options, conditions)


def tight_evaluation(
    vae: VAE, x: Tensor, options: Tight, *, explicit: bool
) -> dict[str, np.ndarray]:
    """Evaluates each image; the global random state is left as it was.

    :param VAE vae: the model, in full precision.
    :param Tensor x: images, ``[n, X]``.
    :param Tight options: options.
    :param bool explicit: whether the guide's ELBO can be evaluated, by
        :meth:`models.vae.VAE.explicit`.
    :returns: arrays ``[n]`` in nats: ``log_px`` by annealed importance sampling, its standard
        ``error``, ``elbo`` of the guide, and where it is not explicit two estimates that are too
        high, ``elbo_energy`` and ``elbo_gaussian``, of which ``elbo`` is the lower one on average,
        and, by :meth:`models.vae.VAE.conditional_draws`, ``elbo_bound``, which is too low.
    """
    parts: dict[str, list[Tensor]] = {}
    with forked_rng(options.points_seed):
        energy = None
        if not explicit:
            energy = fit_energy(vae.posterior, vae.trunk, x, num_updates=options.energy_updates)
        for chunk in x.split(POINTS_AT_ONCE):

            def log_joint(z: Tensor, chunk: Tensor = chunk) -> Tensor:
                return vae.log_joint(chunk, z)

            with torch.no_grad():
                posterior = vae.posterior(chunk)
                draws = posterior.sample(torch.Size((options.start_samples,)))
                start = fit_gaussian(draws)
                if energy is None:
                    found = {"elbo": elbo(*vae.explicit(chunk), options.elbo_samples)}
                else:
                    fit = implicit_elbo(
                        log_joint,
                        posterior,
                        vae.trunk(chunk),
                        energy,
                        num_samples=options.elbo_samples,
                        guide_samples=options.start_samples,
                    )
                    found = {"elbo_energy": fit.energy, "elbo_gaussian": fit.gaussian}
                    if hasattr(vae.head, "conditional_draws"):
                        found["elbo_bound"] = _bound(vae, chunk, options)
            proposal = refine_gaussian(log_joint, start, num_steps=options.refinement_steps)
            estimate = annealed_importance_sampling(
                log_joint,
                proposal,
                num_chains=options.chains,
                num_temperatures=options.temperatures,
                num_leapfrog=options.leapfrog,
            )
            found |= {"log_px": estimate.log_px, "error": estimate.error}
            for name, values in found.items():
                parts.setdefault(name, []).append(values)
    arrays = {name: torch.cat(values).double().cpu().numpy() for name, values in parts.items()}
    if "elbo" not in arrays:
        arrays["elbo"] = min(arrays["elbo_energy"], arrays["elbo_gaussian"], key=np.mean)
    return arrays


def _bound(vae: VAE, x: Tensor, options: Tight) -> Tensor:
    """A lower bound of the ELBO ``[n]``, by log q given a part of its noise."""
    parts = []
    for first in range(0, options.bound_samples, BOUND_DRAWS_AT_ONCE):
        shape = torch.Size((min(BOUND_DRAWS_AT_ONCE, options.bound_samples - first),))
        z, log_q = vae.conditional_draws(x, shape, num_mixing=options.bound_mixing)
        parts.append(vae.log_joint(x, z) - log_q)
    return torch.cat(parts).mean(0)


def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the images with their standard errors, as they enter ``results.json``.

    ``ais_chain_error`` is the error of ``ais_log_px`` that the chains make: it, unlike the standard
    error over images, falls with more chains and temperatures. ``ais_bias`` is what that error
    takes off the mean, by half of its square. ``ais_gap`` of a guide without a density is a lower
    limit, ``ais_gap_bound`` an upper one.
    """
    figures: dict[str, float] = {"ais_points": len(arrays["log_px"])}
    columns = {
        "ais_log_px": arrays["log_px"],
        "ais_elbo": arrays["elbo"],
        "ais_gap": arrays["log_px"] - arrays["elbo"],
    }
    if "elbo_bound" in arrays:
        columns["ais_elbo_bound"] = arrays["elbo_bound"]
        columns["ais_gap_bound"] = arrays["log_px"] - arrays["elbo_bound"]
    for name, values in columns.items():
        figures[name] = float(values.mean())
        figures[f"{name}_se"] = float(values.std(ddof=1) / math.sqrt(len(values)))
    squares = arrays["error"] ** 2
    figures["ais_chain_error"] = float(math.sqrt(squares.sum()) / len(squares))
    figures["ais_bias"] = float(-squares.mean() / 2)
    return figures


def save(run: Path, arrays: Mapping[str, np.ndarray], x: Tensor) -> Path:
    """Writes the figures of each image into a run folder, with a digest of the images."""
    path = run / FILE_NAME
    write_arrays(path, **arrays, images=np.array(_digest(x)))
    return path


def load(run: Path) -> dict[str, np.ndarray]:
    """Reads what :func:`save` wrote.

    :raises UserError: if there is none.
    """
    path = run / FILE_NAME
    try:
        return read_arrays(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected figures of single images, found none ({error}); run "
            f"python -m inference.evaluate {run} --ais"
        ) from None


def paired(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str = "log_px"
) -> tuple[float, float]:
    """Mean of ``one - other`` over the same images, and its standard error.

    :raises UserError: if the images are not the same.
    """
    if str(one["images"]) != str(other["images"]):
        raise UserError(
            f"expected figures of the same images to compare, found {len(one[name])} and "
            f"{len(other[name])} that differ; evaluate both runs with the same --points and "
            "--points-seed"
        )
    difference = one[name] - other[name]
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest()
