# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Guide heads: densities against independent ones, gradients with exact scores, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from models.chain import Chain
from models.flows import FlowGuide
from models.guides import DeviatingGuide, FullCovarianceGuide, GaussianGuide
from models.hierarchical_guide import HierarchicalGuide
from models.vae import VAE
from pyro_ardae import TraceImplicit_ELBO
from pyro_ardae.implicit import find_implicit
from tests.pyro_ardae.oracle import Oracle

FEATURES, LATENT, AUXILIARY, BATCH = 6, 3, 4, 5


def disturb(module: nn.Module, *, by: float = 0.3) -> None:
    """Away from the start, where most layers that matter are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def dense_log_prob(value: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
    """Of a Normal, with inverse and determinant written out."""
    error = value - loc
    square = torch.einsum("...i,...ij,...j->...", error, torch.linalg.inv(covariance), error)
    log_det = torch.linalg.slogdet(covariance)[1]
    return -0.5 * (square + log_det + value.shape[-1] * math.log(2 * math.pi))


def test_full_covariance_density(float64: None) -> None:
    head = FullCovarianceGuide(FEATURES, LATENT)
    disturb(head)
    features = torch.randn(BATCH, FEATURES)
    posterior = head(features)
    assert (posterior.batch_shape, posterior.event_shape) == ((BATCH,), (LATENT,))
    entries = head.gain * head.factor(features)
    lower = torch.eye(LATENT).repeat(BATCH, 1, 1)
    lower[:, 1, 0], lower[:, 2, 0], lower[:, 2, 1] = entries.unbind(-1)
    factor = head.log_scale(features).exp().unsqueeze(-1) * lower
    value = torch.randn(7, BATCH, LATENT)
    expected = dense_log_prob(value, head.loc(features), factor @ factor.mT)
    torch.testing.assert_close(posterior.log_prob(value), expected)
    for shape in ((), (7,), (2, 7)):
        draw = posterior.rsample(shape)  # its noise is kept: no solve
        assert draw.shape == (*shape, BATCH, LATENT)
        torch.testing.assert_close(posterior.log_prob(draw), posterior.log_prob(draw.clone()))


def test_full_covariance_starts_diagonal() -> None:
    head = FullCovarianceGuide(FEATURES, LATENT)
    features = torch.randn(BATCH, FEATURES)
    value = torch.randn(BATCH, LATENT)
    diagonal = GaussianGuide.forward(head, features)
    torch.testing.assert_close(head(features).log_prob(value), diagonal.log_prob(value))


def test_flow_density_is_that_of_the_map(float64: None) -> None:
    """Of a draw by the Jacobian of noise to latent, and of any value by the inverse."""
    head = FlowGuide(FEATURES, LATENT, transforms=2, hidden_dims=(8,))
    disturb(head, by=0.5)
    features = torch.randn(1, FEATURES)
    posterior = head(features)
    draw = posterior.rsample((6,))
    assert draw.shape == (6, 1, LATENT)
    log_prob = posterior.log_prob(draw)
    scale = head.base.log_scale(features).exp()
    loc = head.base.loc(features)

    def push(noise: Tensor) -> Tensor:
        return (loc + scale * posterior.flow.transform.inv(noise.unsqueeze(0))).squeeze(0)

    for z, of_draw in zip(draw[:, 0], log_prob[:, 0], strict=True):
        noise = posterior.flow.transform((z - loc) / scale).squeeze(0)
        torch.testing.assert_close(push(noise), z)
        jacobian = torch.autograd.functional.jacobian(push, noise)
        of_noise = dist.Normal(0.0, 1.0).log_prob(noise).sum()
        torch.testing.assert_close(of_draw, of_noise - torch.linalg.slogdet(jacobian)[1])
    torch.testing.assert_close(posterior.log_prob(draw.clone()), log_prob)
    wide = posterior.expand((2, 1))
    torch.testing.assert_close(wide.log_prob(draw[:2]), log_prob[:2])


def linear_normal(weight: Tensor) -> Callable[[Tensor], dist.TorchDistribution]:
    return lambda a: dist.Normal(a @ weight, 0.7).to_event(1)


@pytest.mark.parametrize("second_in_front", [False, True])
def test_chain_of_normals_is_their_joint(float64: None, second_in_front: bool) -> None:
    weight, scale = torch.randn(2, 3), torch.tensor([0.5, 1.5])
    first = dist.Normal(torch.ones(2), scale).to_event(1).expand((BATCH,))
    chain = Chain(first, linear_normal(weight), second_dim=3, second_in_front=second_in_front)
    assert (chain.batch_shape, chain.event_shape) == ((BATCH,), (5,))
    mix = torch.cat([torch.eye(2), weight], 1)  # of a, in the order (a, b)
    own = torch.diag(torch.tensor([0.0, 0, 1, 1, 1]) * 0.7**2)
    covariance = mix.mT @ torch.diag(scale**2) @ mix + own
    loc = torch.ones(2) @ mix
    order = torch.tensor([2, 3, 4, 0, 1] if second_in_front else [0, 1, 2, 3, 4])
    value = chain.rsample((7,))
    expected = dense_log_prob(value, loc[order], covariance[order][:, order])
    torch.testing.assert_close(chain.log_prob(value), expected)


def hierarchical(
    activation: type[nn.Module] = nn.SiLU, base: type[GaussianGuide] = GaussianGuide
) -> HierarchicalGuide:
    head = HierarchicalGuide(
        FEATURES,
        LATENT,
        base=base(FEATURES, LATENT),
        auxiliary_dim=AUXILIARY,
        hidden_dims=(8,),
        activation=activation,
    )
    disturb(head)
    return head


def test_hierarchical_marginal_is_that_of_the_two_normals(float64: None) -> None:
    """The same noise through the implicit marginal, and through one Normal after the other."""
    head = hierarchical()
    features = torch.randn(BATCH, FEATURES)
    implicit = find_implicit(head(features))
    assert implicit is not None
    noise = implicit.noise.sample((7,))
    z = head(features).transforms[0](implicit.sampler(noise, features))
    auxiliary, own = noise.split([AUXILIARY, LATENT], -1)
    conditional = head.conditional(features, auxiliary).base_dist
    torch.testing.assert_close(z, conditional.loc + conditional.scale * own)
    mixing = head.mixing(features).base_dist
    torch.testing.assert_close(implicit.noise.base_dist.loc[:, :AUXILIARY], mixing.loc)
    torch.testing.assert_close(implicit.noise.base_dist.scale[:, :AUXILIARY], mixing.scale)


def test_a_full_base_has_no_diagonal_conditional() -> None:
    head = hierarchical(base=FullCovarianceGuide)
    with pytest.raises(TypeError, match="diagonal base, GaussianGuide, got FullCovarianceGuide"):
        head.conditional(torch.randn(BATCH, FEATURES), torch.randn(BATCH, AUXILIARY))


def test_hierarchical_starts_as_its_gaussian() -> None:
    head = HierarchicalGuide(FEATURES, LATENT, auxiliary_dim=AUXILIARY, hidden_dims=(8,))
    features = torch.randn(BATCH, FEATURES)
    conditional = head.conditional(features, torch.randn(BATCH, AUXILIARY))
    value = torch.randn(BATCH, LATENT)
    torch.testing.assert_close(conditional.log_prob(value), head.base(features).log_prob(value))


class _Linear(nn.Module):
    """p(x | z) = N(x; W z, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LATENT, FEATURES))

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z @ self.weight, 1.0).to_event(1)


