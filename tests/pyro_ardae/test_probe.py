# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The warning about a context that lacks something: given where it should be, and only there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ardae import (
    ARDAE,
    AutoImplicit,
    Implicit,
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
)

SMALL = partial(ARDAE, hidden_dim=8, depth=1)
ROWS, D = 5, 2
AUXILIARY = {"is_auxiliary": True}


class Nets(nn.Module):
    """What the guides of this file are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(D))
        self.encoder = nn.Linear(3, D)
        self.other_encoder = nn.Linear(3, D)
        self.head = nn.Linear(D, D)


NETS = Nets()
X = torch.linspace(-1, 1, ROWS * 3).reshape(ROWS, 3).cos()


def model() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("rows", ROWS):
        pyro.sample("z", dist.Normal(a, 1.0).to_event(1))


def guide(local: Callable[[Tensor], Implicit], explicit: bool = False) -> None:
    pyro.module("nets", NETS)
    if explicit:
        a = pyro.sample("a", dist.Normal(NETS.loc, 1.0).to_event(1))
    else:
        a = pyro.sample("a", Implicit(lambda eps: NETS.loc + eps, D))
    with pyro.plate("rows", ROWS):
        pyro.sample("z", local(a))


def rows(a: Tensor) -> Tensor:
    """The global, once for each row."""
    return a.expand(*a.shape[:-1], ROWS, D) if a.dim() == 1 else a.expand(*a.shape[:-2], ROWS, D)


# ---- nothing is missing --------------------------------------------------------------------------


def of_nothing(a: Tensor) -> Implicit:
    return Implicit(lambda eps: NETS.loc + eps, D)


def of_features(a: Tensor) -> Implicit:
    return Implicit(lambda eps, c: c + eps, D, NETS.encoder(X))


def of_data(a: Tensor) -> Implicit:
    return Implicit(lambda eps, c: NETS.encoder(c) + eps, D, X)


def of_features_and_global(a: Tensor) -> Implicit:
    context = torch.cat([NETS.encoder(X).expand(*rows(a).shape[:-1], D), rows(a)], -1)
    return Implicit(lambda eps, c: c[..., :D] + c[..., D:].tanh() * eps, D, context)


def of_the_global_alone(a: Tensor) -> Implicit:
    return Implicit(lambda eps, c: NETS.head(c) + eps, D, rows(a))


def of_the_global_in_the_context_and_read_directly(a: Tensor) -> Implicit:
    context = torch.cat([NETS.encoder(X).expand(*rows(a).shape[:-1], D), rows(a)], -1)
    return Implicit(lambda eps, c: c[..., :D] + rows(a) + eps, D, context)


def computed_from_the_context_outside(a: Tensor) -> Implicit:
    context = NETS.encoder(X)
    shift = NETS.head(context)
    return Implicit(lambda eps, _: shift + eps, D, context)


def with_noise_of_its_own(a: Tensor) -> Implicit:
    return Implicit(lambda eps, c: c + eps + torch.randn_like(eps), D, NETS.encoder(X))


def of_hierarchical_noise(a: Tensor) -> Implicit:
    context = NETS.encoder(X)
    noise = dist.Normal(context, 1.0).to_event(1)
    return Implicit(lambda eps, c: NETS.head(eps) + c, noise, context)


def of_a_constant_by_parameter(a: Tensor) -> Implicit:
    return Implicit(lambda eps, c: NETS.loc.exp() * eps + c, D, NETS.encoder(X))


def behind_a_transform(a: Tensor) -> Any:
    base = Implicit(lambda eps, c: c + eps, D, NETS.encoder(X))
    return dist.TransformedDistribution(
        base, [dist.transforms.AffineTransform(rows(a), 2.0, event_dim=1)]
    )


def of_a_point(a: Tensor) -> Implicit:
    """Of a site that is a parameter: there is nothing to average over."""
    scale = pyro.sample("scale", dist.Delta(NETS.loc.exp(), event_dim=1), infer=AUXILIARY)
    return Implicit(lambda eps, c: scale * eps + c, D, NETS.encoder(X))


RIGHT = [
    behind_a_transform,
    of_nothing,
    of_features,
    of_data,
    of_features_and_global,
    of_the_global_alone,
    of_the_global_in_the_context_and_read_directly,
    computed_from_the_context_outside,
    with_noise_of_its_own,
    of_hierarchical_noise,
    of_a_constant_by_parameter,
]
PARTICLES: dict[str, dict[str, Any]] = {
    "one": {},
    "three": {"num_particles": 3},
    "three vectorized": {
        "num_particles": 3,
        "vectorize_particles": True,
        "max_plate_nesting": 1,
    },
}


def run(local: Callable[[Tensor], Implicit], explicit: bool = False, **options: Any) -> Any:
    elbo = TraceImplicit_ELBO(SMALL, num_score_samples=8, **options)
    elbo.loss_and_grads(model, partial(guide, local, explicit))
    return elbo


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("local", RIGHT, ids=lambda f: f.__name__)
def test_no_warning(local: Callable[[Tensor], Implicit], particles: str) -> None:
    run(local, **PARTICLES[particles])  # any warning is an error


@pytest.mark.parametrize("particles", ["one", "three"])
def test_no_warning_of_a_site_that_is_a_parameter(particles: str) -> None:
    """Vectorized particles repeat its value, so there it has to be in the context."""
    run(of_a_point, **PARTICLES[particles])


# ---- something is missing ------------------------------------------------------------------------


def lacks_the_global(a: Tensor) -> Implicit:
    return Implicit(lambda eps, c: c + rows(a) + eps, D, NETS.encoder(X))


def lacks_the_global_and_has_no_context(a: Tensor) -> Implicit:
    return Implicit(lambda eps: rows(a) + eps, dist.Normal(torch.zeros(ROWS, D), 1.0).to_event(1))


def lacks_the_global_of_the_noise(a: Tensor) -> Implicit:
    noise = dist.Normal(rows(a), 1.0).to_event(1)
    return Implicit(lambda eps, c: c + eps, noise, NETS.encoder(X))


def lacks_a_point_of_the_global(a: Tensor) -> Implicit:
    twice = pyro.sample("twice", dist.Delta(2 * a, event_dim=1), infer=AUXILIARY)
    return Implicit(lambda eps, c: c + rows(twice) + eps, D, NETS.encoder(X))


def lacks_the_features(a: Tensor) -> Implicit:
    features = NETS.other_encoder(X)
    return Implicit(lambda eps, c: c + features + eps, D, NETS.encoder(X))


def lacks_the_features_beside_data(a: Tensor) -> Implicit:
    features = NETS.other_encoder(X)
    return Implicit(lambda eps, c: c + features + eps, D, X[:, :D])


def lacks_any_context(a: Tensor) -> Implicit:
    features = NETS.encoder(X)
    return Implicit(lambda eps: features + eps, dist.Normal(torch.zeros(ROWS, D), 1.0).to_event(1))


def lacks_the_data_of_the_noise(a: Tensor) -> Implicit:
    return Implicit(NETS.head, dist.Normal(X[:, :D], 1.0).to_event(1))


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize(
    "local",
    [
        lacks_the_global,
        lacks_the_global_and_has_no_context,
        lacks_the_global_of_the_noise,
        lacks_a_point_of_the_global,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("explicit", [False, True])
def test_an_earlier_site_is_missing(
    local: Callable[[Tensor], Implicit], particles: str, explicit: bool
) -> None:
    # With particles of a in the sampler and not in the context, shapes need not even fit.
    fails = suppress(ValueError, RuntimeError) if "vectorized" in particles else nullcontext()
    words = r"site 'z'.*depend on 'a', sampled before.*context: Impl"
    with pytest.warns(UserWarning, match=words), fails:
        run(local, explicit, **PARTICLES[particles])


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize(
    "local",
    [
        lacks_the_features,
        lacks_the_features_beside_data,
        lacks_any_context,
        lacks_the_data_of_the_noise,
    ],
    ids=lambda f: f.__name__,
)
def test_something_by_row_is_missing(local: Callable[[Tensor], Implicit], particles: str) -> None:
    with pytest.warns(UserWarning, match=r"site 'z'.*rows come out different.*lacks"):
        run(local, **PARTICLES[particles])


@pytest.mark.parametrize("draws", [ROWS, 8])
@pytest.mark.parametrize("particles", ["one", "three vectorized"])
def test_no_context_in_a_plate(particles: str, draws: int) -> None:
    """As many draws as rows broadcast, and would train on."""
    features = NETS.encoder(X)
    one = partial(guide, lambda a: Implicit(lambda eps: features + eps, D))
    elbo = TraceImplicit_ELBO(SMALL, num_score_samples=draws, **PARTICLES[particles])
    fails = nullcontext() if draws == ROWS else pytest.raises(RuntimeError, match="of the context")
    with pytest.warns(UserWarning, match=r"site 'z'.*rows come out different.*lacks"), fails:
        elbo.loss_and_grads(model, one)


def test_noise_narrower_than_a_draw() -> None:
    def prior() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def narrow(own: bool) -> None:
        weight = pyro.param("weight", torch.ones(1, 2))

        def sampler(noise: Tensor) -> Tensor:
            z = noise @ weight
            return z + torch.randn_like(z) if own else z

        pyro.sample("z", Implicit(sampler, 1, event_shape=(2,)))

    options = {"num_score_samples": 8, "num_particles": 2}
    with pytest.warns(UserWarning, match=r"site 'z': its noise has 1 dim.*a draw has 2.*surface"):
        TraceImplicit_ELBO(SMALL, **options).loss_and_grads(prior, partial(narrow, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TraceImplicit_ELBO(SMALL, **options).loss_and_grads(prior, partial(narrow, True))


def test_the_warning_comes_once() -> None:
    elbo = TraceImplicit_ELBO(SMALL, num_score_samples=8)
    one = partial(guide, lacks_the_features)
    with pytest.warns(UserWarning, match="lacks"):
        elbo.loss_and_grads(model, one)
    for _ in range(3):
        elbo.loss_and_grads(model, one)


def test_the_random_stream_is_left_alone() -> None:
    """A guide that is probed trains as one that is not."""
    states, one = [], partial(guide, of_features)
    for probed in (True, False):
        elbo = TraceImplicit_ELBO(SMALL, num_score_samples=8)
        if not probed:
            with elbo.frozen():
                elbo.loss_and_grads(model, one)
        pyro.set_rng_seed(1)
        elbo.loss_and_grads(model, one)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_evaluation_is_not_probed() -> None:
    elbo = TraceImplicit_ELBO(SMALL, num_score_samples=8)
    one = partial(guide, lacks_the_features)
    with torch.no_grad():
        elbo.loss(model, one)
    with pytest.warns(UserWarning, match="lacks"):
        elbo.loss_and_grads(model, one)


def test_automatic_guides_pass() -> None:
    def local(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 6, subsample_size=4):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=pyro.subsample(x, event_dim=1))

    x = torch.randn(6, 2)
    for arguments in ({}, {"encoder": nn.Linear(2, 3)}):
        pyro.clear_param_store()
        auto = AutoImplicit(local, **arguments)  # type: ignore[arg-type]
        for options in PARTICLES.values():
            elbo = TraceImplicitEnum_ELBO(
                SMALL, num_score_samples=8, strict_enumeration_warning=False, **options
            )
            elbo.loss_and_grads(local, auto, x)
