# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from inference.shared.plots import mass_levels


def test_levels_enclose_the_shares_of_a_gaussian(float64: None) -> None:
    """Of a standard Normal in the plane, exp(-r^2 / 2) of the mass lies outside of radius r."""
    axis = torch.linspace(-6.0, 6.0, 401)
    square = axis.square().view(-1, 1) + axis.square()
    levels = mass_levels((-square / 2).exp())
    assert levels == pytest.approx([0.01, 0.1, 0.5], rel=0.02)