@pytest.mark.parametrize("base", [GaussianGuide, FullCovarianceGuide])
def test_gradient_of_the_hierarchical_marginal_with_its_exact_score(
    float64: None, base: type[GaussianGuide]
) -> None:
    """With the identity for activation and a constant scale the marginal is Gaussian."""
    head = hierarchical(nn.Identity, base)
    with torch.no_grad():  # b = 0: the conditional's scale is that of the base
        head.net.net.last.weight[LATENT:] = 0
        head.net.net.last.bias[LATENT:] = 0
    vae = VAE(nn.Linear(FEATURES, FEATURES), head, _Linear(), latent_dim=LATENT)
    x = torch.randn(BATCH, FEATURES)

    def moments(features: Tensor) -> tuple[Tensor, Tensor]:
        """Of y, the implicit part, by hand."""
        auxiliary = head.auxiliary(features).base_dist
        projected = head.net.project(features)
        loc = head._inner(auxiliary.loc, projected)[0]
        net = head.net
        weight = net.net.last.weight[:LATENT] @ net.from_input.last.weight * head.gain
        covariance = (weight * auxiliary.scale.square().unsqueeze(-2)) @ weight.mT
        return loc, covariance + torch.eye(LATENT)

    def score(y: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        loc, covariance = moments(context)
        return -torch.linalg.solve(covariance, (y - loc).unsqueeze(-1)).squeeze(-1)

    elbo = TraceImplicit_ELBO(
        lambda dim, width: Oracle(dim, width, score), num_score_samples=2, max_plate_nesting=1
    )
    torch.manual_seed(3)
    elbo.loss_and_grads(vae.model, vae.guide, x)
    found = {name: p.grad for name, p in vae.named_parameters()}
    vae.zero_grad(set_to_none=True)

    torch.manual_seed(3)
    z = vae.posterior(x).rsample()
    features = vae.trunk(x)
    normal_loc, normal_scale = head.base.moments(features)
    factor = torch.eye(LATENT)
    if isinstance(head.base, FullCovarianceGuide):
        entries = head.base.gain * head.base.factor(features)
        rows, columns = torch.tril_indices(LATENT, LATENT, -1)
        factor = torch.eye(LATENT).repeat(BATCH, 1, 1)
        factor[:, rows, columns] = entries
    matrix = normal_scale.unsqueeze(-1) * factor
    # The path gradient: the density's own parameters are held fixed, but for the transform's.
    y = torch.linalg.solve(matrix, (z - normal_loc).unsqueeze(-1)).squeeze(-1)
    loc, covariance = (moment.detach() for moment in moments(features))
    log_q = dense_log_prob(y, loc, covariance) - torch.linalg.slogdet(matrix)[1]
    (log_q - vae.log_joint(x, z)).sum().backward()
    for name, parameter in vae.named_parameters():
        expected = parameter.grad
        assert expected is not None, name
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], expected, atol=1e-10, rtol=1e-10)


