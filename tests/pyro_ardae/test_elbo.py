# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients with the closed-form score in place of the network, against explicit Normal guides.

With the same noise, an implicit guide with an exact score has the gradient of an explicit guide
whose density has detached parameters (the path gradient, "sticking the landing"). In float64 the
two must agree to rounding, whatever Pyro does around the site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import ExpTransform, StickBreakingTransform
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.distributions import register_kl

from pyro_ardae import (
    Implicit,
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from tests.pyro_ardae.oracle import Oracle, PathNormal, QuietNormal

N, B, D = 12, 5, 3


@register_kl(PathNormal, dist.Normal)
def no_closed_form(p: PathNormal, q: dist.Normal) -> Tensor:
    raise NotImplementedError  # TraceMeanField_ELBO then samples, as it does for Implicit


def noise(dim: int = D) -> dist.Distribution:
    return QuietNormal(torch.zeros(dim), torch.ones(dim)).to_event(1)


def masked(mask: Tensor | None, index: Tensor) -> Any:
    return poutine.mask(mask=True if mask is None else mask[index])


class Model(PyroModule):
    """Global g, t and local z in a plate; x is observed."""

    def forward(
        self,
        x: Tensor,
        *,
        subsample: int = B,
        mask: Tensor | None = None,
        scale: float = 1.0,
        positive: bool = False,
    ) -> None:
        g = pyro.sample("g", dist.Normal(torch.zeros(D), 2.0).to_event(1))
        t = pyro.sample("t", dist.LogNormal(torch.tensor(0.0), 0.5))
        plate = pyro.plate("data", N, subsample_size=subsample)
        with poutine.scale(scale=scale), plate as index, masked(mask, index):
            prior = dist.LogNormal if positive else dist.Normal
            z = pyro.sample("z", prior(g, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, t.unsqueeze(-1)).to_event(1), obs=x[index])


class Guide(PyroModule):
    """Normal q(g), LogNormal q(t), amortized q(z | x); g and z implicit if ``normal`` is None."""

    def __init__(self, normal: type[dist.Normal] | None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)

        def positive(*shape: int) -> PyroParam:
            start = 0.3 + torch.rand(shape, generator=draw)
            return PyroParam(start, constraints.positive)

        self.normal = normal
        self.g_loc = PyroParam(torch.randn(D, generator=draw))
        self.g_scale = positive(D)
        self.t_loc = PyroParam(torch.tensor(0.1))
        self.t_scale = positive()
        self.weight = PyroParam(0.3 * torch.randn(D, D, generator=draw))
        self.z_scale = positive(D)

    def forward(
        self,
        x: Tensor,
        *,
        subsample: int = B,
        mask: Tensor | None = None,
        scale: float = 1.0,
        positive: bool = False,
    ) -> None:
        explicit = PathNormal if self.normal is None else self.normal
        g_loc, g_scale, weight, z_scale = self.g_loc, self.g_scale, self.weight, self.z_scale
        if self.normal is None:
            q: Any = Implicit(lambda eps: g_loc + g_scale * eps, noise())
        else:
            q = self.normal(g_loc, g_scale).to_event(1)
        pyro.sample("g", q)
        t = dist.TransformedDistribution(explicit(self.t_loc, self.t_scale), [ExpTransform()])
        pyro.sample("t", t)
        plate = pyro.plate("data", N, subsample_size=subsample)
        with poutine.scale(scale=scale), plate as index, masked(mask, index):
            if self.normal is None:
                q = Implicit(lambda eps, c: c @ weight + z_scale * eps, noise(), x[index])
            else:
                q = self.normal(x[index] @ weight, z_scale).to_event(1)
            if positive:
                q = dist.TransformedDistribution(q, [ExpTransform()])
            pyro.sample("z", q)

    def oracle(self, error: float = 0.0) -> Callable[[int, int], Oracle]:
        """Factory of exact scores, wrong by the factor 1 + ``error`` where asked for."""

        def score(value: Tensor, context: Tensor | None) -> Tensor:
            if context is None:
                loc, scale = self.g_loc, self.g_scale
            else:
                loc, scale = context @ self.weight, self.z_scale
            return -(1 + error) * (value - loc) / scale**2

        return lambda dim, context_dim: Oracle(dim, context_dim, score)


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(N, D, generator=draw), torch.rand(N, generator=draw) < 0.7


def gradients(
    elbo: Any, guide: PyroModule, *args: Any, model: Any = None, call: str = "svi", **kwargs: Any
) -> dict[str, Tensor]:
    """Gradients of the guide's parameters, always on the same random numbers."""
    model = Model() if model is None else model
    args = args or (data()[0],)
    pyro.clear_param_store()
    guide.zero_grad()
    pyro.set_rng_seed(3)
    if call == "svi":
        elbo.loss_and_grads(model, guide, *args, **kwargs)
    elif call == "differentiable_loss":
        elbo.differentiable_loss(model, guide, *args, **kwargs).backward()
    else:
        elbo(model, guide)(*args, **kwargs).backward()
    return {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    assert left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


MASK = data()[1]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "global site and local site in a subsampled plate": ({}, {}),
    "full plate": ({}, {"subsample": N}),
    "scale": ({}, {"scale": 0.3}),
    "mask": ({}, {"mask": MASK}),
    "positive support": ({}, {"positive": True}),
    "all together": ({}, {"scale": 0.3, "mask": MASK, "positive": True}),
    "4 particles": ({"num_particles": 4}, {"mask": MASK}),
    "4 particles vectorized": (
        {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1},
        {"mask": MASK, "positive": True},
    ),
    "4 particles vectorized, nesting guessed": (
        {"num_particles": 4, "vectorize_particles": True},
        {"scale": 0.3},
    ),
    "differentiable_loss": ({}, {"call": "differentiable_loss", "mask": MASK}),
    "module": ({}, {"call": "module", "mask": MASK}),
    "module, 3 particles": ({"num_particles": 3}, {"call": "module", "positive": True}),
}
ELBOS = {
    "Trace": (TraceImplicit_ELBO, Trace_ELBO, {}),
    "TraceMeanField": (TraceImplicitMeanField_ELBO, TraceMeanField_ELBO, {}),
    "TraceEnum": (
        TraceImplicitEnum_ELBO,
        TraceEnum_ELBO,
        {"max_plate_nesting": 1, "strict_enumeration_warning": False},
    ),
}


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_path_gradient(float64: None, case: str, elbo: str) -> None:
    implicit_elbo, explicit_elbo, fixed = ELBOS[elbo]
    options, arguments = CASES[case]
    options = {**fixed, **options}
    guide, reference = Guide(None), Guide(PathNormal)
    expected = gradients(explicit_elbo(**options), reference, **arguments)
    assert len(expected) == 6
    right = implicit_elbo(guide.oracle(), num_score_samples=2, **options)
    assert largest_difference(gradients(right, guide, **arguments), expected) < 1e-10
    wrong = implicit_elbo(guide.oracle(error=1e-6), num_score_samples=2, **options)
    assert largest_difference(gradients(wrong, guide, **arguments), expected) > 1e-8


def differences(
    pairs: list[tuple[Any, PyroModule]], model: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Difference of the gradients of two (loss, guide) pairs, ``[200 batches, coordinates]``.

    A batch holds 100 particles, 20,000 in all; their means give the standard error. Both see the
    same random numbers, so what differs is the term of mean 0.
    """
    rows = []
    for _ in range(200):
        row, state = [], torch.get_rng_state()
        for elbo, guide in pairs:
            torch.set_rng_state(state)
            pyro.clear_param_store()
            guide.zero_grad()
            elbo.loss_and_grads(model, guide, *args, **kwargs)
            row.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
        rows.append(row[0] - row[1])
    return torch.stack(rows)


def standardized(difference: Tensor) -> Tensor:
    # 1.03: quantiles of the t distribution with 199 degrees of freedom over the normal's
    return difference.mean(0) / (1.03 * difference.std(0) / len(difference) ** 0.5)


def test_gradient_agrees_with_the_plain_elbo_in_expectation(
    float64: None, standard_errors: Callable[[int], float]
) -> None:
    """Pyro keeps the term of mean 0, E[d log q / d phi]: the gradients agree on average only."""
    options = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 1}
    guide, reference = Guide(None), Guide(dist.Normal)

    def compare(error: float) -> Tensor:
        elbo = TraceImplicit_ELBO(guide.oracle(error), num_score_samples=2, **options)
        pairs = [(elbo, guide), (Trace_ELBO(**options), reference)]
        return standardized(differences(pairs, Model(), data()[0], subsample=N))

    difference = compare(0.0)
    limit = standard_errors(len(difference))  # every coordinate is a comparison
    assert float(difference.abs().max()) < limit
    assert float(compare(0.1).abs().max()) > limit  # a score 10 % off is found out


# ---- guides of other kinds -----------------------------------------------------------------------


class Messenger(GuideMessenger):
    """Sites of the model replaced one by one, in the model's own plates."""

    def __init__(self, model: Any, guide: Guide) -> None:
        super().__init__(model)
        self.guide = guide

    def get_posterior(self, name: str, prior: Any) -> Any:
        guide = self.guide
        loc = pyro.param("loc_" + name, guide.g_loc.detach().clone())
        scale = pyro.param("scale_" + name, guide.g_scale.detach().clone(), constraints.positive)
        if name == "t":
            return dist.TransformedDistribution(PathNormal(loc[0], scale[0]), [ExpTransform()])
        if guide.normal is None:
            return Implicit(lambda eps: loc + scale * eps, noise())
        return PathNormal(loc, scale).to_event(1)


@pytest.mark.parametrize("particles", [1, 4])
def test_guide_messenger(float64: None, particles: int) -> None:
    """poutine.unwrap() must find the GuideMessenger: as a plain guide its gradient is wrong."""
    x, model, results = data()[0], Model(), []
    shapes = {"g": (1, D), "z": (B, D)}  # rows of one q are so many values of it
    for normal in (None, PathNormal):
        guide = Messenger(model, Guide(normal))
        if normal is None:

            def score(value: Tensor, context: Tensor | None) -> Tensor:
                names = [n for n in ("g", "z") if value.shape == torch.Size(shapes[n])]
                loc, scale = (pyro.param(key + names[0]) for key in ("loc_", "scale_"))
                return -(value - loc) / scale**2

            elbo: Any = TraceImplicit_ELBO(
                lambda d, c: Oracle(d, c, score), num_score_samples=2, num_particles=particles
            )
        else:
            elbo = Trace_ELBO(num_particles=particles)
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        elbo.loss_and_grads(model, guide, x)
        store = pyro.get_param_store()
        results.append({name: store[name].unconstrained().grad.clone() for name in store})
    assert len(results[1]) == 6
    assert largest_difference(*results) < 1e-10


def test_discrete_site_of_the_model_is_summed_out(float64: None) -> None:
    def model(x: Tensor) -> None:
        weights = torch.tensor([0.3, 0.7])
        with pyro.plate("data", N, subsample=torch.arange(B)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            k = pyro.sample("k", dist.Categorical(weights))
            sign = 2.0 * k.unsqueeze(-1) - 1
            pyro.sample("x", dist.Normal(sign * z, 0.5).to_event(1), obs=x[:B])

    class Local(Guide):
        def forward(self, x: Tensor) -> None:
            weight, scale = self.weight, self.z_scale
            with pyro.plate("data", N, subsample=torch.arange(B)):
                if self.normal is None:
                    q: Any = Implicit(lambda eps, c: c @ weight + scale * eps, noise(), x[:B])
                else:
                    q = PathNormal(x[:B] @ weight, scale).to_event(1)
                pyro.sample("z", q)

    model = config_enumerate(model)
    guide, reference = Local(None), Local(PathNormal)
    elbo = TraceImplicitEnum_ELBO(guide.oracle(), num_score_samples=2, max_plate_nesting=1)
    actual = gradients(elbo, guide, model=model)
    expected = gradients(TraceEnum_ELBO(max_plate_nesting=1), reference, model=model)
    assert (
        expected.keys() == {"weight_unconstrained", "z_scale_unconstrained"} or len(expected) == 2
    )
    assert largest_difference(actual, expected) < 1e-10
    particles = {"max_plate_nesting": 1, "num_particles": 3, "vectorize_particles": True}
    elbo = TraceImplicitEnum_ELBO(guide.oracle(), num_score_samples=2, **particles)
    actual = gradients(elbo, guide, model=model)
    expected = gradients(TraceEnum_ELBO(**particles), reference, model=model)
    assert largest_difference(actual, expected) < 1e-10


class Chain(PyroModule):
    """a, then b given a, then c given both: implicit, implicit, explicit."""

    def __init__(self, normal: type[dist.Normal] | None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(4)
        self.normal = normal
        self.a_loc = PyroParam(torch.randn(D, generator=draw))
        self.a_scale = PyroParam(torch.rand(D, generator=draw) + 0.3, constraints.positive)
        self.b_weight = PyroParam(torch.randn(D, D, generator=draw))
        self.b_scale = PyroParam(torch.rand(D, generator=draw) + 0.3, constraints.positive)
        self.c_weight = PyroParam(torch.randn(D, D, generator=draw))
        self.c_scale = PyroParam(torch.rand(D, generator=draw) + 0.3, constraints.positive)

    def forward(self, x: Tensor) -> None:
        a_loc, a_scale = self.a_loc, self.a_scale
        b_weight, b_scale = self.b_weight, self.b_scale
        explicit = PathNormal if self.normal is None else self.normal
        if self.normal is None:
            a = pyro.sample("a", Implicit(lambda eps: a_loc + a_scale * eps, noise()))
            b = Implicit(lambda eps, c: torch.tanh(c) @ b_weight + b_scale * eps, noise(), a)
            b = pyro.sample("b", b)
        else:
            a = pyro.sample("a", self.normal(a_loc, a_scale).to_event(1))
            b = self.normal(torch.tanh(a) @ b_weight, b_scale).to_event(1)
            b = pyro.sample("b", b)
        pyro.sample("c", explicit((a + b) @ self.c_weight, self.c_scale).to_event(1))

    def oracle(self, dim: int, context_dim: int) -> Oracle:
        def score(value: Tensor, context: Tensor | None) -> Tensor:
            if context is None:
                return -(value - self.a_loc) / self.a_scale**2
            return -(value - torch.tanh(context) @ self.b_weight) / self.b_scale**2

        return Oracle(dim, context_dim, score)


def chain_model(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
    c = pyro.sample("c", dist.Normal(a * b, 1.0).to_event(1))
    pyro.sample("x", dist.Normal(c, 0.5).to_event(1), obs=x)


def test_chained_sites(float64: None) -> None:
    """Each site needs its own conditional score alone: E[d log q(b | a) / da] = 0.

    The reference keeps just that: a density with detached parameters at every site.
    """
    x = data()[0][0]
    guide, reference = Chain(None), Chain(PathNormal)
    for particles in (
        {},
        {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 0},
    ):
        elbo = TraceImplicit_ELBO(guide.oracle, num_score_samples=2, **particles)
        actual = gradients(elbo, guide, x, model=chain_model)
        expected = gradients(Trace_ELBO(**particles), reference, x, model=chain_model)
        assert len(expected) == 6
        assert largest_difference(actual, expected) < 1e-10


def test_chained_sites_are_unbiased(float64: None, standard_errors: Callable[[int], float]) -> None:
    """Against the full gradient of plain Trace_ELBO, in expectation."""
    options = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 0}
    guide = Chain(None)
    elbo = TraceImplicit_ELBO(guide.oracle, num_score_samples=2, **options)
    pairs = [(elbo, guide), (Trace_ELBO(**options), Chain(dist.Normal))]
    difference = standardized(differences(pairs, chain_model, data()[0][0]))
    assert float(difference.abs().max()) < standard_errors(len(difference))


def test_support_of_another_size(float64: None) -> None:
    """The simplex has one coordinate more than the implicit distribution under it."""
    transform = StickBreakingTransform()

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0, 0.5])))
        pyro.sample("x", dist.Categorical(p), obs=torch.tensor(1))

    class Simplex(Guide):
        def forward(self) -> None:
            loc, scale = self.g_loc, self.g_scale
            if self.normal is None:
                q: Any = Implicit(lambda eps: loc + scale * eps, noise())
            else:
                q = PathNormal(loc, scale).to_event(1)
            pyro.sample("p", dist.TransformedDistribution(q, [transform]))

    guide, reference = Simplex(None), Simplex(PathNormal)
    results = []
    for elbo, q in (
        (TraceImplicit_ELBO(guide.oracle(), num_score_samples=2), guide),
        (Trace_ELBO(), reference),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        elbo.loss_and_grads(model, q)
        results.append({n: p.grad for n, p in q.named_parameters() if p.grad is not None})
    assert len(results[1]) == 2
    assert largest_difference(*results) < 1e-10


@pytest.mark.parametrize("elbo", ["Trace", "TraceMeanField"])
def test_guide_without_implicit_sites_is_pyros_own(float64: None, elbo: str) -> None:
    implicit_elbo, explicit_elbo, fixed = ELBOS[elbo]
    guide = Guide(dist.Normal)
    x, model = data()[0], Model()
    losses, grads = [], []
    for loss in (implicit_elbo(num_particles=3, **fixed), explicit_elbo(num_particles=3, **fixed)):
        grads.append(gradients(loss, guide))
        pyro.set_rng_seed(5)
        losses.append((loss.loss(model, guide, x), loss.loss_and_grads(model, guide, x)))
    assert losses[0] == losses[1]
    assert largest_difference(*grads) == 0.0


def test_value_of_the_loss_lacks_the_implicit_entropies(float64: None) -> None:
    """What is documented: implicit sites add 0 to the loss, not their log density."""
    x, model = data()[0], Model()
    guide, reference = Guide(None), Guide(PathNormal)
    elbo = TraceImplicit_ELBO(guide.oracle(), num_score_samples=2)
    pyro.set_rng_seed(3)
    value = elbo.loss(model, guide, x)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    full = Trace_ELBO().loss(model, reference, x)
    pyro.set_rng_seed(3)
    trace = poutine.trace(reference).get_trace(x)
    trace.compute_log_prob()
    entropies = sum(trace.nodes[name]["log_prob_sum"].item() for name in ("g", "z"))
    assert abs(value + entropies - full) < 1e-10


def test_distributions_kept_by_a_guide_lose_their_score(float64: None) -> None:
    loc = torch.zeros(D, requires_grad=True)
    kept = Implicit(lambda eps: loc + eps, noise())

    def guide() -> None:
        pyro.sample("g", kept)

    def model() -> None:
        pyro.sample("g", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    elbo = TraceImplicit_ELBO(lambda d, c: Oracle(d, c, lambda z, _: -z), num_score_samples=2)
    elbo.loss_and_grads(model, guide)
    with pytest.raises(NotImplementedError, match="no density"):
        kept.log_prob(torch.zeros(D))
    with pytest.raises(NotImplementedError, match="no density"):
        Trace_ELBO().loss(model, guide)


# ---- diagnostics ---------------------------------------------------------------------------------


def test_diagnostics_of_known_draws(float64: None) -> None:
    """Draws at m + (±1, ±2), m = (1, 2), and the score (0.6, 0.8) - (z - m)."""
    draws = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    mean = draws.mean(0)

    def guide() -> None:  # whatever the noise, also when the score is learned
        pyro.sample("z", Implicit(lambda eps: draws, 2))

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    elbo = TraceImplicit_ELBO(
        lambda d, c: Oracle(d, c, lambda z, _: torch.tensor([0.6, 0.8]) - (z - mean)),
        num_score_samples=4,
        num_particles=4,
        vectorize_particles=True,
        max_plate_nesting=0,
    )
    with torch.no_grad():
        elbo.loss(model, guide)
    # With c = z - m the identity is (|c|^2 - 0.6 c1 - 0.8 c2) / 2, that is 3.6, 3.0, 2.0, 1.4. Sums
    # of squared deviations: 2.92 of it, 4 and 16 of the draws' coordinates.
    assert elbo.diagnostics()["z"] == pytest.approx(
        {
            "stein": 2.5,
            "stein_error": (2.92 / 3) ** 0.5 / 2,
            "mean_score": 1.0,
            "std": ((4 / 3) ** 0.5 + (16 / 3) ** 0.5) / 2,
        }
    )
