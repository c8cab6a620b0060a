# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors to compare guides on: Pyro models with their data.

==========================  ====  ==================================================================
name                        dim.  what it is
==========================  ====  ==================================================================
``schools-centred``           10  eight schools (Rubin 1981), theta drawn around mu: a funnel
``schools-noncentred``        10  the same posterior, in standardized effects
``logistic``                  31  logistic regression, breast cancer data, standardized
``intercepts``                24  20 varying intercepts; 400 rows in a subsampled plate
``banana``                     2  a Gaussian bent along a parabola (Haario et al. 1999)
``two-moons``                  2  two half rings, between which no path of high density leads
``bimodal``                    2  the means of a mixture of two equal components: they can swap
``volatility``               103  stochastic volatility, 100 days (Kim et al. 1998)
==========================  ====  ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["POSTERIORS", "SCHOOLS", "SCHOOLS_ERROR", "Draws", "Posterior"]

Draws = dict[str, Tensor]
"""Draws by site, ``[num_draws, *event]``."""

#: Effects of coaching on test scores in eight schools, and their standard errors (Rubin 1981).
SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@dataclass(frozen=True)
class Posterior:
    """A model with its data, and how its posterior is known."""

    name: str
    model: Callable[..., None]
    args: tuple[Any, ...] = ()
    """Arguments for training."""
    reference: Literal["nuts", "ancestral", "grid"] = "nuts"
    """Where reference draws come from: NUTS; the model itself, where nothing is observed; or the
    density on a grid of the plane."""
    reference_model: Callable[..., None] | None = None
    """Model of the same posterior that NUTS explores more easily; ``model`` if left out."""
    reference_args: tuple[Any, ...] | None = None
    """Its arguments, without subsampling; ``args`` if left out."""
    translate: Callable[[Draws], Draws] | None = None
    """From draws of the reference model to those of ``model``."""
    full_mass: bool = True
    """Whether NUTS adapts a full mass matrix."""
    spread: float = 0.3
    """Scale of the guides' draws on the reals before training."""
    particles: int = 32
    """Draws of the guide per training step. In the plane 256 cost no more time than 32, and with 32
    the noise of the step tips guides into one of two modes."""
    modes: Callable[[Tensor], Tensor] | None = None
    """Draws ``[n, dim]`` to the index of the mode, 0 or 1, of a posterior with two."""
    shown: tuple[str, ...] = ()
    """Coordinates in the pair plot, like ``"theta[0]"``."""


def schools_centred(y: Tensor, error: Tensor) -> None:
    """Eight schools with the effects drawn around mu."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def schools_noncentred(y: Tensor, error: Tensor) -> None:
    """Eight schools with standardized effects."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, error), obs=y)


def _centre(draws: Draws) -> Draws:
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * draws["eta"]}


def logistic(x: Tensor, y: Tensor) -> None:
    """Logistic regression with standard normal priors."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    logits = intercept + (x * weight).sum(-1)  # weight is [30], or [particles, 1, 30]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def intercepts(x: Tensor, group: Tensor, y: Tensor, subsample_size: int | None = None) -> None:
    """Linear regression with an intercept for each group; the rows are subsampled."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("group", int(group.max()) + 1):
        intercept = pyro.sample("intercept", dist.Normal(mean, spread))
    with pyro.plate("row", len(y), subsample_size=subsample_size) as rows:
        loc = intercept[..., group[rows]] + slope * x[rows]
        pyro.sample("y", dist.Normal(loc, noise), obs=y[rows])


def banana() -> None:
    """A density of the plane, without data."""
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.5))
    pyro.sample("z2", dist.Normal(0.5 * z1**2 - 1.0, 0.4))


def two_moons(distance: Tensor, width: Tensor) -> None:
    """A point of the plane, observed by its distance from the origin and from one axis."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    # The gradient of the root is infinite at the origin.
    radius = (z.square().sum(-1) + 1e-12).sqrt()
    pyro.sample("distance", dist.Normal(radius, 0.2), obs=distance)
    pyro.sample("width", dist.Normal(z[..., 0].abs(), 0.3), obs=width)


def bimodal(y: Tensor) -> None:
    """The means of two components of equal weight and known width."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    components = dist.Normal(mean, 1.0)
    weights = dist.Categorical(probs=torch.full((2,), 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, components), obs=y)


