# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Model, guide, loss and data of a VAE run, built from its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from inference.autoencoders.avb import AdversarialScore
from inference.autoencoders.binarized_mnist import load_binarized_mnist
from inference.autoencoders.data import BinarizedMNIST, Dataset, ToyData
from inference.autoencoders.dynamic_mnist import DynamicMNIST, load_images
from inference.autoencoders.missing import MissingPixels
from inference.autoencoders.options import SCORED, Config
from inference.shared.errors import UserError, needs
from models.auxiliary_vae import AuxiliaryVAE
from models.convolutions import ConvNetwork, ConvTrunk, ResConvNetwork, ResConvTrunk
from models.flows import FlowGuide
from models.guides import DeviatingGuide, FullCovarianceGuide, GaussianGuide, ImplicitGuide
from models.hierarchical_guide import HierarchicalGuide, ReverseGuide
from models.mnist import NUM_PIXELS, BernoulliDecoder, SeenPixels
from models.networks import ACTIVATIONS, MLP, ConditionalMLP
from models.semi_implicit import SemiImplicitGuide
from models.toy import NormalDecoder
from models.two_level_vae import TwoLevelDecoder, TwoLevelVAE
from models.vae import VAE
from pyro_ardae import ARDAE, TraceImplicit_ELBO
from pyro_ardae.score import ScoreEstimator

__all__ = ["build_data", "build_loss", "build_score_estimator", "build_vae"]

#: Widths of the hidden layers of what deviates from a diagonal Gaussian, and from a full one.
_DEVIATION, _DEVIATION_FROM_FULL = (128, 128), (64, 64)


@dataclass(frozen=True)
class _Parts:
    """What depends on data and architecture."""

    trunk: nn.Module
    decoder: nn.Module
    data_dim: int
    latent_dim: int
    feature_dim: int


def build_vae(config: Config, mean: Tensor | None = None, *, name: str = "vae") -> VAE:
    """Builds model and guide.

    :param mean: mean of the training data, ``[X]``, at which decoder and MLP trunk start.
    :param name: as in :class:`models.vae.VAE`.
    """
    if not 0 < config.beta_start <= 1:
        raise UserError(f"--beta-start: expected a weight in (0, 1], found {config.beta_start}")
    mean = None if mean is None else mean.cpu()
    parts = _build_toy(config, mean) if config.data == "25gaussians" else _build_mnist(config, mean)
    head = _build_head(config, parts.feature_dim, parts.latent_dim)
    vae: VAE
    if config.guide == "auxiliary":
        reverse = ReverseGuide(
            parts.data_dim,
            parts.latent_dim,
            auxiliary_dim=config.auxiliary_dim,
            hidden_dims=(300, 300),
            activation=ACTIVATIONS[config.activation],
            compute_dtype=config.compute_dtype,
        )
        vae = AuxiliaryVAE(
            parts.trunk,
            head,
            parts.decoder,
            reverse=reverse,
            latent_dim=parts.latent_dim,
            name=name,
        )
    elif config.architecture == "mlp2":
        vae = _build_two_levels(config, parts, head, name)
    else:
        vae = VAE(parts.trunk, head, parts.decoder, latent_dim=parts.latent_dim, name=name)
    return vae.to(config.device)


def _build_toy(config: Config, mean: Tensor | None) -> _Parts:
    hidden, latent_dim = 128, config.latent_dim
    decoder = NormalDecoder(
        latent_dim,
        hidden_dims=(hidden, hidden),
        activation=ACTIVATIONS[config.decoder_activation or config.activation],
        input_scale=config.decoder_input_scale,
    )
    return _Parts(_mlp_trunk(config, (2, hidden, hidden), mean), decoder, 2, latent_dim, hidden)


def _build_mnist(config: Config, mean: Tensor | None) -> _Parts:
    compute_dtype, latent_dim = config.compute_dtype, config.latent_dim
    activation = ACTIVATIONS[config.activation]
    decoder_activation = ACTIVATIONS[config.decoder_activation or config.activation]
    trunk: nn.Module
    net: nn.Module
    if config.architecture == "conv":
        feature_dim = 800
        net = ConvNetwork(latent_dim, activation=decoder_activation, compute_dtype=compute_dtype)
        trunk = ConvTrunk(feature_dim, activation=activation, compute_dtype=compute_dtype)
    elif config.architecture == "resconv":
        feature_dim = 450
        net = ResConvNetwork(latent_dim, compute_dtype=compute_dtype)
        trunk = ResConvTrunk(feature_dim, compute_dtype=compute_dtype)
    else:
        feature_dim = 300
        net = MLP(
            (latent_dim, feature_dim, feature_dim, NUM_PIXELS),
            activation=decoder_activation,
            compute_dtype=compute_dtype,
        )
        trunk = _pixel_trunk(config, feature_dim, mean)
    decoder = BernoulliDecoder(net, mean=mean, missing=config.seen_share is not None)
    return _Parts(trunk, decoder, NUM_PIXELS, latent_dim, feature_dim)


