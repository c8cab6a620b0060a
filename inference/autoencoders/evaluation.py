# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluation of a VAE run: log p(x), and what its folder is told of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.autoencoders.data import Dataset
from inference.autoencoders.options import BOUNDED
from inference.autoencoders.presets import Config, build_data, build_vae
from inference.autoencoders.tight import POINTS_AT_ONCE, Tight, save, summary, tight_evaluation
from inference.shared.errors import UserError, check_device
from inference.shared.precision import full_precision
from inference.shared.randomness import forked_rng
from inference.shared.run import RunFolder
from models import toy
from models.vae import VAE
from pyro_ardae.evaluate import elbo, fitted_gaussian_log_marginal, log_marginal_from_guide

__all__ = [
    "describe",
    "describe_tight",
    "evaluate",
    "evaluate_tight",
    "final_evaluation",
    "restore",
]


@torch.no_grad()
def evaluate(
    vae: VAE,
    x: Tensor,
    *,
    explicit: bool,
    own: bool = True,
    num_samples: int,
    guide_samples: int,
    prior_weight: float,
    seed: int,
) -> dict[str, float]:
    """Estimates log p(x) in nats per data point, with standard errors over the data points.

    Every figure is a mean over the rows of ``x``:

    - ``log_px``: importance sampling, ``num_samples`` draws of a full-covariance Gaussian fitted to
      ``guide_samples`` draws of the guide, mixed with the prior by ``prior_weight``
      (:func:`pyro_ardae.evaluate.fitted_gaussian_log_marginal`); ``log_px_se`` its standard error;
    - ``log_px_own``, ``elbo`` and their ``_se``: the same with an explicit guide's own posterior as
      the proposal (unless not ``own``), and its evidence lower bound (16 draws), as
      :meth:`models.vae.VAE.explicit` has them: of the joint with the auxiliary latent where there
      is one, and with the bound on the density of a semi-implicit guide;
    - ``aggregate_std``: standard deviation of all latents drawn, averaged over dimensions (1 is the
      prior's); ``point_std``: standard deviation of one data point's, averaged likewise.

    The global random state is left as it was; matrix products are in fp32.
    """
    totals: dict[str, list[Tensor]] = {"log_px": []}
    latents, point_variances = [], []
    with forked_rng(seed), full_precision(vae):
        for chunk in x.split(POINTS_AT_ONCE):

            def log_joint(z: Tensor, chunk: Tensor = chunk) -> Tensor:
                return vae.log_joint(chunk, z)

            posterior = vae.posterior(chunk)
            draws = posterior.sample(torch.Size((guide_samples,)))
            latents.append(draws[0])
            point_variances.append(draws.var(0))
            totals["log_px"].append(
                fitted_gaussian_log_marginal(
                    log_joint, draws, num_samples, prior_weight=prior_weight
                )
            )
            if explicit:
                joint, guide = vae.explicit(chunk)
                if own:
                    log_px_own = log_marginal_from_guide(joint, guide, num_samples)
                    totals.setdefault("log_px_own", []).append(log_px_own)
                totals.setdefault("elbo", []).append(elbo(joint, guide, 16))
    result: dict[str, float] = {}
    for name, parts in totals.items():
        values = torch.cat(parts).double()
        result[name] = values.mean().item()
        result[f"{name}_se"] = (values.std() / math.sqrt(len(values))).item()
    result["aggregate_std"] = torch.cat(latents).std(0).mean().item()
    result["point_std"] = torch.cat(point_variances).sqrt().mean().item()
    return result


def final_evaluation(config: Config, vae: VAE, data: Dataset) -> dict[str, float]:
    """The final evaluation of a run, as its options say."""
    x = data.subset("test", config.test_points, config.seed).to(config.device)
    figures = evaluate(
        vae,
        x,
        explicit=config.explicit,
        num_samples=config.test_samples,
        guide_samples=config.guide_samples,
        prior_weight=config.prior_weight,
        seed=config.seed,
    )
    figures |= {
        "test_points": len(x),
        "test_samples": config.test_samples,
        "guide_samples": config.guide_samples,
    }
    if config.data == "25gaussians":
        figures |= _modes(vae, config.seed)
    return figures


