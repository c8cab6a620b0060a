# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Presets of the VAE programs, a row of a benchmark table each, and which options apply to them."""

from __future__ import annotations

import dataclasses
from typing import Any

from inference.autoencoders.build import build_data, build_loss, build_score_estimator, build_vae
from inference.autoencoders.options import MAY_DIFFER, SCORED, Config
from inference.shared.errors import (
    UserError,
    check_device,
    check_options,
    check_unread,
    one_seed,
    positive,
)
from pyro_ardae.score.whitening import per_context

__all__ = [
    "MAY_DIFFER",
    "PAPER_PRESETS",
    "PRESETS",
    "Config",
    "build_data",
    "build_loss",
    "build_score_estimator",
    "build_vae",
    "check",
    "check_range",
]

_TOY = Config(
    data="25gaussians",
    architecture="mlp",
    guide="gaussian",
    steps=10_800,
    latent_dim=2,
    batch_size=64,
    num_particles=8,
    learning_rate=2e-3,
    decoder_learning_rate=4e-3,
    decoder_activation="tanh",
    decoder_input_scale=4.0,
    activation="silu",
    average_decay=0.995,
    beta_start=0.4,
    beta_steps=2400,
    decay_start=4800,
    decay_steps=6000,
    noise_dim=10,
    base="none",
    score_hidden_dim=64,
    score_depth=3,
    score_folds=8,
    score_steps=3,
    num_score_samples=32,
    valid_every=1000,
    valid_points=1000,
    valid_samples=200,
    test_points=2000,
    test_samples=1000,
    prior_weight=0.5,
)
_MNIST = Config(
    data="sbmnist",
    architecture="mlp",
    guide="gaussian",
    steps=16_000,
    batch_size=256,
    learning_rate=3e-3,
    # With a small epsilon, weights of pixels that are hardly ever white move as fast as all others,
    # and the model overfits: test ELBO -93.1 where this one has -92.9.
    adam_eps=2.0,
    activation="elu",
    decay_start=8000,
    decay_steps=8000,
)

_DATA = {"sbmnist": "Statically binarized MNIST", "dbmnist": "Dynamically binarized MNIST"}

#: Name in the description, and the options that differ from the MLP's.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("MLP", {}),
    "conv": ("Conv", {}),
    # A step takes forty times as long as the MLP's: so many fit an hour.
    "resconv": (
        "ResConv",
        {"steps": 6000, "decay_start": 3000, "decay_steps": 3000, "test_points": 2000},
    ),
    # A latent of 64 dimensions in all: the covariance of the proposal takes more draws.
    "mlp2": ("MLP, two levels of latents", {"guide_samples": 1024}),
}

#: With full covariance, or a deviation. Norms differ by half of their mean as a rule. Without this,
#: Conv diverged from one spike, and the hierarchical implicit guide after some 1,000 steps; two
#: levels of latents, one seed of two, with a bound of twelve means.
_CLIP = {"clip": 2.0}

#: What the deviation's score takes. With twice the contexts, a layer more and an update in every
#: step a model is no better after 6,000 steps.
_SCORE = {
    "score_depth": 3,
    "score_whitening": "centered",
    "num_score_samples": 4,
    "num_score_contexts": 64,
    "score_interval": 2,
    "score_folds": 1,
    "score_steps": 1,
}

#: Name in the description, and the options that differ from the Gaussian guide's.
_GUIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("diagonal Gaussian guide", {}),
    "fullcov": ("full-covariance Gaussian guide", _CLIP),
    "auxiliary": ("guide with an auxiliary latent (HVI)", {}),
    "flow": ("inverse autoregressive flow guide", {}),
    "implicit": ("implicit guide", {**_CLIP, **_SCORE, "gain": 0.8}),
    # From a full Gaussian, its deviation decays to nothing; without the decay its scale drifts.
    "hierarchical-implicit": (
        "hierarchical implicit guide",
        {**_CLIP, **_SCORE, "base": "diagonal", "deviation_decay": 0.2},
    ),
    "sivi": ("semi-implicit guide (SIVI)", {}),
    "avb": (
        "implicit guide by adversarial variational Bayes",
        {**_CLIP, **_SCORE, "gain": 0.8, "num_score_contexts": 128, "score_interval": 1},
    ),
}

#: Of single presets. After many epochs a guide's gap is larger on new images than on those that it
#: has learned from; where it learns by draws of the model too, less so.
_OF_PRESET: dict[str, dict[str, Any]] = {"sbmnist-mlp-implicit": {"fantasy_share": 0.25}}

#: What was measured, by preset.
_MEASURED = {
    "sbmnist-mlp-implicit": "In an hour of one core, 148,000 steps: test log p(x) -87.1 (1,000 "
    "images, annealed importance sampling), posterior gap 4.0 at most.",
    "sbmnist-mlp-gaussian": "In 5 minutes of one core, 13,600 steps: test ELBO -92.9, log p(x) "
    "-89.1 (all images, 500 samples of its own posterior).",
}