def _pixel_trunk(config: Config, feature_dim: int, mean: Tensor | None) -> nn.Module:
    share = config.seen_share
    if share is None:
        return _mlp_trunk(config, (NUM_PIXELS, feature_dim, feature_dim), mean)
    if mean is not None:
        mean = torch.cat([share * mean, torch.full_like(mean, share)])
    mlp = _mlp_trunk(config, (2 * NUM_PIXELS, feature_dim, feature_dim), mean)
    return nn.Sequential(SeenPixels(), mlp)


def _mlp_trunk(config: Config, sizes: tuple[int, ...], mean: Tensor | None) -> MLP:
    return MLP(
        sizes,
        activation=ACTIVATIONS[config.activation],
        activate_output=True,
        mean=mean,
        compute_dtype=config.compute_dtype,
    )


def _build_two_levels(config: Config, parts: _Parts, head: nn.Module, name: str) -> TwoLevelVAE:
    activation, compute_dtype = ACTIVATIONS[config.activation], config.compute_dtype
    width = parts.feature_dim
    decoder = TwoLevelDecoder(
        parts.decoder,
        MLP(
            (parts.latent_dim, width, width),
            activation=activation,
            activate_output=True,
            compute_dtype=compute_dtype,
        ),
        feature_dim=width,
        latent_dim=parts.latent_dim,
    )
    second_trunk = ConditionalMLP(
        parts.latent_dim,
        width,
        sizes=(width, width),
        activation=activation,
        activate_output=True,
        compute_dtype=compute_dtype,
    )
    return TwoLevelVAE(
        parts.trunk,
        head,
        decoder,
        second_trunk=second_trunk,
        second_head=_build_head(config, width, parts.latent_dim),
        latent_dim=parts.latent_dim,
        name=name,
    )


def _build_base(config: Config, feature_dim: int, latent_dim: int) -> GaussianGuide | None:
    """The Normal that an implicit guide deviates from."""
    if config.base == "full":
        return FullCovarianceGuide(feature_dim, latent_dim, compute_dtype=config.compute_dtype)
    return GaussianGuide(feature_dim, latent_dim) if config.base == "diagonal" else None


def _build_head(config: Config, feature_dim: int, latent_dim: int) -> nn.Module:
    if config.guide == "gaussian":
        return GaussianGuide(feature_dim, latent_dim)
    if config.guide == "fullcov":
        return FullCovarianceGuide(
            feature_dim, latent_dim, gain=config.gain, compute_dtype=config.compute_dtype
        )
    if config.guide == "flow":
        with needs(config.preset, "zuko", "flows"):
            return FlowGuide(
                feature_dim,
                latent_dim,
                transforms=config.flow_transforms,
                hidden_dims=_DEVIATION,
            )
    # The others of the hierarchical kind need the density of a diagonal conditional.
    base = _build_base(config, feature_dim, latent_dim) if config.guide in SCORED else None
    hidden_dims = _DEVIATION_FROM_FULL if isinstance(base, FullCovarianceGuide) else _DEVIATION
    if config.guide in ("implicit", "avb"):
        if base is None:
            return ImplicitGuide(
                feature_dim,
                latent_dim,
                noise_dim=config.noise_dim,
                hidden_dims=(feature_dim, feature_dim),
                activation=ACTIVATIONS[config.activation],
                compute_dtype=config.compute_dtype,
            )
        return DeviatingGuide(
            base,
            feature_dim,
            latent_dim,
            noise_dim=config.noise_dim,
            hidden_dims=hidden_dims,
            gain=config.gain,
        )
    guide = HierarchicalGuide(
        feature_dim,
        latent_dim,
        base=base,
        auxiliary_dim=config.auxiliary_dim,
        hidden_dims=hidden_dims,
        gain=config.gain,
        compute_dtype=config.compute_dtype,
    )
    if config.guide == "sivi":
        return SemiImplicitGuide(guide, num_mixing=config.num_mixing)
    return guide


def build_score_estimator(config: Config) -> Callable[[int, int], ScoreEstimator]:
    """What builds the score estimator of an implicit guide: ``(dim, context_dim)`` to it."""
    return partial(
        AdversarialScore if config.guide == "avb" else ARDAE,
        hidden_dim=config.score_hidden_dim,
        depth=config.score_depth,
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
    if config.guide not in SCORED:
        return Trace_ELBO(**particles)
    return TraceImplicit_ELBO(
        build_score_estimator(config),
        **particles,
        num_score_samples=config.num_score_samples,
        num_score_contexts=config.num_score_contexts,
        num_score_updates=config.num_score_updates,
        score_interval=config.score_interval,
    )


def build_data(config: Config) -> Dataset:
    """Loads the data."""
    if config.data == "25gaussians":
        return ToyData(config.batch_size, config.seed)
    options = {"with_valid": config.train_on_valid, "device": torch.device(config.device)}
    data: Dataset
    if config.data == "dbmnist":
        images = load_images(config.data_dir, config.images, download=config.download)
        data = DynamicMNIST(images, config.batch_size, config.seed, **options)
    else:
        rows = load_binarized_mnist(config.data_dir)
        data = BinarizedMNIST(rows, config.batch_size, config.seed, **options)
    if config.seen_share is not None:
        data = MissingPixels(data, config.seen_share, config.seed)
    return data
