# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.convolutions import ConvNetwork, ConvTrunk, ResConvNetwork, ResConvTrunk
from models.mnist import BernoulliDecoder

TRUNKS = {"conv": (ConvTrunk, 800), "resconv": (ResConvTrunk, 450)}
NETWORKS = {"conv": ConvNetwork, "resconv": ResConvNetwork}


@pytest.mark.parametrize("kind", TRUNKS)
def test_trunks(kind: str) -> None:
    build, width = TRUNKS[kind]
    trunk = build()
    x = torch.bernoulli(torch.full((2, 3, 784), 0.2))
    features = trunk(x)
    assert features.shape == (2, 3, width)
    # Rows do not depend on each other.
    torch.testing.assert_close(trunk(x[1, 2:]), features[1, 2:], atol=1e-5, rtol=1e-4)
    kernels = [m.kernel_size for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert set(kernels) == {(5, 5) if kind == "conv" else (3, 3)}


@pytest.mark.parametrize("kind", NETWORKS)
def test_decoders_start_at_the_mean(kind: str) -> None:
    mean = torch.rand(784)
    net = NETWORKS[kind](4)
    decoder = BernoulliDecoder(net, mean=mean)
    assert decoder(torch.randn(2, 3, 4)).batch_shape == (2, 3)
    with torch.no_grad():
        for parameter in net.layers.parameters():
            parameter.zero_()
        start = decoder(torch.randn(3, 4)).mean
    torch.testing.assert_close(start, mean.clamp(0.002, 0.998).expand(3, -1))


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_pixel_sees_the_latent(kind: str) -> None:
    """No pixel is padding: cropping and output padding add up to 28 by 28."""
    net = NETWORKS[kind](4)
    logits = net(torch.randn(2, 4))
    assert bool((logits[0] != logits[1]).all())


def test_widths_of_the_feature_maps() -> None:
    sides = []
    net = ConvNetwork(4)
    for layer in net.layers:
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
    net(torch.randn(1, 4))
    assert sides == [7, 14, 28]


@pytest.mark.parametrize("kind", TRUNKS)
def test_lower_precision_returns_the_parameters_dtype(kind: str) -> None:
    trunk = TRUNKS[kind][0](compute_dtype=torch.bfloat16)
    x = torch.bernoulli(torch.full((4, 784), 0.2))
    low = trunk(x)
    trunk.compute_dtype = None
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, trunk(x), atol=0.02, rtol=0.05)
