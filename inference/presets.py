# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Options and presets of the VAE programs, and what is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from inference.data import BinarizedMNIST, Dataset, ToyData, load_binarized_mnist
from inference.errors import UserError
from models.guides import GaussianGuide, ImplicitGuide
from models.mnist import LATENT_DIM, NUM_PIXELS, BernoulliDecoder
from models.networks import ACTIVATIONS, MLP
from models.toy import NormalDecoder
from models.vae import VAE
from pyro_ardae import ARDAE, TraceImplicit_ELBO

__all__ = ["MAY_DIFFER", "PRESETS", "Config", "build_data", "build_loss", "build_vae"]


@dataclass(frozen=True)
class Config:
    """Options of a VAE run; each preset sets its own defaults."""

    task: tyro.conf.Suppress[Literal["25gaussians", "sbmnist-mlp"]]
    """Data and decoder; fixed by the preset."""
    guide: tyro.conf.Suppress[Literal["implicit", "gaussian"]]
    """The guide, with or without a density; fixed by the preset."""

    steps: int
    """Training steps at most."""
    budget_seconds: float | None = None
    """Stop after this much wall-clock time of training, validation included."""
    seed: int = 0
    """Seed of everything."""
    device: str = "cpu"
    """Torch device."""
    threads: int | None = None
    """CPU threads of torch; its own choice by default."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products while training; evaluation is in fp32. By default bf16 where
    the CPU computes in it, fp32 elsewhere."""
    data_dir: Path | None = None
    """Folder of binarized_mnist.npz; PYRO_ARDAE_DATA or ./data by default."""
    out: Path | None = None
    """Run folder; runs/PRESET-seedN by default."""
    resume: Path | None = None
    """Run folder to go on with, given with the options of that run."""

    batch_size: int = 128
    """Data points of a minibatch."""
    learning_rate: float = 5e-4
    """Step size of Adam."""
    decoder_learning_rate: float | None = None
    """Step size for the decoder; that of the rest by default."""
    num_particles: int = 1
    """Draws of the guide per data point and step."""
    decoder_activation: Literal["silu", "elu", "relu", "softplus", "tanh"] | None = None
    """Activation of the decoder; that of the rest by default."""
    decoder_input_scale: float = 1.0
    """25 Gaussians: factor on the latent before the decoder's first layer."""
    activation: Literal["silu", "elu", "relu", "softplus"] = "silu"
    """Activation of all networks."""
    average_decay: float = 0.9998
    """Decay of the Polyak average of the weights, which is what is evaluated; 0 turns it off."""
    beta_start: float = 1.0
    """Weight of the KL terms at the first step, in (0, 1]."""
    beta_steps: int = 0
    """Steps over which that weight rises to 1, geometrically."""
    decay_start: int = 0
    """Step at which the step size begins to fall."""
    decay_steps: int = 0
    """Steps over which it falls linearly to a hundredth; 0 keeps it constant."""
    adam_eps: float = 1e-8
    """Adam's epsilon. Gradients, of the sum over the minibatch, that are smaller count for less."""
    clip_norm: float | None = None
    """Largest norm of the gradient; not clipped by default."""

    noise_dim: int = 100
    """Implicit guide: width of the noise."""
    gaussian_base: bool = True
    """Implicit guide: whether the sampler deviates from a Gaussian, or is a network throughout."""
    deviation_decay: float = 0.0
    """Implicit guide: weight decay of the deviation's network, per unit of step size. The scale of
    the deviation and that of the Gaussian make up for each other, and without a decay the one
    drifts upwards with the lag of the score."""
    gain: float = 0.1
    """Implicit guide: factor on the deviation from the Gaussian, by whose square it learns slower
    than the rest."""
    score_hidden_dim: int = 48
    """Implicit guide: width of the score network."""
    score_learning_rate: float = 4e-3
    """Implicit guide: step size of the score network."""
    score_folds: int = 4
    """Implicit guide: parts into which an update of the score network cuts the samples."""
    score_whitening: Literal["pooled", "centered", "diagonal", "none"] = "pooled"
    """Implicit guide: coordinates of the score network. With ``gaussian_base`` its input has a
    Gaussian's location and scale taken out already: "centered" needs fewer samples then."""
    score_steps: int | None = None
    """Implicit guide: optimizer steps of an update, each on one part; on all by default."""
    num_score_samples: int = 16
    """Implicit guide: samples per data point in an update of the score network."""
    num_score_updates: int = 1
    """Implicit guide: updates of the score network per step."""

    valid_every: int = 2000
    """Steps between validations."""
    valid_points: int = 1000
    """Data points of a validation."""
    valid_samples: int = 100
    """Importance samples per data point of a validation."""
    test_points: int | None = None
    """Data points of the final evaluation, a seeded random subset; all by default."""
    test_samples: int = 500
    """Importance samples per data point of the final evaluation."""
    guide_samples: int = 512
    """Guide samples per data point that the Gaussian proposal is fitted to."""
    prior_weight: float = 0.0
    """Weight of the prior in the proposal; needed where posteriors have several modes."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of the matrix products while training; the parameters' own for ``None``."""
        native = torch.cpu.get_capabilities()
        fast = bool(native.get("avx512_bf16") or native.get("amx_bf16"))
        auto = self.precision == "auto" and self.device == "cpu" and fast
        return torch.bfloat16 if auto or self.precision == "bf16" else None

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return f"{self.task}-{self.guide}"


