# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients of AutoImplicit with the exact score: against one written out, and under subsampling.

While the last layers of its networks are zero, the implicit sites are standard normal whatever the
other parameters are, so the score is -y.
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
from torch import Tensor
from torch.distributions import biject_to

from pyro_ardae import (
    AutoImplicit,
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from pyro_ardae.score import ScoreEstimator

N, B = 6, 2


class StandardNormalScore(ScoreEstimator):
    """The exact score, or one that is wrong by a factor 1 + ``error``."""

    error = 0.0

    def update(self, samples: Tensor, context: Tensor | None = None, **_: Any) -> Tensor:
        return samples.new_zeros(())

    def forward(
        self, value: Tensor, samples: Tensor, context: Tensor | None = None, **_: Any
    ) -> Tensor:
        return -(1 + self.error) * value.detach()


class WrongScore(StandardNormalScore):
    error = 0.1


def model(x: Tensor, batch_size: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", N, subsample_size=batch_size):
        z = pyro.sample("z", dist.Normal(mu, tau.unsqueeze(-1)).to_event(1))
        w = pyro.sample("w", dist.LogNormal(z[..., 0], 1.0))
        batch = pyro.subsample(x, event_dim=1)
        scale = 0.5 + w.unsqueeze(-1).sqrt()
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=batch)


def data() -> Tensor:
    return torch.randn(N, 2, generator=torch.Generator().manual_seed(2))


def make_guide(encoder: Any = None) -> AutoImplicit:
    """All parameters away from their start, but the last layers, which keep y normal."""
    guide = AutoImplicit(
        model,
        local_plates=["data"],
        encoder=encoder,
        extra_noise=1,
        hidden_dims=(3,),
        embedding_dim=2,
    )
    guide(data())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "trunk.1" not in name and "init_loc" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return guide


def names(guide: AutoImplicit) -> list[str]:
    return [name for name, p in guide.named_parameters() if p.requires_grad]


def gradient(guide: AutoImplicit) -> Tensor:
    parameters = [p for p in guide.parameters() if p.requires_grad]
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )


