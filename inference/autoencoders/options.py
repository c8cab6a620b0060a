# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Options of the VAE programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from inference.shared.precision import training_dtype

__all__ = ["BOUNDED", "ESTIMATE", "EXPLICIT", "MAY_DIFFER", "SCORED", "Config", "Guide"]

Guide = Literal[
    "gaussian",
    "fullcov",
    "auxiliary",
    "flow",
    "implicit",
    "hierarchical-implicit",
    "sivi",
    "avb",
]

#: Guides without a density: their score is estimated.
SCORED = ("implicit", "hierarchical-implicit", "avb")

#: Guides whose density is known by a bound, which makes their ELBO too low.
BOUNDED = ("auxiliary", "sivi")

#: Guides with an ELBO that can be evaluated, by :meth:`models.vae.VAE.explicit`.
EXPLICIT = ("gaussian", "fullcov", "auxiliary", "flow", "sivi")


@dataclass(frozen=True)
class Config:
    """Options of a VAE run; each preset sets its own defaults."""

    data: tyro.conf.Suppress[Literal["25gaussians", "sbmnist", "dbmnist"]]
    """Data; fixed by the preset."""
    architecture: tyro.conf.Suppress[Literal["mlp", "conv", "resconv", "mlp2"]]
    """Encoder trunk and decoder; fixed by the preset."""
    guide: tyro.conf.Suppress[Guide]
    """The guide; fixed by the preset."""

    steps: int
    """Training steps at most."""
    latent_dim: tyro.conf.Suppress[int] = 32
    """Width of the latent, of each level; fixed by the preset."""
    schedule: Literal["fast", "paper"] = "fast"
    """MNIST: defaults of the options below. "fast" is what was tuned here; "paper" is the paper's
    own optimizer, batches, number of epochs, annealing, averaging and activations."""
    budget_seconds: float | None = None
    """Stop after this much wall-clock time of training, validation included."""
    seed: int = 0
    """Seed of everything."""
    device: str = "cpu"
    """Torch device. The data are kept there."""
    threads: int | None = None
    """CPU threads of torch; its own choice by default."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Precision of the matrix products while training; evaluation is in fp32. By default bf16 where
    the CPU computes in it, tf32 on a CUDA device, fp32 elsewhere. tf32 needs a CUDA device."""
    data_dir: Path | None = None
    """Folder of binarized_mnist.npz, or of MNIST/raw; PYRO_ARDAE_DATA or ./data by default."""
    images: Literal["mnist", "fashion-mnist"] = "mnist"
    """Dynamically binarized: which images."""
    download: bool = False
    """Dynamically binarized: whether to download images that are not there."""
    seen_share: float | None = None
    """MLP, not auxiliary: share of the pixels that are seen, in (0, 1); all by default. The others
    are missing at random, afresh in each minibatch; log p(x) is that of the pixels that are
    seen."""
    decoder: Path | None = None
    """MNIST: run folder whose decoder is taken and held fixed, so that the guide alone learns."""
    train_on_valid: bool = False
    """MNIST: train on training and validation images for a fixed number of steps, and evaluate the
    last weights: nothing is selected on validation images then."""
    out: Path | None = None
    """Run folder; runs/PRESET-seedN by default."""
    resume: Path | None = None
    """Run folder to go on with, given with the options of that run."""

    batch_size: int = 128
    """Data points of a minibatch."""
    fantasy_share: float = 0.0
    """Share of a minibatch that gives way to draws of the model, in [0, 1), by which the guide
    learns and the model does not: a guide that sees the same images again and again learns them by
    heart."""
    fantasy_start: int = 16_000
    """Step from which there are such draws. A short run sees each image too few times to need
    them."""
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
    """Activation of trunk and decoder; ELU for ResConv."""
    average_decay: float = 0.9998
    """Decay of the Polyak average of the weights, which is what is evaluated; 0 turns it off."""
    beta_start: float = 1.0
    """Weight of the KL terms at the first step, in (0, 1]."""
    beta_steps: int = 0
    """Steps over which that weight rises to 1, ..."""
    beta_shape: Literal["geometric", "linear"] = "geometric"
    """... and how."""
    decay_start: int = 0
    """Step at which the step size begins to fall."""
    decay_steps: int = 0
    """Steps over which it falls linearly to a hundredth; 0 keeps it constant."""
    adam_beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    adam_eps: float = 1e-8
    """Adam's epsilon. Gradients, of the sum over the minibatch, that are smaller count for less."""
    clip: float | None = None
    """Bound on the norm of the gradient, in units of its running mean, >= 1; none by default."""

    noise_dim: int = 100
    """Implicit guide and AVB: width of the noise."""
    base: Literal["none", "diagonal", "full"] = "full"
    """Implicit guides and AVB: covariance of the Gaussian that the sampler deviates from; with
    "none" (not hierarchical) it is a network throughout."""
    auxiliary_dim: int = 32
    """Hierarchical guides (auxiliary, hierarchical-implicit, SIVI): width of the auxiliary
    latent."""
    num_mixing: int = 32
    """SIVI: further components, besides the one a draw comes from, by which the bound is taken."""
    flow_transforms: int = 2
    """Flow: number of autoregressive transforms."""
    deviation_decay: float = 0.0
    """Guides that deviate from a Gaussian: weight decay of the deviation's network, per unit of
    step size. The scale of the deviation and that of the Gaussian make up for each other, and
    without a decay the one drifts upwards with the lag of the score."""
    gain: float = 0.1
    """Guides that deviate from a Gaussian: factor on the deviation, by whose square it learns
    slower than the rest. Implicit guide and AVB: also a bound on how fast it changes with the
    noise, in (0, 1)."""
    score_hidden_dim: int = 48
    """Guides without a density: width of the network of the score, or of AVB's discriminator."""
    score_depth: int = 4
    """Guides without a density: its hidden layers."""
    score_learning_rate: float = 4e-3
    """Guides without a density: its step size."""
    score_folds: int = 4
    """Guides without a density: parts into which an update of it cuts the samples."""
    score_whitening: Literal["pooled", "centered", "diagonal", "none"] = "pooled"
    """Guides without a density: its coordinates. With a ``base`` its input has that
    Gaussian's location and scale taken out already: "centered" needs fewer samples then."""
    score_steps: int | None = None
    """Guides without a density: optimizer steps of an update, each on one part; on all by
    default."""
    num_score_samples: int = 16
    """Guides without a density: samples per data point in an update."""
    num_score_contexts: int | None = None
    """Guides without a density: data points of the minibatch, at random, in an update; all by
    default."""
    num_score_updates: int = 1
    """Guides without a density: updates per step."""
    score_interval: int = 1
    """Guides without a density: steps to one in which the score is learned."""

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
    def least_guide_samples(self) -> int:
        """The fewest draws that a Gaussian can be fitted to, two for each latent."""
        return 2 * self.latent_dim * (2 if self.architecture == "mlp2" else 1)

    @property
    def fantasies(self) -> int:
        """Draws of the model in a minibatch; none where pixels are missing."""
        return int(self.fantasy_share * self.batch_size) if self.seen_share is None else 0

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of the matrix products while training; the parameters' own for ``None``."""
        return training_dtype(self.precision, self.device)

    @property
    def tf32(self) -> bool:
        """Whether matrix products in training round their inputs to TF32."""
        cuda = self.device.startswith("cuda")
        return cuda and self.precision in ("auto", "tf32")

    @property
    def explicit(self) -> bool:
        """Whether the guide's ELBO can be evaluated."""
        return self.guide in EXPLICIT

    @property
    def task(self) -> str:
        """Data and architecture: the preset's name without the guide."""
        if self.data == "25gaussians":
            return self.data
        narrow = f"-{self.latent_dim}d" if self.latent_dim != 32 else ""
        return f"{self.data}-{self.architecture}{narrow}"

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return f"{self.task}-{self.guide}"


#: Options of the estimate of log p(x) on the validation data.
ESTIMATE = ("valid_points", "valid_samples", "guide_samples", "prior_weight")

#: Options that a resumed run may change: none of them changes a step.
MAY_DIFFER = (
    *("steps", "budget_seconds", "device", "threads", "data_dir", "download", "out", "resume"),
    *("valid_every", "checkpoint_every", *ESTIMATE, "test_points", "test_samples"),
)