#: Options that a resumed run may change: none of them changes a step.
MAY_DIFFER = (
    *("steps", "budget_seconds", "device", "threads", "data_dir", "out", "resume"),
    *("valid_every", "valid_points", "valid_samples", "checkpoint_every"),
    *("test_points", "test_samples", "guide_samples", "prior_weight"),
)

_TOY = Config(
    task="25gaussians",
    guide="gaussian",
    steps=4500,
    batch_size=64,
    num_particles=8,
    learning_rate=2e-3,
    decoder_learning_rate=4e-3,
    decoder_activation="tanh",
    decoder_input_scale=4.0,
    activation="silu",
    average_decay=0.995,
    beta_start=0.4,
    beta_steps=1000,
    decay_start=2000,
    decay_steps=2500,
    noise_dim=10,
    gaussian_base=False,
    score_learning_rate=8e-3,
    score_folds=8,
    num_score_samples=32,
    valid_every=1000,
    valid_points=1000,
    valid_samples=200,
    test_points=2000,
    test_samples=1000,
    prior_weight=0.5,
)
_MNIST = Config(
    task="sbmnist-mlp",
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

#: Description and options by name; the figures are those of one core of a server CPU.
PRESETS: dict[str, tuple[str, Config]] = {
    "25gaussians-implicit": (
        "25 Gaussians, implicit guide. Test log p(x) -3.87 after 2 minutes of one core.",
        dataclasses.replace(_TOY, guide="implicit"),
    ),
    "25gaussians-gaussian": (
        "25 Gaussians, Gaussian guide: the same schedule over 2.4 times as many steps, in no "
        "more time. Test log p(x) -3.91.",
        dataclasses.replace(
            _TOY, steps=10_800, beta_steps=2400, decay_start=4800, decay_steps=6000
        ),
    ),
    "sbmnist-mlp-implicit": (
        "Binarized MNIST, MLP, implicit guide. Validation log p(x) -96.0 after 2,000 steps, -90.7 "
        "after 10,000, which take 5 minutes of one core.",
        dataclasses.replace(
            _MNIST,
            guide="implicit",
            steps=10_000,
            deviation_decay=0.2,
            score_whitening="centered",
            num_score_samples=4,
            score_folds=1,
            score_steps=1,
        ),
    ),
    "sbmnist-mlp-gaussian": (
        "Binarized MNIST, MLP, Gaussian guide. Test ELBO -92.9, log p(x) -89.1 (all images, 500 "
        "samples of its own posterior) after 5 minutes of one core, then 3 of evaluation.",
        _MNIST,
    ),
}


def build_vae(config: Config, mean: Tensor | None = None, *, name: str = "vae") -> VAE:
    """Builds model and guide.

    :param mean: mean of the training data, ``[X]``, at which trunk and decoder start.
    :param name: as in :class:`models.vae.VAE`.
    """
    if not 0 < config.beta_start <= 1:
        raise UserError(f"--beta-start: expected a weight in (0, 1], found {config.beta_start}")
    activation = ACTIVATIONS[config.activation]
    compute_dtype = config.compute_dtype
    if config.task == "25gaussians":
        data_dim, latent_dim, hidden = 2, 2, 128
        decoder: torch.nn.Module = NormalDecoder(
            latent_dim,
            hidden_dims=(hidden, hidden),
            activation=ACTIVATIONS[config.decoder_activation or config.activation],
            input_scale=config.decoder_input_scale,
        )
    else:
        data_dim, latent_dim, hidden = NUM_PIXELS, LATENT_DIM, 300
        decoder = BernoulliDecoder(
            latent_dim,
            activation=ACTIVATIONS[config.decoder_activation or config.activation],
            mean=mean,
            compute_dtype=compute_dtype,
        )
    trunk = MLP(
        (data_dim, hidden, hidden),
        activation=activation,
        activate_output=True,
        mean=mean,
        compute_dtype=compute_dtype,
    )
    head: torch.nn.Module
    if config.guide == "gaussian":
        head = GaussianGuide(hidden, latent_dim)
    else:
        head = ImplicitGuide(
            hidden,
            latent_dim,
            noise_dim=config.noise_dim,
            hidden_dims=(128, 128) if config.gaussian_base else (hidden, hidden),
            activation=ACTIVATIONS["silu"] if config.gaussian_base else activation,
            gaussian_base=config.gaussian_base,
            gain=config.gain,
            compute_dtype=compute_dtype,
        )
    vae = VAE(trunk, head, decoder, latent_dim=latent_dim, name=name)
    return vae.to(config.device)


def build_score_estimator(config: Config) -> Callable[[int, int], ARDAE]:
    """What builds the score estimator of an implicit guide: ``(dim, context_dim)`` to it."""
    return partial(
        ARDAE,
        hidden_dim=config.score_hidden_dim,
        learning_rate=config.score_learning_rate,
        num_folds=config.score_folds,
        num_steps=config.score_steps,
        whitening=config.score_whitening,
    )


def build_loss(config: Config) -> ELBO:
    """Builds the loss for :class:`pyro.infer.SVI`."""
    particles = {
        "num_particles": config.num_particles,
        "vectorize_particles": config.num_particles > 1,
        "max_plate_nesting": 1,
    }
    if config.guide == "gaussian":
        return Trace_ELBO(**particles)
    return TraceImplicit_ELBO(
        build_score_estimator(config),
        **particles,
        num_score_samples=config.num_score_samples,
        num_score_updates=config.num_score_updates,
    )


def build_data(config: Config) -> Dataset:
    """Loads the data."""
    if config.task == "25gaussians":
        return ToyData(config.batch_size, config.seed)
    return BinarizedMNIST(load_binarized_mnist(config.data_dir), config.batch_size, config.seed)
