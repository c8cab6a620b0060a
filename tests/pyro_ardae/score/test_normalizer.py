# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The normalizing constant of the energy's density, by random and by quasi-random draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_ardae import ARDAE
from pyro_ardae.score.energy import EnergyNetwork


@pytest.mark.parametrize("dim", [1, 2])
def test_quasi_random_draws_err_less(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log Z of two modes, each 0.3 wide, at +-0.95 of every coordinate: exactly 0."""

    def energy(self: EnergyNetwork, flat: Tensor, w: Tensor, *arguments: Tensor) -> Tensor:
        modes = torch.stack([-0.5 * ((w - m) / 0.3).square() for m in (-0.95, 0.95)]).logsumexp(0)
        return -(modes - torch.tensor(0.6).log() + 0.5 * w.square()).sum(-1)

    monkeypatch.setattr(EnergyNetwork, "energy", energy)
    errors = {}
    for quasi_random in (False, True):
        estimator = ARDAE(
            dim,
            3,
            parametrization="energy",
            whitening="none",
            num_normalizer_samples=32,
            quasi_random=quasi_random,
        )
        value = torch.zeros(1, 2000, dim)
        at_zero = float(-energy(None, None, value[:, :1]))  # type: ignore[arg-type]
        at_zero -= dim * 0.9189385
        found = estimator.log_prob(value, value, torch.randn(2000, 3))
        errors[quasi_random] = found[0] - at_zero
    quasi, random = (float(errors[key].square().mean().sqrt()) for key in (True, False))
    # Measured: 0.00001 against 0.18 in one dimension, 0.17 against 0.31 in two.
    assert quasi < {1: 0.15, 2: 0.75}[dim] * random
    # The logarithm of an unbiased estimate is low by half its variance, to first order.
    variance = quasi**2
    standard_error = quasi / 2000**0.5
    assert abs(float(errors[True].mean()) - 0.5 * variance) < 5 * standard_error + 0.5 * variance