def volatility(returns: Tensor) -> None:
    """Log-variances that follow an AR(1), in standardized innovations."""
    mu = pyro.sample("mu", dist.Normal(-1.0, 1.0))
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
    days = len(returns)
    z = pyro.sample("z", dist.Normal(returns.new_zeros(days), 1.0).to_event(1))
    h = mu.unsqueeze(-1) + sigma.unsqueeze(-1) * _ar1(phi, z)
    # A guide at its start may draw log-variances whose exponentials overflow.
    scale = (h.clamp(-20.0, 20.0) / 2).exp()
    pyro.sample("returns", dist.Normal(0.0, scale).to_event(1), obs=returns)


def _ar1(phi: Tensor, innovations: Tensor) -> Tensor:
    """Innovations ``[*, days]`` to a stationary AR(1) of which each adds 1 to the scale.

    The sum over all lags s of phi^s by doubling, in log2(days) shifts and no loop over days:
    1 + phi S + phi^2 S^2 + ... = (1 + phi S)(1 + phi^2 S^2)(1 + phi^4 S^4)...
    """
    phi = phi.clamp(1e-4, 1 - 1e-6).unsqueeze(-1)  # both ends round to values without a root
    first, *rest = innovations.split([1, innovations.shape[-1] - 1], -1)
    h = torch.cat([first * (1 - phi**2).rsqrt(), *rest], -1)
    lag = 1
    while lag < h.shape[-1]:
        h = h + phi**lag * F.pad(h[..., :-lag], (lag, 0))
        lag *= 2
    return h


def _breast_cancer() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = torch.as_tensor(x)
    return ((x - x.mean(0)) / x.std(0)).float(), torch.as_tensor(y).float()


def _intercepts_data() -> tuple[Tensor, Tensor, Tensor]:
    """400 rows in 20 groups of unequal size, drawn from the model."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(20, generator=generator) + 0.1
    group = torch.multinomial(share, 400, replacement=True, generator=generator)
    group[:20] = torch.arange(20)
    intercept = 1.0 + 0.8 * torch.randn(20, generator=generator)
    x = torch.randn(400, generator=generator)
    noise = torch.randn(400, generator=generator)
    return x, group, intercept[group] - 0.7 * x + noise


def _bimodal_data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(40, generator=generator)
    y[:20] += 1.5
    y[20:] -= 1.5
    return y


def _returns() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(100, generator=generator)
    h = -1.0 + 0.3 * _ar1(torch.tensor(0.95), z)
    return torch.randn(100, generator=generator) * (h / 2).exp()


def _schools(centred: bool) -> Posterior:
    return Posterior(
        "schools-centred" if centred else "schools-noncentred",
        schools_centred if centred else schools_noncentred,
        (SCHOOLS, SCHOOLS_ERROR),
        reference_model=schools_noncentred,
        translate=_centre if centred else None,
        full_mass=False,
        shown=("mu", "tau", "theta[0]" if centred else "eta[0]"),
    )


def _intercepts() -> Posterior:
    data = _intercepts_data()
    return Posterior(
        "intercepts",
        intercepts,
        (*data, 100),
        reference_args=data,
        shown=("mean", "spread", "noise", "intercept[0]"),
    )


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "schools-centred": lambda: _schools(centred=True),
    "schools-noncentred": lambda: _schools(centred=False),
    "logistic": lambda: Posterior(
        "logistic", logistic, _breast_cancer(), shown=("intercept", "weight[0]", "weight[2]")
    ),
    "intercepts": _intercepts,
    "banana": lambda: Posterior(
        "banana", banana, reference="ancestral", particles=256, shown=("z1", "z2")
    ),
    "two-moons": lambda: Posterior(
        "two-moons",
        two_moons,
        (torch.tensor(2.0), torch.tensor(2.0)),
        reference="grid",
        spread=2.0,
        particles=256,
        modes=lambda z: (z[:, 0] > 0).long(),
        shown=("z[0]", "z[1]"),
    ),
    "bimodal": lambda: Posterior(
        "bimodal",
        bimodal,
        (_bimodal_data(),),
        reference="grid",
        spread=2.0,
        particles=256,
        modes=lambda z: (z[:, 0] > z[:, 1]).long(),
        shown=("mean[0]", "mean[1]"),
    ),
    "volatility": lambda: Posterior(
        "volatility",
        volatility,
        (_returns(),),
        full_mass=False,
        shown=("mu", "phi", "sigma", "z[0]"),
    ),
}
"""Posteriors by name: each call makes one."""
