# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Steps under ``torch.autocast``: model and guide in half precision, the score as ever."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_ardae import AutoImplicit, Implicit, TraceImplicit_ELBO


def model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 0] + z[..., 1] ** 2, 0.3), obs=x)


def by_hand() -> Any:
    sampler = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 2))

    def guide(x: Tensor) -> None:
        pyro.module("sampler", sampler)
        pyro.sample("z", Implicit(sampler, noise=8, event_shape=(2,)))

    return guide


@pytest.mark.parametrize("make", [by_hand, lambda: AutoImplicit(model)], ids=["hand", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step(make: Any, dtype: torch.dtype) -> None:
    guide, x = make(), torch.tensor(1.0)
    elbo = TraceImplicit_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    with torch.autocast("cpu", dtype):
        for _ in range(3):
            svi.step(x)
    (estimator,) = elbo.estimators.values()
    assert all(p.dtype == torch.float32 for p in estimator.parameters())
    for value in pyro.get_param_store().values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    (figures,) = elbo.diagnostics().values()
    assert 0.5 < figures["stein"] < 2
