# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Convolutional encoder trunks and decoder networks for images of 28 by 28 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks import ELU, Network

__all__ = ["ConvNetwork", "ConvTrunk", "ResConvNetwork", "ResConvTrunk"]

#: Channels and side of the smallest feature map, of all four networks.
_CHANNELS, _SIDE = 32, 4
_WIDTH = _CHANNELS * _SIDE * _SIDE


class _Centred(nn.Module):
    """Pixels ``[*batch, 784]`` in ``[0, 1]`` to images ``[n, 1, 28, 28]`` in ``[-1, 1]``."""

    def forward(self, value: Tensor) -> Tensor:
        return (2 * value - 1).reshape(-1, 1, 28, 28)


class _ChannelsLast(nn.Module):
    """Feature maps with channels last in memory.

    On a CPU the ResConv decoder gains 43 ms by it, of 258 with the trunk (fp32, 128 images, forward
    and backward), because of the enlargements; the other networks gain nothing. Weights stay as
    they are: Pyro's parameter store copies one that is not contiguous, and the copy is what would
    be trained.
    """

    def forward(self, value: Tensor) -> Tensor:
        return value.contiguous(memory_format=torch.channels_last)


class _Batched(Network):
    """A network of rows ``[n, D]`` for any number of leading dimensions."""

    def forward(self, value: Tensor) -> Tensor:
        output = super().forward(value.reshape(-1, value.shape[-1]))
        return output.reshape(*value.shape[:-1], -1)


class _ImageNetwork(_Batched):
    """Latents to 784 numbers, with a bias of each pixel's own.

    The layers end in one channel, whose bias is common to all pixels. A bias by pixel lets the
    output start as the mean of the data.
    """

    def __init__(self, layers: nn.Module, *, compute_dtype: torch.dtype | None) -> None:
        super().__init__(layers, compute_dtype=compute_dtype)
        self.output_bias = nn.Parameter(torch.zeros(784))

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + self.output_bias


class ConvTrunk(_Batched):
    """Three convolutions of 5 by 5, stride 2, with 16, 32 and 32 channels, then a linear layer.

    :param int feature_dim: width of the features.
    :param type[nn.Module] activation: activation after each layer.
    :param torch.dtype compute_dtype: see :class:`models.networks.Network`.
    """

    def __init__(
        self,
        feature_dim: int = 800,
        *,
        activation: type[nn.Module] = nn.SiLU,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        layers: list[nn.Module] = [_Centred()]
        for before, after in ((1, 16), (16, 32), (32, _CHANNELS)):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), activation()]
        layers += [nn.Flatten(), nn.Linear(_WIDTH, feature_dim), activation()]
        super().__init__(nn.Sequential(*layers), compute_dtype=compute_dtype)


class ConvNetwork(_ImageNetwork):
    """The mirror of :class:`ConvTrunk`: two linear layers, three transposed convolutions.

    Feature maps grow from 4 by 4 to 7, 14 and 28.

    :param int latent_dim: width of the latent.
    :param int hidden_dim: width of the first layer.
    :param type[nn.Module] activation: activation after each layer but the last.
    :param torch.dtype compute_dtype: see :class:`models.networks.Network`.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        hidden_dim: int = 300,
        activation: type[nn.Module] = nn.SiLU,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        layers: list[nn.Module] = [
            *(nn.Linear(latent_dim, hidden_dim), activation()),
            *(nn.Linear(hidden_dim, _WIDTH), activation()),
            nn.Unflatten(1, (_CHANNELS, _SIDE, _SIDE)),
        ]
        for before, after, extra in ((_CHANNELS, 32, 0), (32, 16, 1), (16, 1, 1)):
            layers += [
                nn.ConvTranspose2d(before, after, 5, stride=2, padding=2, output_padding=extra),
                activation(),
            ]
        super().__init__(
            nn.Sequential(*layers[:-1], nn.Flatten()),
            compute_dtype=compute_dtype,
        )


class _Residual(nn.Module):
    """``W2 f(W1 h) + W3 h``, the block of the residual networks, of any kind of layer."""

    def __init__(self, first: nn.Module, second: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.skip = first, second, skip
        self.activation = ELU()

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.activation(self.first(value))) + self.skip(value)


def _linear(before: int, after: int) -> nn.Module:
    skip: nn.Module = nn.Identity() if before == after else nn.Linear(before, after)
    return _Residual(nn.Linear(before, after), nn.Linear(after, after), skip)


def _convolution(before: int, after: int, *, stride: int = 1) -> nn.Module:
    same = before == after and stride == 1
    skip = nn.Identity() if same else nn.Conv2d(before, after, 3, stride=stride, padding=1)
    return _Residual(
        nn.Conv2d(before, after, 3, stride=stride, padding=1),
        nn.Conv2d(after, after, 3, padding=1),
        skip,
    )


class ResConvTrunk(_Batched):
    """Five residual blocks of 3 by 3 convolutions (16, 16, 32, 32 and 32 channels), a linear one.

    Three of them have stride 2. Activations are ELU.

    :param int feature_dim: width of the features.
    :param torch.dtype compute_dtype: see :class:`models.networks.Network`.
    """

    def __init__(self, feature_dim: int = 450, *, compute_dtype: torch.dtype | None = None) -> None:
        layers: list[nn.Module] = [_Centred()]
        for before, after, stride in (
            *((1, 16, 2), (16, 16, 1), (16, 32, 2)),
            *((32, 32, 1), (32, _CHANNELS, 2)),
        ):
            layers += [_convolution(before, after, stride=stride), ELU()]
        layers += [nn.Flatten(), _linear(_WIDTH, feature_dim), ELU()]
        super().__init__(nn.Sequential(*layers), compute_dtype=compute_dtype)


class _Enlarge(nn.Upsample):
    """Bilinear, by a factor of two."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="bilinear", align_corners=True)


class ResConvNetwork(_ImageNetwork):
    """Two residual linear blocks, then five of convolutions with bilinear upsampling between them.

    Feature maps are 4 by 4, then 8 (cropped to 7), 14 and 28. Activations are ELU.

    :param int latent_dim: width of the latent.
    :param int hidden_dim: width of the first block.
    :param torch.dtype compute_dtype: see :class:`models.networks.Network`.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        hidden_dim: int = 450,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Sequential(
                *(_linear(latent_dim, hidden_dim), ELU(), _linear(hidden_dim, _WIDTH), ELU()),
                *(nn.Unflatten(1, (_CHANNELS, _SIDE, _SIDE)), _ChannelsLast(), _Enlarge()),
                *(_convolution(_CHANNELS, 32), ELU(), _convolution(32, 32), ELU()),
                *(nn.ZeroPad2d((0, -1, 0, -1)), _Enlarge()),
                *(_convolution(32, 16), ELU(), _convolution(16, 16), ELU(), _Enlarge()),
                *(_convolution(16, 1), nn.Flatten()),
            ),
            compute_dtype=compute_dtype,
        )