def _rows() -> list[tuple[str, str, str]]:
    """Data, architecture and guide of every MNIST preset."""
    of_the_paper = list(_GUIDES)[:6]
    rows = [
        (data, architecture, guide)
        for data in _DATA
        for architecture in ("mlp", "conv", "resconv")
        for guide in of_the_paper
    ]
    rows += [("sbmnist", "mlp", guide) for guide in list(_GUIDES)[6:]]
    return [*rows, *(("sbmnist", "mlp2", guide) for guide in ("gaussian", "implicit"))]


def _presets() -> dict[str, tuple[str, Config]]:
    presets = {}
    for data, architecture, guide in _rows():
        of_architecture, changes = _ARCHITECTURES[architecture]
        of_guide, of_guide_changes = _GUIDES[guide]
        config = dataclasses.replace(
            _MNIST,
            **{"data": data, "architecture": architecture, "guide": guide},
            **{**changes, **of_guide_changes},
        )
        config = dataclasses.replace(config, **_OF_PRESET.get(config.preset, {}))
        description = f"{_DATA[data]}, {of_architecture}, {of_guide}."
        measured = _MEASURED.get(config.preset)
        presets[config.preset] = (f"{description} {measured or ''}".strip(), config)
    return presets


def _plane_presets() -> dict[str, tuple[str, Config]]:
    """Two latents, whose posterior can be integrated on a grid and drawn."""
    config = dataclasses.replace(
        _MNIST, latent_dim=2, steps=5000, decay_start=2500, decay_steps=2500, average_decay=0.998
    )
    # Draws in the plane cost little, and a deviation of the Gaussian's own size is wanted.
    implicit = {"num_score_samples": 16}
    guides = {"gaussian": {}, "implicit": implicit}
    return {
        f"sbmnist-mlp-2d-{guide}": (
            f"{_DATA['sbmnist']}, MLP, 2 latents, {_GUIDES[guide][0]}.",
            dataclasses.replace(config, guide=guide, **changes),
        )
        for guide, changes in guides.items()
    }


#: Description and options by name; the figures are those of one core of a server CPU.
PRESETS: dict[str, tuple[str, Config]] = {
    "25gaussians-implicit": (
        "25 Gaussians, implicit guide. Test log p(x) -3.80 after 2 minutes of one core.",
        # With a step size that falls, this guide gives up cells that it had found.
        dataclasses.replace(
            _TOY, guide="implicit", steps=6000, beta_steps=2000, decay_start=0, decay_steps=0
        ),
    ),
    "25gaussians-gaussian": (
        "25 Gaussians, Gaussian guide. Test log p(x) -3.91, in no more time.",
        _TOY,
    ),
    **_presets(),
    **_plane_presets(),
}


def _paper(config: Config) -> Config:
    """A preset with the schedule of the authors' run scripts, in epochs of 390 minibatches."""
    residual, static = config.architecture == "resconv", config.data == "sbmnist"
    scored = config.guide in SCORED
    annealed = residual and (static or config.guide == "hierarchical-implicit")
    return dataclasses.replace(
        config,
        schedule="paper",
        steps=(6400 if residual or scored else 4700) * 390,
        batch_size=128,
        learning_rate=1e-3 if residual and (static or scored) else 1e-4,
        adam_beta1=0.9 if residual else 0.5,
        adam_eps=1e-8,
        activation="elu" if residual else "softplus",
        beta_start=1e-4 if annealed else 1.0,
        beta_steps=50_000 if annealed else 0,
        beta_shape="linear",
        auxiliary_dim=100,
        fantasy_share=0.0,
        average_decay=0.998 if static else 0.0,
        decay_start=0,
        decay_steps=0,
        valid_every=20_000,
        checkpoint_every=20_000,
    )


#: The MNIST presets with ``--schedule paper``.
PAPER_PRESETS = {
    name: (description, _paper(config))
    for name, (description, config) in PRESETS.items()
    if config.data != "25gaussians"
}

_DEVIATING = ("implicit", "hierarchical-implicit", "avb", "auxiliary", "sivi")

#: Guides that read an option; all guides where it is not listed.
_READ_BY: dict[str, tuple[str, ...]] = {
    "noise_dim": ("implicit", "avb"),
    "base": SCORED,
    "auxiliary_dim": ("hierarchical-implicit", "auxiliary", "sivi"),
    "num_mixing": ("sivi",),
    "flow_transforms": ("flow",),
    "deviation_decay": _DEVIATING,
    "gain": (*_DEVIATING, "fullcov"),
    **dict.fromkeys(
        (
            *("score_hidden_dim", "score_depth", "score_learning_rate", "score_folds"),
            *("score_whitening", "score_steps", "score_interval"),
            *("num_score_samples", "num_score_contexts", "num_score_updates"),
        ),
        SCORED,
    ),
}