@torch.no_grad()
def _modes(vae: VAE, seed: int) -> dict[str, float]:
    """Counts the modes that samples of the model come near to.

    A mode counts if at least half of the samples that belong there lie within 2 standard deviations
    of it: 1.73 % of 10,000, where 3.46 % are expected. A single wide Gaussian has 5 of 25 by this
    measure. ``smallest_mode`` is the smallest share of a mode, ``near_a_mode`` that of all of them
    together; 86 % are expected.
    """
    with forked_rng(seed):
        samples = vae.draw(10_000, next(vae.parameters())).cpu()
    distance, nearest = torch.cdist(samples, toy.modes()).min(-1)
    near = nearest[distance < 2 * math.sqrt(toy.VARIANCE)]
    counts = torch.bincount(near, minlength=25)
    return {
        "modes": int((counts >= 173).sum()),
        "smallest_mode": int(counts.min()) / len(samples),
        "near_a_mode": len(near) / len(samples),
    }


def describe(config: Config, figures: dict[str, float]) -> str:
    """The figures in words, the numbers of samples beside them."""
    samples = f"{figures['test_samples']} samples"
    lines = [
        f"test log p(x) {figures['log_px']:.3f} ± {figures['log_px_se']:.3f} nats "
        f"({figures['test_points']} points, {samples} of a Gaussian fitted to "
        f"{figures['guide_samples']} guide samples"
        + (f", prior mixed in by {config.prior_weight:g})" if config.prior_weight else ")")
    ]
    if "elbo" in figures:
        lines.append(
            f"test log p(x) {figures['log_px_own']:.3f} ± {figures['log_px_own_se']:.3f} nats "
            f"({samples} of its own posterior), "
            f"ELBO {figures['elbo']:.3f} ± {figures['elbo_se']:.3f} nats"
        )
    if "modes" in figures:
        lines.append(
            f"modes in samples {figures['modes']} of 25, {figures['near_a_mode']:.1%} of the "
            f"samples near one; highest possible log p(x) {toy.EXPECTED_LOG_PROB}"
        )
    lines.append(
        f"standard deviation of the latents: {figures['aggregate_std']:.3f} in the aggregate "
        f"(prior 1), {figures['point_std']:.3f} for one data point"
    )
    return "\n".join(lines)


def restore(run: Path, **changes: Any) -> tuple[Config, VAE]:
    """Loads the best weights of a run, and its options with ``changes``."""
    recorded = RunFolder.read_config(run)
    paths = {
        name: Path(recorded[name]) if recorded.get(name) else None
        for name in ("data_dir", "out", "resume", "decoder")
    }
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        values = {key: value for key, value in recorded.items() if key in known}
        config = Config(**{**values, **paths, **changes})
    except TypeError as error:
        raise UserError(f"{run / 'config.json'}: expected the options of a run ({error})") from None
    check_device(config.device)
    vae = build_vae(config)
    vae.load_state_dict(RunFolder(run, ()).load("best", config.device)["vae"])
    return config, vae


def evaluate_tight(run: Path, config: Config, vae: VAE, tight: Tight) -> dict[str, float]:
    """Tight log p(x) and posterior gap of a run, written to its folder.

    :param Path run: the run folder.
    :param Config config: its options.
    :param VAE vae: its model.
    :param Tight tight: options of the estimate.
    :returns: the figures of :func:`inference.autoencoders.tight.summary`.
    """
    x = build_data(config).subset("test", tight.points, tight.points_seed).to(config.device)
    with full_precision(vae):
        arrays = tight_evaluation(vae, x, tight, explicit=config.explicit)
    save(run, arrays, x)
    figures = summary(arrays)
    folder, settings = RunFolder(run, ()), {"ais_options": dataclasses.asdict(tight)}
    recorded = folder.read_json("results.json")
    folder.write_json("results.json", {**recorded, **settings, **figures})
    return figures


def describe_tight(config: Config, tight: Tight, figures: dict[str, float]) -> str:
    """The figures of :func:`evaluate_tight` in words."""
    limits = ""
    if not config.explicit:
        limits = " (ELBO too high, gap too small, by the misfit of the entropy)"
    elif config.guide in BOUNDED:
        limits = " (ELBO too low, gap too large, by the looseness of the bound)"
    if "ais_gap_bound" in figures:
        limits += (
            f"\nat least ELBO {figures['ais_elbo_bound']:.3f}, at most gap "
            f"{figures['ais_gap_bound']:.3f} ± {figures['ais_gap_bound_se']:.3f} nats"
        )
    return (
        f"test log p(x) {figures['ais_log_px']:.3f} ± {figures['ais_log_px_se']:.3f} nats by "
        f"annealed importance sampling ({figures['ais_points']} images, {tight.chains} chains of "
        f"{tight.temperatures} temperatures; error of the chains "
        f"{figures['ais_chain_error']:.3f}, bias about {figures['ais_bias']:.3f})\n"
        f"ELBO {figures['ais_elbo']:.3f}, posterior gap {figures['ais_gap']:.3f} ± "
        f"{figures['ais_gap_se']:.3f} nats" + limits
    )
