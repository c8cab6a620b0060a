# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of several sites: implicit and explicit, hierarchical noise, enumerated model sites.

The score is exact and the noise is shared, so gradients must equal those of explicit guides whose
densities have detached parameters, as in ``test_elbo``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_ardae import Implicit, TraceImplicit_ELBO, TraceImplicitEnum_ELBO
from tests.pyro_ardae.oracle import Oracle, PathNormal, QuietNormal

N, D = 5, 2


def data() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(2))


def model(x: Tensor) -> None:
    """Two globals, two dependent locals, a discrete local, data."""
    g = pyro.sample("g", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    t = pyro.sample("t", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", N, subsample=torch.arange(N)):
        a = pyro.sample("a", dist.Normal(g, 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a * t, 1.0).to_event(1))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        sign = 2.0 * k.unsqueeze(-1) - 1
        pyro.sample("x", dist.Normal(sign * (a + b), 0.5).to_event(1), obs=x)


class Guide(PyroModule):
    """g implicit, t explicit given g, a implicit given x and g, with hierarchical noise, b implicit
    given a and t: each with what it depends on in its context."""

    def __init__(self, implicit: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.implicit = implicit
        for name, shape in {
            "g_loc": (D,),
            "t_weight": (D, D),
            "a_weight": (2 * D, D),
            "a_prior": (D, D),
            "b_weight": (2 * D, D),
        }.items():
            setattr(self, name, PyroParam(0.5 * torch.randn(shape, generator=draw)))
        for name in ("g_scale", "t_scale", "a_scale", "a_factor", "b_scale"):
            start = 0.3 + torch.rand(D, generator=draw)
            setattr(self, name, PyroParam(start, dist.constraints.positive))

    def forward(self, x: Tensor) -> None:
        g_loc, g_scale = self.g_loc, self.g_scale
        a_weight, a_scale, a_factor = self.a_weight, self.a_scale, self.a_factor
        a_prior, b_weight, b_scale = self.a_prior, self.b_weight, self.b_scale

        def standard() -> Any:
            return QuietNormal(torch.zeros(D), torch.ones(D)).to_event(1)

        q: Any = PathNormal(g_loc, g_scale).to_event(1)
        if self.implicit:
            q = Implicit(lambda eps: g_loc + g_scale * eps, standard())
        g = pyro.sample("g", q)
        t = pyro.sample("t", PathNormal(g @ self.t_weight, self.t_scale).to_event(1))
        with pyro.plate("data", N, subsample=torch.arange(N)):
            wide = torch.broadcast_shapes(x.shape[:-1], g.shape[:-1])
            given = torch.cat([x.expand(*wide, D), g.expand(*wide, D)], -1)
            # z0 ~ N(P x, s) inside of the noise, a = W (x, g) + f z0
            if self.implicit:
                noise = QuietNormal(x @ a_prior, a_scale).to_event(1)
                q = Implicit(lambda z0, c: c @ a_weight + a_factor * z0, noise, given)
            else:
                loc = given @ a_weight + a_factor * (x @ a_prior)
                q = PathNormal(loc, a_factor * a_scale).to_event(1)
            a = pyro.sample("a", q)
            given = torch.cat([a, t.expand(a.shape)], -1)
            q = PathNormal(given @ b_weight, b_scale).to_event(1)
            if self.implicit:
                q = Implicit(lambda eps, c: c @ b_weight + b_scale * eps, standard(), given)
            pyro.sample("b", q)

    def oracles(self, error: float = 0.0) -> Callable[[int, int], Oracle]:
        """Exact scores: sites are met in the order g, a, b."""
        order = iter("gab")

        def g(z: Tensor, _: Any) -> Tensor:
            return -(1 + error) * (z - self.g_loc) / self.g_scale**2

        def a(z: Tensor, c: Tensor) -> Tensor:
            loc = c @ self.a_weight + self.a_factor * (c[..., :D] @ self.a_prior)
            return -(z - loc) / (self.a_factor * self.a_scale) ** 2

        def b(z: Tensor, c: Tensor) -> Tensor:
            return -(z - c @ self.b_weight) / self.b_scale**2

        scores = {"g": g, "a": a, "b": b}
        return lambda dim, context_dim: Oracle(dim, context_dim, scores[next(order)])


def gradients(elbo: Any, guide: Guide, model: Any) -> Tensor:
    pyro.clear_param_store()
    guide.zero_grad()
    pyro.set_rng_seed(3)
    elbo.loss_and_grads(model, guide, data())
    return torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None])


PARTICLES: list[dict[str, Any]] = [
    {},
    {"num_particles": 3},
    {"num_particles": 3, "vectorize_particles": True},
]


@pytest.mark.parametrize("particles", PARTICLES, ids=["one", "three", "three vectorized"])
def test_gradient_of_all_kinds_of_sites_together(float64: None, particles: dict[str, Any]) -> None:
    enumerated = config_enumerate(model)
    options = {"max_plate_nesting": 1, **particles}
    guide, reference = Guide(True), Guide(False)
    expected = gradients(TraceEnum_ELBO(**options), reference, enumerated)
    assert len(expected) == sum(p.numel() for p in guide.parameters())
    elbo = TraceImplicitEnum_ELBO(guide.oracles(), num_score_samples=2, **options)
    assert float((gradients(elbo, guide, enumerated) - expected).abs().max()) < 1e-10
    assert list(elbo.estimators) == ["g", "a", "b"]
    wrong = TraceImplicitEnum_ELBO(guide.oracles(1e-6), num_score_samples=2, **options)
    assert float((gradients(wrong, guide, enumerated) - expected).abs().max()) > 1e-8


@pytest.mark.parametrize("particles", PARTICLES, ids=["one", "three", "three vectorized"])
def test_without_enumeration(float64: None, particles: dict[str, Any]) -> None:
    """The discrete site fixed: the plain ELBO."""
    fixed = pyro.poutine.condition(model, {"k": torch.ones(N).long()})
    options = {"max_plate_nesting": 1, **particles}
    guide, reference = Guide(True), Guide(False)
    expected = gradients(Trace_ELBO(**options), reference, fixed)
    elbo = TraceImplicit_ELBO(guide.oracles(), num_score_samples=2, **options)
    assert float((gradients(elbo, guide, fixed) - expected).abs().max()) < 1e-10