def _in_range(config: Config) -> list[tuple[bool, str, str]]:
    unit = ("average_decay", "adam_beta1", "prior_weight", "fantasy_share")
    not_negative = ("beta_steps", "decay_start", "decay_steps", "deviation_decay")
    not_negative += ("adam_eps", "fantasy_start")
    conditions = positive(
        config,
        *("steps", "batch_size", "learning_rate", "num_particles", "num_mixing", "gain"),
        *("flow_transforms", "auxiliary_dim", "noise_dim", "score_hidden_dim", "score_depth"),
        *("score_learning_rate", "score_folds", "score_steps", "num_score_updates"),
        *("num_score_contexts", "score_interval", "valid_every", "valid_points", "valid_samples"),
        *("checkpoint_every", "test_points", "test_samples"),
        *("budget_seconds", "threads", "decoder_learning_rate"),
    )
    conditions += [(0 <= getattr(config, name) < 1, name, "a number in [0, 1)") for name in unit]
    conditions.append((config.clip is None or config.clip >= 1, "clip", "1 at least"))
    share = config.seen_share
    conditions.append((share is None or 0 < share < 1, "seen_share", "a number in (0, 1)"))
    conditions += [(getattr(config, name) >= 0, name, "0 at least") for name in not_negative]
    conditions += one_seed(config)
    none = config.fantasy_share > 0 and config.seen_share is None and config.fantasies == 0
    conditions.append((not none, "fantasy_share", "enough of --batch-size for one draw"))
    for name in ("valid_samples", "test_samples"):
        of_prior = round(config.prior_weight * getattr(config, name))
        enough = config.prior_weight == 0 or 0 < of_prior < getattr(config, name)
        conditions.append((enough, name, "enough for a share of --prior-weight"))
    deviates = config.guide in ("implicit", "avb") and config.base != "none"
    scored = config.guide in SCORED
    folds, draws, dim = config.score_folds, config.num_score_samples, config.latent_dim
    kind, steps = config.score_whitening, config.score_steps
    least = 2 if per_context(1, kind) else 1
    conditions += [
        (
            config.guide_samples >= config.least_guide_samples,
            "guide_samples",
            f"two a latent, {config.least_guide_samples}",
        ),
        (not deviates or config.gain < 1, "gain", "a number in (0, 1)"),
        (not deviates or config.noise_dim >= dim, "noise_dim", f"the latent's width, {dim}"),
        (not scored or draws >= max(2, folds), "num_score_samples", "--score-folds, 2 at least"),
        (not scored or folds >= least, "score_folds", f"2 at least with --score-whitening {kind}"),
        (not scored or steps is None or steps <= folds, "score_steps", "--score-folds at most"),
    ]
    return [(holds, name.replace("_", "-"), expected) for holds, name, expected in conditions]


def check_range(config: Config) -> None:
    """Refuses options out of range.

    :raises UserError: naming the first of them.
    """
    check_options(config, _in_range(config))


def check(config: Config) -> None:
    """Refuses options out of range, and those that a run would ignore.

    :raises UserError: for the first of them: one that the preset does not read must have the
        preset's default.
    """
    check_range(config)
    check_device(config.device)
    presets = PAPER_PRESETS if config.schedule == "paper" else PRESETS
    if config.preset not in presets:
        raise UserError(
            f"--schedule {config.schedule}: expected an MNIST preset, found {config.preset}"
        )
    default = presets[config.preset][1]
    toy, residual = config.data == "25gaussians", config.architecture == "resconv"
    unread = {name for name, guides in _READ_BY.items() if config.guide not in guides}
    unread |= {"images", "download"} if config.data != "dbmnist" else set()
    unread |= {"train_on_valid", "decoder"} if toy else {"decoder_input_scale"}
    whole = config.architecture in ("conv", "resconv") or config.guide == "auxiliary"
    unread |= {"seen_share"} if toy or whole else set()
    unread |= {"fantasy_share"} if config.seen_share is not None else set()
    unread |= {"fantasy_start"} if not config.fantasies else set()
    unread |= {"decoder_learning_rate"} if config.decoder is not None else set()
    unread |= {"activation", "decoder_activation"} if residual else set()
    if config.guide in SCORED and config.base == "none":
        unread |= {"gain", "deviation_decay"}
    if config.beta_steps == 0:
        unread |= {"beta_start", "beta_shape"}
    if config.decay_steps == 0:
        unread |= {"decay_start"}
    check_unread(config, default, sorted(unread), reader=config.preset)
    if config.resume is not None and config.out is not None:
        raise UserError("--out: a resumed run stays in its folder, expected it to be left out")
    if config.guide == "hierarchical-implicit" and config.base == "none":
        raise UserError(
            f"--base: {config.preset} deviates from a Gaussian, expected diagonal or full, "
            "found none"
        )
    if config.train_on_valid and config.budget_seconds is not None:
        raise UserError(
            "--train-on-valid: expected a fixed number of --steps, found --budget-seconds"
        )
    if config.precision == "tf32" and not config.device.startswith("cuda"):
        raise UserError(f"--precision tf32: expected a CUDA device, found {config.device}")
