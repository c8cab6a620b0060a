# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from models import toy
from models.mnist import BernoulliDecoder, LogitBernoulli, SeenBernoulli, SeenPixels
from models.networks import ELU, MLP


def test_toy_density_integrates_to_one_and_has_the_stated_entropy() -> None:
    axis = torch.linspace(-7, 7, 1401)
    log_prob = toy.log_prob(torch.cartesian_prod(axis, axis))
    cell = (axis[1] - axis[0]).item() ** 2
    assert (log_prob.exp().sum() * cell).item() == pytest.approx(1, abs=1e-4)
    expected = (log_prob.exp() * log_prob).sum().item() * cell
    assert expected == pytest.approx(toy.EXPECTED_LOG_PROB, abs=5e-4)


def test_toy_samples_follow_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob = toy.log_prob(toy.sample(20_000, generator=generator))
    # Standard deviation of log p is 1: 4.4 standard errors, failure rate 1e-5.
    assert log_prob.mean().item() == pytest.approx(toy.EXPECTED_LOG_PROB, abs=4.4 / math.sqrt(2e4))
    assert toy.modes().shape == (25, 2)


def test_logit_bernoulli_equals_torch() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, 7, dtype=torch.double) * 20).requires_grad_()
    value = torch.bernoulli(torch.full((3, 5, 7), 0.5, dtype=torch.double))
    ours = LogitBernoulli(logits=logits).log_prob(value)
    theirs = dist.Bernoulli(logits=logits).log_prob(value)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, weight), torch.autograd.grad(theirs, logits, weight)
    )


def test_logit_bernoulli_draws_as_often_as_it_should() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-6.0, -2.0, 0.0, 1.0, 6.0])
    distribution = LogitBernoulli(logits=logits.expand(2, 5)).to_event(1)
    draws = distribution.sample(torch.Size((50_000,)))
    assert draws.shape == (50_000, 2, 5)
    assert draws.dtype == torch.float32
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    probs = logits.sigmoid()
    error = (probs * (1 - probs) / 1e5).sqrt()
    # Five standard errors on each of five: failure rate 3e-6.
    assert ((draws.mean((0, 1)) - probs).abs() < 5 * error).all()


def test_missing_pixels_count_for_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 784, dtype=torch.double, requires_grad=True)
    value = torch.bernoulli(torch.full((3, 2, 784), 0.5, dtype=torch.double))
    seen = torch.rand(3, 2, 784) < 0.3
    partial = value.masked_fill(~seen, torch.nan)
    ours = SeenBernoulli(logits=logits, validate_args=False).to_event(1).log_prob(partial)
    theirs = (dist.Bernoulli(logits=logits).log_prob(value) * seen).sum(-1)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, weight), torch.autograd.grad(theirs, logits, weight)
    )
    pixels, told = SeenPixels()(partial).chunk(2, -1)
    assert torch.equal(pixels, value * seen)
    assert torch.equal(told, seen.double())


def test_elu_equals_torch() -> None:
    value = torch.linspace(-30, 30, 1001, dtype=torch.double, requires_grad=True)
    ours, theirs = ELU()(value), torch.nn.functional.elu(value)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out.sum(), value)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_lower_precision_returns_the_parameters_dtype() -> None:
    torch.manual_seed(0)
    net = MLP((8, 16, 4), compute_dtype=torch.bfloat16)
    value = torch.randn(32, 8)
    low = net(value)
    net.compute_dtype = None
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, net(value), atol=0.02, rtol=0.02)
    assert not torch.equal(low, net(value))


def test_decoders() -> None:
    pixels = BernoulliDecoder(MLP((4, 8, 784)))(torch.randn(3, 2, 4))
    assert (pixels.batch_shape, pixels.event_shape) == ((3, 2), (784,))
    points = toy.NormalDecoder()(torch.randn(3, 2, 2))
    assert (points.batch_shape, points.event_shape) == ((3, 2), (2,))


def test_a_decoder_starts_at_the_mean() -> None:
    """Where its last layer gets nothing; a pixel that is always black has a finite bias."""
    mean = torch.rand(784)
    mean[:2] = torch.tensor([0.0, 1.0])
    decoder = BernoulliDecoder(MLP((4, 8, 784)), mean=mean)
    with torch.no_grad():
        decoder.net.last.weight.zero_()
        start = decoder(torch.randn(3, 4)).mean
    torch.testing.assert_close(start, mean.clamp(0.002, 0.998).expand(3, -1))


def test_a_mean_is_subtracted_from_the_input() -> None:
    mean, value = torch.tensor([3.0, -1.0, 0.0]), torch.randn(5, 3)
    nets = []
    for options in ({}, {"mean": mean}):
        torch.manual_seed(0)
        nets.append(MLP((3, 8, 2), **options))
    torch.testing.assert_close(nets[1](value + mean), nets[0](value))


def test_an_mlp_needs_two_sizes() -> None:
    with pytest.raises(ValueError, match=r"an input and an output width at least, got \(3,\)"):
        MLP((3,))