def encode(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.cat([x, x.square().tanh()], -1)


@pytest.mark.parametrize("encoder", [None, encode], ids=["index", "encoder"])
@pytest.mark.parametrize(
    "elbo_class", [TraceImplicit_ELBO, TraceImplicitMeanField_ELBO, TraceImplicitEnum_ELBO]
)
@pytest.mark.parametrize("batch_size", [None, B])
def test_against_the_gradient_written_out(
    float64: None, elbo_class: Any, encoder: Any, batch_size: int | None
) -> None:
    r"""log q is s^T y less the logs of both Jacobians; what belongs to rows counts N / B times."""
    guide, x = make_guide(encoder), data()
    pyro.clear_param_store()
    if batch_size is not None:  # the guide's plate is as large as at its first call
        guide._prototype_frames["data"] = guide._prototype_frames["data"]._replace(size=B)
    repeated = _Repeated(guide, poutine.trace(guide).get_trace(x, batch_size))
    trace = poutine.trace(repeated).get_trace(x, batch_size)
    index = index_of(trace)
    scale = N / len(index)
    model_trace = poutine.trace(poutine.replay(model, trace)).get_trace(x, batch_size)
    log_p = model_trace.log_prob_sum()
    log_q = torch.zeros(())
    for group, local in (("globals", False), ("plate_data", True)):
        site = f"_AutoImplicit{'_data' if local else ''}_latent"
        y = trace.nodes[site]["value"]
        part = getattr(guide.posterior, group)
        features = encode(x)[index] if encoder is not None and local else None
        rows = part.describe(features)
        if local and encoder is None:
            rows = rows[index]
        u = trace.nodes["_AutoImplicit_latent"]["value"] if local else None
        init, loc, log_scale, embedding = rows.split([*[part.dim] * 3, part.embedding_dim], -1)
        log_scale = 4.0 * log_scale + torch.tensor(0.1).log()
        _, log_det = part.map(y, init + log_scale.exp() * 4.0 * loc, log_scale, u, embedding)
        weight = scale if local else 1.0
        log_q = log_q + weight * ((-y.detach() * y).sum() - log_det.sum())
    for name, support in (("tau", constraints.positive), ("w", constraints.positive)):
        value = trace.nodes[name]["value"]
        transform = biject_to(support)
        jacobian = transform.log_abs_det_jacobian(transform.inv(value), value).sum()
        log_q = log_q - (scale if name == "w" else 1.0) * jacobian
    guide.zero_grad()
    (log_q - log_p).backward()
    expected = gradient(guide)
    elbo = elbo_class(StandardNormalScore, strict_enumeration_warning=False, max_plate_nesting=1)
    guide.zero_grad()
    elbo.loss_and_grads(model, repeated, x, batch_size)
    actual = gradient(guide)
    assert float((actual - expected).abs().max()) < 1e-10
    assert int((expected == 0).sum()) < len(expected) / 2


def index_of(trace: Any) -> Tensor:
    """Rows of a trace; without a subsample the guide keeps to itself that these are all."""
    index: Tensor = trace.nodes["data"]["value"] if "data" in trace.nodes else torch.arange(N)
    return index


class _Repeated:
    """A guide that draws what it has drawn in a trace: the same noise, and the same subsample."""

    def __init__(self, guide: AutoImplicit, trace: Any) -> None:
        self.guide = guide
        self.index = index_of(trace)
        self.y = {
            name: site["value"].detach() for name, site in trace.nodes.items() if "latent" in name
        }

    def __call__(self, *args: Any) -> Any:
        messenger = _Noise(self.index, self.y)
        with messenger:
            return self.guide(*args)


class _Noise(poutine.messenger.Messenger):
    """Gives each implicit site the noise under which its sampler has returned y.

    The sampler's first D numbers of noise are y itself while its last layer is zero.
    """

    def __init__(self, index: Tensor, y: dict[str, Tensor]) -> None:
        super().__init__()
        self.index, self.y = index, y

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "data":
            msg["value"] = self.index
        elif msg["name"] in self.y:
            y = self.y[msg["name"]]
            noise = torch.cat([y, torch.full_like(y[..., :1], 0.3)], -1)
            msg["value"] = msg["fn"]._push(noise, torch.Size())
            msg["done"] = True


BATCHES, PARTICLES = 200, 100


def batches(guide: AutoImplicit, score: Any, batch_size: int | None, encoder: Any = None) -> Tensor:
    """Gradients of 200 losses of 100 particles each, ``[200, coordinates]``."""
    x, rows = data(), []
    elbo = TraceImplicit_ELBO(
        score,
        num_score_samples=2,
        num_particles=PARTICLES,
        vectorize_particles=True,
        max_plate_nesting=1,
    )
    size = N if batch_size is None else batch_size
    guide._prototype_frames["data"] = guide._prototype_frames["data"]._replace(size=size)
    for _ in range(BATCHES):
        guide.zero_grad()
        elbo.loss_and_grads(model, guide, x, batch_size)
        rows.append(gradient(guide))
    return torch.stack(rows)


@pytest.mark.parametrize("encoder", [None, encode], ids=["index", "encoder"])
def test_subsampled_gradients_agree_with_full_ones_in_expectation(
    float64: None, standard_errors: Callable[[int], float], encoder: Any
) -> None:
    """20,000 particles each; every coordinate of the gradient is a comparison."""
    guide = make_guide(encoder)
    pyro.clear_param_store()
    full = batches(guide, StandardNormalScore, None)
    limit = standard_errors(full.shape[1])

    def worst(other: Tensor) -> float:
        variance = full.var(0) / BATCHES + other.var(0) / BATCHES
        moving = variance > 0
        # 1.03: quantiles of the t distribution with 199 degrees of freedom over the normal's
        off = (full.mean(0) - other.mean(0))[moving] / (1.03 * variance[moving].sqrt())
        assert int(moving.sum()) > len(moving) / 2
        return float(off.abs().max())

    assert worst(batches(guide, StandardNormalScore, B)) < limit
    if encoder is None:  # a score 10 % off is found out
        assert worst(batches(guide, WrongScore, B)) > limit
