# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The two maps behind an automatic guide: what they are at the start, and the Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_ardae.autoguide.sampler import ResidualSampler, TriangularMap

D, C, E = 4, 3, 2


def spread(module: torch.nn.Module) -> None:
    """Parameters as after some training, none of them zero."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("noise_dim", [D, D + 5])
def test_sampler_starts_as_its_noise(context_dim: int, noise_dim: int) -> None:
    sampler = ResidualSampler(D, context_dim, noise_dim=noise_dim)
    noise = torch.randn(7, 5, noise_dim)
    context = torch.randn(5, context_dim) if context_dim else None
    assert torch.equal(sampler.bind(context)(noise, context), noise[..., :D])


def test_sampler_uses_context_and_all_noise() -> None:
    sampler = ResidualSampler(D, C, noise_dim=D + 2)
    spread(sampler)
    noise = torch.randn(D + 2, requires_grad=True)
    context = torch.randn(C, requires_grad=True)
    y = sampler.bind(context)(noise)
    for source in (noise, context):
        gradients = [torch.autograd.grad(y[i], source, retain_graph=True)[0] for i in range(D)]
        assert bool((torch.stack(gradients) != 0).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"noise_dim": D - 1}, "at least the 4 dimensions.*got 3"),
        ({"noise_dim": D, "hidden_dims": ()}, "at least one hidden layer"),
        ({"noise_dim": D, "gain": 0.0}, "gain > 0.*got 0.0 and 3.0"),
        ({"noise_dim": D, "input_scale": -1.0}, "got 0.2 and -1.0"),
    ],
)
def test_sampler_errors(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ResidualSampler(D, **arguments)  # type: ignore[arg-type]


def arguments(batch: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    sizes = (D, D, D, C, E)
    return tuple(torch.randn(*batch, size) for size in sizes)


def test_map_starts_as_location_and_scale(float64: None) -> None:
    y, loc, log_scale, u, embedding = arguments((5,))
    z, log_det = TriangularMap(D, C, E)(y, loc, log_scale, u, embedding)
    torch.testing.assert_close(z, loc + log_scale.exp() * y)
    torch.testing.assert_close(log_det, log_scale)


@pytest.mark.parametrize("conditional", [False, True])
def test_jacobian_is_triangular_with_the_reported_diagonal(
    float64: None, conditional: bool
) -> None:
    module = TriangularMap(D, C, E) if conditional else TriangularMap(D)
    spread(module)
    y, loc, log_scale, u, embedding = arguments()
    given = (u, embedding) if conditional else (None, None)
    jacobian = torch.autograd.functional.jacobian(
        lambda at: module(at, loc, log_scale, *given)[0], y
    )
    assert float(jacobian.triu(1).abs().max()) == 0.0
    below = torch.ones(D, D).tril(-1).bool()
    assert bool((jacobian[below] != 0).all())
    log_det = module(y, loc, log_scale, *given)[1]
    torch.testing.assert_close(log_det.exp(), jacobian.diagonal())


def test_rows_and_particles_broadcast(float64: None) -> None:
    """y [P, 1, B, D], rows [B, D], u [P, 1, 1, C]: as one by one."""
    module = TriangularMap(D, C, E)
    spread(module)
    y, u = torch.randn(6, 1, 5, D), torch.randn(6, 1, 1, C)
    loc, log_scale, embedding = torch.randn(5, D), torch.randn(5, D), torch.randn(5, E)
    z, log_det = module(y, loc, log_scale, u, embedding)
    assert z.shape == log_det.shape == (6, 1, 5, D)
    one, one_log_det = module(y[2, 0, 3], loc[3], log_scale[3], u[2, 0, 0], embedding[3])
    torch.testing.assert_close(z[2, 0, 3], one)
    torch.testing.assert_close(log_det[2, 0, 3], one_log_det)


def test_runaway_scales_are_bounded(float64: None) -> None:
    module = TriangularMap(2)
    with torch.no_grad():
        module.gate.fill_(100.0)
    y = torch.tensor([10.0, 1.0])
    _, log_det = module(y, torch.zeros(2), torch.zeros(2))
    assert float(log_det[1].detach()) <= module.MAX_LOG_SCALE
