# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AbsTransform, ExpTransform
from torch import Size, Tensor, nn

from pyro_ardae import Implicit
from pyro_ardae.implicit import find_implicit


def affine(eps: Tensor, context: Tensor) -> Tensor:
    return 2 * eps + context


@pytest.mark.parametrize("batch", [(), (5,), (3, 1, 2)])
@pytest.mark.parametrize("sample", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dim", [1, 3])
def test_shapes_with_context(batch: tuple[int, ...], sample: tuple[int, ...], dim: int) -> None:
    q = Implicit(affine, dim, torch.randn(*batch, dim))
    assert q.batch_shape == batch
    assert q.event_shape == (dim,)
    assert q.rsample(sample).shape == sample + batch + (dim,)
    assert q.sample(sample).shape == sample + batch + (dim,)


def test_shapes_without_context() -> None:
    q = Implicit(lambda eps: eps.sum(-1), 3, event_shape=())
    assert q.batch_shape == ()
    assert q.event_shape == ()
    assert q.rsample((6,)).shape == (6,)
    matrix = Implicit(lambda eps: eps.unflatten(-1, (2, 2)), 4, event_shape=(2, 2))
    assert matrix.rsample((6,)).shape == (6, 2, 2)
    assert matrix.expand((3,)).rsample((6,)).shape == (6, 3, 2, 2)


def test_batch_shape_of_noise_and_context_broadcast() -> None:
    noise = dist.Normal(torch.zeros(4, 1, 2), 1.0).to_event(1)
    assert Implicit(affine, noise, torch.randn(3, 2)).batch_shape == (4, 3)


def test_draws_and_gradients_are_the_samplers(float64: None) -> None:
    scale, context = torch.tensor(1.5, requires_grad=True), torch.randn(7, 2, requires_grad=True)
    noise_loc = torch.zeros(2, requires_grad=True)
    q = Implicit(lambda e, c: scale * e + c, dist.Normal(noise_loc, 1.0).to_event(1), context)
    state = torch.get_rng_state()
    z = q.rsample((4,))
    torch.set_rng_state(state)
    eps = dist.Normal(torch.zeros(7, 2), 1.0).sample((4,))
    assert torch.equal(z, scale * eps + context)
    z.sum().backward()
    torch.testing.assert_close(scale.grad, eps.sum())
    torch.testing.assert_close(context.grad, torch.full((7, 2), 4.0))
    torch.testing.assert_close(noise_loc.grad, torch.full((2,), 4 * 7 * 1.5))
    assert not q.sample().requires_grad


def test_expand_gives_new_rows_noise_of_their_own() -> None:
    context = torch.randn(5, 2)
    q = Implicit(affine, 2, context).expand((3, 5))
    assert q.batch_shape == (3, 5)
    assert torch.equal(q.context, context.expand(3, 5, 2))
    z = q.sample()
    assert not torch.equal(z[0], z[1])
    with pytest.raises(RuntimeError):
        q.expand((3, 4))


def test_flat_draws_and_the_output_for_zero_noise() -> None:
    context = torch.randn(5, 2, requires_grad=True)
    q = Implicit(affine, 2, context)
    torch.manual_seed(0)
    draws, center = q.flat_draws(4, center=True)
    torch.manual_seed(0)
    alone, none = q.flat_draws(4, center=False)
    assert none is None
    assert center is not None
    assert torch.equal(draws, alone)
    assert torch.equal(center, context)  # affine adds it to the noise
    assert not draws.requires_grad
    assert not center.requires_grad


def test_no_flat_draws() -> None:
    def refuse_nothing(noise: Tensor, context: Tensor) -> Tensor:
        assert noise.numel()
        return affine(noise, context)

    q = Implicit(refuse_nothing, 2, torch.randn(5, 2))
    draws, center = q.flat_draws(0, center=False)
    assert draws.shape == (0, 5, 2)
    assert center is None
    draws, center = q.flat_draws(0, center=True)
    assert draws.shape == (0, 5, 2)
    assert center is not None
    assert torch.equal(center, q.flat_draws(3, center=True)[1])


def test_flat_draws_of_a_scalar_and_of_a_matrix() -> None:
    scalar = Implicit(lambda e: e.squeeze(-1), 1, None, ())
    assert scalar.flat_draws(4, center=False)[0].shape == (4, 1)
    noise = torch.distributions.Normal(torch.zeros(5, 3, 2), 1.0)
    matrix = Implicit(lambda e: e, torch.distributions.Independent(noise, 2))
    assert [x.shape for x in matrix.flat_draws(4, center=True) if x is not None] == [
        (4, 5, 6),
        (5, 6),
    ]


def test_to_takes_dtype_of_the_context() -> None:
    assert (
        Implicit(affine, 2, torch.randn(5, 2, dtype=torch.float64)).sample().dtype == torch.float64
    )


@pytest.mark.parametrize("wrap", ["independent", "mask", "transform", "expand_by", "all"])
def test_found_under_wrappers(wrap: str) -> None:
    q = Implicit(affine, 2, torch.randn(5, 2))
    wrapped = {
        "independent": lambda: q.to_event(1),
        "mask": lambda: q.mask(False),
        "transform": lambda: dist.TransformedDistribution(q, [ExpTransform()]),
        "expand_by": lambda: q.expand_by((3,)),
        "all": lambda: dist.TransformedDistribution(q, [ExpTransform()]).to_event(1).mask(True),
    }[wrap]()
    found = find_implicit(wrapped)
    assert found is not None
    assert found.sampler is affine


def test_not_found_in_other_distributions() -> None:
    assert find_implicit(dist.Normal(torch.zeros(3), 1.0).to_event(1)) is None
    assert find_implicit(dist.LogNormal(0.0, 1.0)) is None


def test_not_found_where_the_value_of_its_density_is_needed() -> None:
    q = Implicit(lambda eps: eps[..., 0], 2, event_shape=())
    assert find_implicit(dist.TransformedDistribution(q, [AbsTransform()])) is None
    assert find_implicit(dist.FoldedDistribution(q)) is None


def test_noise_without_context_is_like_the_samplers_parameters() -> None:
    q = Implicit(nn.Linear(3, 2, dtype=torch.float64), 3, event_shape=(2,))
    assert q.rsample().dtype == torch.float64
    assert Implicit(lambda eps: eps, 3).rsample().dtype == torch.float32


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 2)])
def test_surrogate_is_zero_with_the_scores_gradient(
    float64: None, event_shape: tuple[int, ...]
) -> None:
    q = Implicit(
        lambda e: e, dist.Normal(torch.zeros(5, *event_shape), 1.0).to_event(len(event_shape))
    )
    score = torch.randn(4, 5, *event_shape)
    q.score = lambda fn, at: score
    z = torch.randn(4, 5, *event_shape, requires_grad=True)
    log_prob = q.log_prob(z)
    assert torch.equal(log_prob, torch.zeros(4, 5))
    weights = torch.randn(4, 5)
    (weights * log_prob).sum().backward()
    expected = weights.reshape(4, 5, *[1] * len(event_shape)) * score
    torch.testing.assert_close(z.grad, expected, rtol=0, atol=1e-15)


