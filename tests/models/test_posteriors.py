# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from models.posterior_guides import GUIDES
from models.posteriors import (
    POSTERIORS,
    SCHOOLS,
    SCHOOLS_ERROR,
    _ar1,
    schools_centred,
    schools_noncentred,
)
from pyro_ardae.unconstrained import UnconstrainedModel

DIMS = {
    "schools-centred": 10,
    "schools-noncentred": 10,
    "logistic": 31,
    "intercepts": 24,
    "banana": 2,
    "two-moons": 2,
    "bimodal": 2,
    "volatility": 103,
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_are_evaluated_together_as_one_by_one(name: str) -> None:
    posterior = POSTERIORS[name]()
    args = posterior.args if posterior.reference_args is None else posterior.reference_args
    joint = UnconstrainedModel(posterior.reference_model or posterior.model, *args)
    assert joint.dim == DIMS[name]
    assert joint.batch_shape == ()
    latent = 0.3 * torch.randn(3, joint.dim)
    together = joint.log_joint(latent)
    alone = torch.cat([joint.log_joint(row) for row in latent.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_takes_a_step_on_a_subsampled_plate(name: str) -> None:
    if name == "flow" and importlib.util.find_spec("zuko") is None:
        pytest.skip("zuko is not installed")  # importing it here would turn validation off
    posterior = POSTERIORS["intercepts"]()
    guide = GUIDES[name](posterior.model, 0.1)
    guide(*posterior.args)
    if name == "implicit":
        return  # its loss is tested elsewhere
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss(posterior.model, guide)(*posterior.args).backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all())
        for p in guide.parameters()
        if p.requires_grad
    )


def test_centred_and_noncentred_schools_are_the_same_posterior() -> None:
    centred, other = (
        UnconstrainedModel(model, SCHOOLS, SCHOOLS_ERROR)
        for model in (schools_centred, schools_noncentred)
    )
    mu, tau, eta = torch.tensor(3.0), torch.tensor(2.0), torch.randn(8)
    translate = POSTERIORS["schools-centred"]().translate
    assert translate is not None
    draws = translate({"mu": mu[None], "tau": tau[None], "eta": eta[None]})
    values = {name: value.reshape(1, -1) for name, value in draws.items()}
    first = centred.log_joint(centred.pack(values))
    values = {"mu": mu.reshape(1, 1), "tau": tau.reshape(1, 1), "eta": eta.reshape(1, 8)}
    second = other.log_joint(other.pack(values))
    # Densities of theta and of eta: |d theta / d eta| = tau^8.
    torch.testing.assert_close(first + 8 * tau.log(), second, rtol=1e-5, atol=1e-4)


def test_ar1_is_the_recursion() -> None:
    phi = torch.tensor([0.9, 0.3])
    z = torch.randn(2, 6)
    found = _ar1(phi, z)
    h: list[Tensor] = [z[:, 0] / (1 - phi**2).sqrt()]
    for day in range(1, 6):
        h.append(phi * h[-1] + z[:, day])
    torch.testing.assert_close(found, torch.stack(h, -1))


def test_modes_are_symmetric() -> None:
    for name in ("two-moons", "bimodal"):
        posterior = POSTERIORS[name]()
        joint = UnconstrainedModel(posterior.model, *posterior.args)
        z = torch.tensor([[1.9, -0.4], [-1.9, -0.4]])
        if name == "bimodal":
            z = torch.tensor([[1.5, -1.4], [-1.4, 1.5]])
        assert posterior.modes is not None
        assert posterior.modes(z).tolist() == [1, 0]
        first, second = joint.log_joint(z)
        assert float(first) == pytest.approx(float(second), abs=1e-3)
        between = joint.log_joint(torch.zeros(1, 2) + 1e-3)
        assert float(between) < float(first) - 3
