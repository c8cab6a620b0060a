# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guides in training, with their programs' recipes: is the score right while they move fastest?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyro
import pytest
import torch

from inference.autoencoders.presets import PRESETS, build_data
from inference.autoencoders.training import Training
from pyro_ardae import TraceImplicit_ELBO


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["25gaussians-implicit", "sbmnist-mlp-implicit"])
def test_stein_identity_from_the_first_step_on(preset: str, mnist_dir: Path) -> None:
    """Within a factor 1.5 in each of the first 500 steps, without a warm-up, on draws of the model
    as on data.
    """
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    changes = {"data_dir": mnist_dir, "threads": 1, "fantasy_start": 0}
    config = dataclasses.replace(PRESETS[preset][1], **changes)
    training = Training(config, build_data(config))
    assert isinstance(training.loss, TraceImplicit_ELBO)
    identity = []
    for _ in range(500):
        training.step()
        identity.append(training.loss.diagnostics()["z"]["stein"])
    assert min(identity) > 1 / 1.5
    assert max(identity) < 1.5