def test_surrogate_under_a_transform_carries_the_jacobian(float64: None) -> None:
    """log q(y) of y = exp(z): the gradient is (score(z) - 1) dz/dy, its value the Jacobian's."""
    q = Implicit(lambda e: e, 3)
    q.score = lambda fn, at: -at
    y = dist.TransformedDistribution(q, [ExpTransform()])
    value = torch.rand(3).add(0.5).requires_grad_()
    log_prob = y.log_prob(value)
    torch.testing.assert_close(log_prob, -value.log().sum())
    log_prob.backward()
    torch.testing.assert_close(value.grad, (-value.log() - 1) / value.detach())


def test_support_is_real() -> None:
    q = Implicit(lambda e: e, 3)
    assert q.support.event_dim == 1
    assert bool(q.support.check(torch.randn(3)))
    assert Implicit(lambda e: e[..., 0], 3, event_shape=()).support.event_dim == 0


def test_wrappers_keep_event_dims() -> None:
    q = Implicit(affine, 2, torch.randn(5, 2)).to_event(1)
    assert q.batch_shape == ()
    assert q.event_shape == (5, 2)
    assert q.rsample(Size((3,))).shape == (3, 5, 2)


def test_distinct_rows_of_an_expanded_distribution() -> None:
    """Leading repeats (particles, plates around a global site) are undone, others are kept."""
    context = torch.randn(3, 2)
    q = Implicit(lambda eps, c: eps + c, 2, context)
    assert q.distinct() is q
    assert q.expand([4, 3]).distinct() is q
    assert q.expand([4, 3]).expand([5, 4, 3]).distinct() is q
    scalar = Implicit(lambda eps: eps, 2)
    assert scalar.expand([7]).distinct() is scalar
    column = Implicit(lambda eps, c: eps + c, 2, context.unsqueeze(1))
    wide = column.expand([3, 4])
    assert wide.distinct() is wide
