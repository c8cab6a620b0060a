# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluates a run of ``inference.vae`` again: ``python -m inference.evaluate RUN``.

With the seed and the numbers of samples of the run it gives the recorded figures exactly (same
machine, same number of threads); other numbers of samples can be asked for.

With ``--ais`` it estimates log p(x) tightly instead, by annealed importance sampling, and the
posterior gap, log p(x) less the guide's ELBO, on a random subset of the test images; it writes both
to ``results.json`` of the run and the figures of each image to ``ais.npz``. ``--against OTHER``
gives the difference to another run that was evaluated so, with its standard error over images.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from inference.data import Dataset
from inference.errors import (
    UserError,
    check_device,
    check_options,
    check_unread,
    positive,
    user_errors,
)
from inference.options import BOUNDED
from inference.precision import full_precision
from inference.presets import Config, build_data, build_vae
from inference.run import RunFolder, use_threads
from inference.tight import (
    POINTS_AT_ONCE,
    Tight,
    check_tight,
    load,
    paired,
    save,
    summary,
    tight_evaluation,
)
from models import toy
from models.vae import VAE
from pyro_ardae.evaluate import elbo, fitted_gaussian_log_marginal, log_marginal_from_guide

__all__ = [
    "Evaluation",
    "describe",
    "describe_tight",
    "evaluate",
    "evaluate_tight",
    "final_evaluation",
    "main",
    "restore",
]


@dataclass(frozen=True)
class Evaluation:
    """Options of ``python -m inference.evaluate``."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    test_points: int | None = None
    """Data points, a seeded random subset; as in the run by default."""
    test_samples: int | None = None
    """Importance samples per data point; as in the run by default."""
    guide_samples: int | None = None
    """Guide samples that the proposal is fitted to; as in the run by default."""
    seed: int | None = None
    """Seed of the subset and the samples; that of the run by default."""
    data_dir: Path | None = None
    """Folder of binarized_mnist.npz; as in the run by default."""
    threads: int | None = None
    """CPU threads of torch; as in the run by default."""
    device: str | None = None
    """Torch device; that of the run by default."""
    ais: bool = False
    """Estimate log p(x) by annealed importance sampling, and the posterior gap."""
    tight: Annotated[Tight, tyro.conf.arg(name="")] = field(default_factory=Tight)
    """Options of --ais."""
    against: Path | None = None
    """Run folder to compare with, evaluated with --ais too."""


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
    with torch.random.fork_rng(), full_precision(vae):
        torch.manual_seed(seed)
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = vae.prior(next(vae.parameters()))
        samples = vae.decoder(prior.sample(torch.Size((10_000,)))).sample().cpu()
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
    :returns: the figures of :func:`inference.tight.summary`.
    """
    x = build_data(config).subset("test", tight.points, tight.points_seed).to(config.device)
    with full_precision(vae):
        arrays = tight_evaluation(vae, x, tight, explicit=config.explicit)
    save(run, arrays, x)
    figures = summary(arrays)
    path = run / "results.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    settings = {"ais_options": dataclasses.asdict(tight)}
    RunFolder(run, ()).write_json("results.json", {**recorded, **settings, **figures})
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


def _check(options: Evaluation) -> None:
    if options.ais:
        unread = ("seed", "test_points", "test_samples", "guide_samples")
        check_unread(options, Evaluation(options.run), unread, reader="--ais")
        check_tight(options.tight)
    else:
        names = [field.name for field in dataclasses.fields(Tight)]
        check_unread(options.tight, Tight(), names, reader="an evaluation without --ais")
        check_options(options, positive(options, "test_points", "test_samples", "guide_samples"))


def main() -> None:
    """Evaluates a run again."""
    options = tyro.cli(Evaluation, prog="python -m inference.evaluate", description=__doc__)
    with user_errors():
        _check(options)
        own = {"run", "ais", "tight", "against"}
        given = {
            key: value
            for key, value in dataclasses.asdict(options).items()
            if key not in own and value is not None
        }
        config, vae = restore(options.run, **given)
        if config.threads is not None:
            use_threads(config.threads)
        if options.ais:
            figures = evaluate_tight(options.run, config, vae, options.tight)
            print(describe_tight(config, options.tight, figures))
        else:
            print(describe(config, final_evaluation(config, vae, build_data(config))))
        if options.against is not None:
            one, other = load(options.run), load(options.against)
            mean, error = paired(one, other)
            print(f"log p(x) {mean:+.3f} ± {error:.3f} nats against {options.against}")


if __name__ == "__main__":
    main()