def deviating(*, noise_dim: int, by: float) -> DeviatingGuide:
    base = FullCovarianceGuide(FEATURES, LATENT)
    head = DeviatingGuide(base, FEATURES, LATENT, noise_dim=noise_dim, hidden_dims=(8, 8))
    disturb(base)
    disturb(head.net, by=by)
    return head


def test_deviation_is_a_contraction_whatever_its_weights(float64: None) -> None:
    head = deviating(noise_dim=5, by=30.0)
    features = torch.randn(BATCH, FEATURES)
    implicit = find_implicit(head(features))
    assert implicit is not None
    context = implicit.context
    one, near = torch.randn(500, BATCH, 5), 1e-3 * torch.randn(500, BATCH, 5)
    for other in (one + near, torch.randn(500, BATCH, 5)):
        moved = implicit.sampler(other, context) - implicit.sampler(one, context)
        own = (other - one)[..., :LATENT]
        ratio = (moved - own).norm(dim=-1) / (other - one).norm(dim=-1)
        assert ratio.max() < head.gain
    assert ratio.max() > 1e-3  # there is a deviation


def to_a_narrow_normal(z: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weight ``[B]`` of draws ``[S, B, D]`` to a density, exactly 1, and its error."""
    centred = z - z.mean(0)
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / len(z)
    narrow = dist.MultivariateNormal(z.mean(0), 0.5 * covariance)
    weights = (narrow.log_prob(z) - log_q).exp()
    return weights.mean(0), weights.std(0) / len(z) ** 0.5


def test_density_of_conditional_draws(float64: None) -> None:
    """Without further noise it is the guide's own: weights to any density have mean 1."""
    head = deviating(noise_dim=LATENT, by=1.0)
    features = torch.randn(BATCH, FEATURES)
    torch.manual_seed(1)
    z, log_q = head.conditional_draws(features, torch.Size((20_000,)))
    assert z.shape == (20_000, BATCH, LATENT)
    assert log_q.shape == (20_000, BATCH)
    mean, error = to_a_narrow_normal(z, log_q)
    assert ((mean - 1).abs() < 5 * error).all()
    assert error.max() < 0.05
    # Without the determinant of the deviation they would not.
    gaussian = head.base.transform(features)
    noise_alone = dist.Normal(0.0, 1.0).log_prob(gaussian.inv(z)).sum(-1)
    assert (log_q - noise_alone).std() > 0.05


def shifting() -> DeviatingGuide:
    """Its draws are Normal, moved by the rest of their noise as far as its gain allows."""
    base = GaussianGuide(FEATURES, LATENT)
    head = DeviatingGuide(base, FEATURES, LATENT, noise_dim=2 * LATENT, hidden_dims=(LATENT,))
    disturb(base)
    with torch.no_grad():
        head.net.project.weight.zero_()
        head.net.project.bias.fill_(20.0)  # where SiLU is the identity
        head.net.first.weight.copy_(torch.eye(2 * LATENT)[LATENT:])
        head.net.layers[-1].weight.copy_(torch.eye(LATENT))
    return head


@pytest.mark.parametrize("kind", [deviating, shifting, hierarchical])
def test_density_of_draws_averaged_over_the_rest_of_the_noise(
    float64: None, kind: Callable[..., DeviatingGuide | HierarchicalGuide]
) -> None:
    """Weights to any density have mean 1 at every K."""
    torch.manual_seed(0)
    head = deviating(noise_dim=LATENT + 3, by=3.0) if kind is deviating else kind()
    features = torch.randn(BATCH, FEATURES)
    for num_mixing in (2, 20):
        z, log_q = head.conditional_draws(features, torch.Size((10_000,)), num_mixing=num_mixing)
        mean, error = to_a_narrow_normal(z, log_q)
        assert ((mean - 1).abs() < 5 * error).all()
        assert error.max() < 0.05


def test_density_of_averaged_draws_is_between_two_that_are_known(float64: None) -> None:
    """Of draws w = own + s rest in each coordinate, log q has the mean -log(2 pi e (1 + s^2)) / 2,
    and, given the rest, -log(2 pi e) / 2.
    """
    torch.manual_seed(0)
    head = shifting()
    features = torch.randn(BATCH, FEATURES)
    transform = head.base.transform(features)
    means = []
    for num_mixing in (0, 4, 200):
        z, log_q = head.conditional_draws(features, torch.Size((4_000,)), num_mixing=num_mixing)
        log_q = log_q + transform.log_abs_det_jacobian(transform.inv(z), z)
        means.append(log_q.mean() / LATENT)
    error = 5 * log_q.std() / log_q.numel() ** 0.5 / LATENT
    # Identities are over their bounds, r^(1/16) with r singular values of 1.
    slope = head.gain * head.net.factor * LATENT ** (-2 / 16)
    given, exact = (-0.5 * math.log(2 * math.pi * math.e * (1 + s**2)) for s in (0, slope))
    assert abs(means[0] - given) < error
    assert given - exact > 3 * error
    assert means[0] > means[1] > means[2] - error
    assert exact - error < means[2] < exact + error + 0.01


def test_conditional_draws_of_the_hierarchical_guide(float64: None) -> None:
    head = hierarchical()
    features = torch.randn(BATCH, FEATURES)
    torch.manual_seed(1)
    z, log_q = head.conditional_draws(features, torch.Size((7,)))
    torch.manual_seed(1)
    conditional = head.conditional(features, head.mixing(features).sample((1, 7))[0])
    torch.testing.assert_close(conditional.log_prob(z), log_q)
