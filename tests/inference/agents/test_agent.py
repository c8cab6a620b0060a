# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The agent: gradients against those derived by hand, targets, temperature, state."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from inference.agents.agent import Agent
from inference.agents.build import build_policy
from inference.agents.options import Config, check
from inference.agents.policy import ExplicitPolicy, ImplicitPolicy, Proposal
from inference.agents.replay import Batch
from inference.shared.errors import UserError
from models.actors import GaussianActor, log_tanh_slope
from models.critics import TwinCritic
from models.implicit_actor import Encoded, ImplicitActor
from pyro_ardae.score import ARDAE, ScoreEstimator
from tests.conftest import assert_equal

SMALL = {"hidden_dims": (16,), "noise_hidden_dims": (16,), "noise_dim": 3, "batch_size": 8}


class Oracle(ScoreEstimator):
    """The exact score and density of the y of a linear actor: N(0, A A^T) in every state."""

    def __init__(self, actor: LinearActor) -> None:
        super().__init__(actor.action_dim, actor.obs_dim)
        self.actor = [actor]

    def _normal(self) -> MultivariateNormal:
        factor = self.actor[0].factor.detach()
        return MultivariateNormal(torch.zeros(self.dim), factor @ factor.mT)

    def update(
        self, samples: Tensor, context: Tensor | None = None, *, center: Any = None
    ) -> Tensor:
        return torch.zeros(())

    def forward(
        self, value: Tensor, samples: Tensor, context: Tensor | None = None, *, center: Any = None
    ) -> Tensor:
        return -value @ self._normal().precision_matrix

    def log_prob(
        self, value: Tensor, samples: Tensor, context: Tensor | None = None, *, center: Any = None
    ) -> Tensor:
        return self._normal().log_prob(value)

    def score_and_log_prob(
        self, value: Tensor, samples: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self(value, samples), self.log_prob(value, samples)


class LinearActor(nn.Module):
    """z = loc(s) + exp(log_scale(s)) y, y = A noise: a normal, by the interface of an implicit. Its
    two parts are the same."""

    num_parts, part_scale = 2, 0.0

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.obs_dim, self.action_dim, self.seen_dim = obs_dim, action_dim, obs_dim
        self.loc = nn.Parameter(0.5 * torch.randn(obs_dim, action_dim))
        self.log_scale = nn.Parameter(0.3 * torch.randn(obs_dim, action_dim))
        noise = torch.randn(action_dim, action_dim)
        self.factor = nn.Parameter(torch.eye(action_dim) + 0.2 * noise)
        self.fixed: Tensor | None = None
        self.codes = torch.tensor([[1.0], [-1.0]])
        self.spots = torch.full((1, action_dim), self.part_scale)

    def encode(self, obs: Tensor) -> Encoded:
        log_weights = torch.full((*obs.shape[:-1], 2), -math.log(2))
        return Encoded(obs @ self.loc, obs @ self.log_scale, log_weights, obs)

    def choose(self, encoded: Encoded, num_draws: int = 1) -> Tensor:
        return torch.randint(2, (num_draws, *encoded.loc.shape[:-1]))

    def place(self, encoded: Encoded, part: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(encoded.loc).expand(*part.shape, -1)
        return nothing, nothing

    def deviate(self, encoded: Encoded, part: Tensor, noise: Tensor) -> Tensor:
        return noise @ self.factor.mT

    def noise(self, obs: Tensor, num_draws: int = 1) -> Tensor:
        if self.fixed is not None:
            times = -(-len(obs) // self.fixed.shape[1])
            return self.fixed.repeat(num_draws, times, 1)[:, : len(obs)]
        return torch.randn(num_draws, *obs.shape[:-1], self.action_dim)


class Quadratic(nn.Module):
    """Two action values with a known gradient: -|a - t_j s|^2."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.targets = nn.Parameter(torch.randn(2, obs_dim, action_dim))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return -(action - obs @ self.targets).square().sum(-1)


def linear_agent(config: Config, obs_dim: int = 3, action_dim: int = 2) -> tuple[Agent, Any]:
    actor: Any = LinearActor(obs_dim, action_dim)
    policy = ImplicitPolicy(
        actor, Oracle(actor), num_draws=4, bound=config.bound, learning_rate=0.0
    )
    return Agent(policy, Quadratic(obs_dim, action_dim), config), actor


@pytest.mark.usefixtures("float64")
def test_policy_gradient_by_hand() -> None:
    """d/dtheta E[alpha log pi - min Q] along the draw, the density's own parameters held fixed."""
    config = Config(agent="sac-ardae", alpha=0.7, auto_alpha=False, bound=1e9)
    agent, actor = linear_agent(config)
    obs = torch.randn(6, 3)
    actor.fixed = 0.3 * torch.randn(1, 6, 2)  # within the bound of y
    noise = actor.fixed[0]
    agent.actor_optimizer = torch.optim.SGD(actor.parameters(), 1.0)
    loc, log_scale, factor = (one.detach().clone() for one in actor.parameters())
    agent.policy.GAUGE = 0.0
    agent.update_actor(obs, agent.policy.fit(obs))

    scale, y = (obs @ log_scale).exp(), noise @ factor.mT
    z = obs @ loc + scale * y
    a = z.tanh()
    score = -(torch.linalg.inv(factor @ factor.mT) @ y.mT).mT
    targets = obs @ agent.critic.targets.detach()  # [2, 6, D]
    values = -(a - targets).square().sum(-1)
    nearest = targets[values.argmin(0), torch.arange(6)]
    of_q = -2 * (a - nearest) * (1 - a.square())
    # By z: minus the gradient of sum log(1 - tanh^2), and that of Q.
    of_z = (0.7 * 2 * a - of_q) / 6
    of_y = of_z * scale + 0.7 * score / 6
    of_log_scale = of_z * scale * y - 0.7 / 6
    assert torch.allclose(loc - actor.loc, obs.mT @ of_z, rtol=0, atol=1e-10)
    assert torch.allclose(log_scale - actor.log_scale, obs.mT @ of_log_scale, rtol=0, atol=1e-10)
    assert torch.allclose(factor - actor.factor, of_y.mT @ noise, rtol=0, atol=1e-10)


class TwoParts(LinearActor):
    """As above with A = 1, and parts that differ: z is a mixture of normals."""

    part_scale = 0.6

    def choose(self, encoded: Encoded, num_draws: int = 1) -> Tensor:
        return torch.tensor([0, 0, 1, 1]).expand(num_draws, -1)

    def place(self, encoded: Encoded, part: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.part_scale * self.codes[part]
        return loc, 0.5 * math.log1p(-(self.part_scale**2)) + 0 * loc


@pytest.mark.usefixtures("float64")
def test_log_pi_and_gradient_of_a_mixture_by_hand() -> None:
    """The posterior of the parts starts with that of this mixture, so everything is exact."""
    actor: Any = TwoParts(3, 1)
    with torch.no_grad():
        actor.factor.fill_(1.0)
    config = Config(agent="sac-ardae", alpha=0.7, auto_alpha=False, bound=1e9)
    policy = ImplicitPolicy(
        actor, Oracle(actor), num_draws=4, bound=1e9, learning_rate=0.0, even_share=0.0
    )
    policy.GAUGE = 0.0
    obs = torch.randn(4, 3)
    actor.fixed = torch.randn(1, 4, 1).clamp(-2, 2)
    b, y = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(4, 1), actor.fixed[0]
    mean, std = 0.6, 0.8

    loc, log_scale = obs @ actor.loc, obs @ actor.log_scale
    z = loc + log_scale.exp() * (mean * b + std * y)
    u = ((z - loc.detach()) / log_scale.detach().exp()).squeeze(-1)
    modes = torch.stack([Normal(m, std).log_prob(u) for m in (mean, -mean)]) + math.log(0.5)
    marginal = modes.logsumexp(0)
    log_q = marginal - log_scale.squeeze(-1)
    log_pi = log_q - log_tanh_slope(z)
    assert torch.allclose(policy.sample(obs)[1], log_pi, atol=1e-10)

    # The location moves the draw alone. The scale also enters log q, and moves the draw.
    log_posterior = torch.where(b.squeeze(-1) > 0, *modes) - marginal
    surrogate = (-log_posterior - log_scale.squeeze(-1) - log_tanh_slope(z)).mean()
    agent = Agent(policy, Quadratic(3, 1), config)
    q = agent.critic(obs, z.tanh()).amin(0)
    wanted = [actor.loc, actor.log_scale]
    expected = torch.autograd.grad(0.7 * surrogate - q.mean(), wanted)
    agent.actor_optimizer = torch.optim.SGD(actor.parameters(), 1.0)
    before = [one.detach().clone() for one in wanted]
    agent.update_actor(obs, policy.fit(obs))
    for old, new, gradient in zip(before, wanted, expected, strict=True):
        assert torch.allclose(old - new, gradient, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("alpha", "reward", "difference"),
    [(1.0, 0.2, 0.2), (1.0, 3.0, 0.5), (0.5, 0.2, 0.2), (0.5, 3.0, 0.25)],
)
def test_odds_of_the_parts(
    alpha: float, reward: float, difference: float, standard_errors: Callable[[int], float]
) -> None:
    """The odds of two parts move by the difference of their costs, half a temperature at most."""

    class Step:  # worth something where the action is positive
        def __call__(self, obs: Tensor, action: Tensor) -> Tensor:
            return reward * (action > 0).to(action).sum(-1).unsqueeze(0)

    config = Config(agent="sac-ardae", auto_alpha=False, alpha=alpha, part_bits=1, **SMALL)  # type: ignore[arg-type]
    policy = build_policy(config, 1, 1)
    agent = Agent(policy, Step(), config)
    actor = policy.actor
    assert isinstance(actor, ImplicitActor)
    actor.base_scale, actor.min_scale = 0.0, -math.log(2)  # the softplus of 0 is log 2: y = 0
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
    policy.GAUGE = 0.0
    agent.actor_optimizer = torch.optim.SGD(actor.parameters(), 1.0)
    count = 20_000
    obs, still = torch.zeros(count, 1), torch.zeros(count, 1)
    encoded = actor.encode(obs)
    part = actor.choose(encoded)
    agent.update_actor(obs, Proposal(encoded, part, still, still + 1))
    first, second = actor.trunk.layers[-1][..., 2:4].detach().flatten().tolist()
    # Half of the states compare, and in half of them the other part, drawn evenly, is the same.
    assert first == pytest.approx(-second, abs=1e-12)
    assert abs(first - difference / 2) < standard_errors(1) * difference / 2 / (count / 2) ** 0.5


@pytest.mark.usefixtures("float64")
def test_explicit_policy_gradient_agrees_in_expectation() -> None:
    """The Gaussian's own gradient differs from the path's by a term of mean zero: none is left of
    it after integrating over the noise (Gauss-Hermite)."""
    actor = GaussianActor(2, 1, hidden_dims=(8,))
    obs = torch.randn(1, 2)
    nodes, weights = (torch.from_numpy(one) for one in _hermite(80))
    loc, log_scale = actor(obs)
    z = loc + log_scale.exp() * nodes.unsqueeze(-1)
    log_q = -0.5 * nodes.square() - log_scale.squeeze()
    whole = (weights * (log_q - log_tanh_slope(z))).sum()
    slope = (-nodes / log_scale.exp().squeeze()).detach() + 2 * z.detach().tanh().squeeze()
    path = (weights * slope * z.squeeze()).sum()
    parameters = list(actor.parameters())
    for one, other in zip(
        torch.autograd.grad(whole, parameters, retain_graph=True),
        torch.autograd.grad(path, parameters),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-8)


def _hermite(count: int) -> tuple[Any, Any]:
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


@pytest.mark.usefixtures("float64")
def test_log_pi_of_an_implicit_policy() -> None:
    agent, actor = linear_agent(Config(agent="sac-ardae", auto_alpha=False))
    obs = torch.randn(5, 3)
    actor.fixed = torch.randn(1, 5, 2)
    z, log_pi = agent.policy.sample(obs)
    factor = torch.diag_embed((obs @ actor.log_scale).exp()) @ actor.factor
    normal = MultivariateNormal(obs @ actor.loc, factor @ factor.mT)
    expected = normal.log_prob(z) - (1 - z.tanh().square()).log().sum(-1)
    assert torch.allclose(log_pi, expected, atol=1e-10)


def batch(count: int, obs_dim: int = 3, action_dim: int = 2) -> Batch:
    return Batch(
        torch.randn(count, obs_dim),
        torch.rand(count, action_dim) * 2 - 1,
        torch.randn(count),
        torch.randn(count, obs_dim),
        (torch.arange(count) % 3 == 0).to(torch.get_default_dtype()),
    )


@pytest.mark.usefixtures("float64")
def test_critic_step_by_hand() -> None:
    """Termination stops the bootstrap, truncation does not; both critics step on their own loss."""
    config = Config(agent="sac-ardae", alpha=0.3, auto_alpha=False, gamma=0.9, tau=0.1)
    agent, actor = linear_agent(config)
    actor.fixed = torch.randn(1, 9, 2)
    one = batch(9)
    critic, target = agent.critic, agent.target_critic
    with torch.no_grad():
        target.targets.add_(0.3)
    agent.critic_optimizer = torch.optim.SGD(critic.parameters(), 1.0)
    before, of_target = critic.targets.detach().clone(), target.targets.clone()
    metrics = agent.update_critic(one)

    next_z, log_pi = agent.policy.sample(one.next_obs)  # the noise is fixed
    y = []
    for i in range(9):
        values = [
            -(next_z[i].tanh() - one.next_obs[i] @ of_target[j]).square().sum() for j in range(2)
        ]
        follows = 0.9 * (min(values) - 0.3 * log_pi[i])
        y.append(one.reward[i] if i % 3 == 0 else one.reward[i] + follows)
    free = before.clone().requires_grad_()
    q = -(one.action - one.obs @ free).square().sum(-1)
    loss = sum(0.5 * (q[j, i] - y[i]) ** 2 / 9 for i in range(9) for j in range(2))
    (gradient,) = torch.autograd.grad(loss, free)
    assert torch.allclose(metrics["critic_loss"], loss.detach(), atol=1e-10)
    assert torch.allclose(before - critic.targets, gradient, atol=1e-10)
    assert torch.allclose(target.targets, 0.9 * of_target + 0.1 * critic.targets, atol=1e-10)


def test_entropy_mean_is_subtracted() -> None:
    agent, actor = linear_agent(Config(agent="sac-ardae", auto_alpha=False, gamma=0.5))
    plain = agent.critic.targets.detach().clone()
    actor.fixed = torch.randn(1, 9, 2)
    one = batch(9)
    results = {}
    for subtract in (False, True):
        with torch.no_grad():
            agent.critic.targets.copy_(plain)
            agent.target_critic.targets.copy_(plain)
        agent.config = dataclasses.replace(agent.config, subtract_entropy_mean=subtract)
        results[subtract] = agent.update_critic(one)
    mean = results[False]["log_pi"]
    assert torch.allclose(agent.entropy_mean, mean)
    assert not torch.allclose(results[True]["critic_loss"], results[False]["critic_loss"])
    agent.updates = 1  # from the second one on, it moves by a hundredth of the way
    agent.entropy_mean.fill_(7.0)
    agent.update_critic(one)
    assert torch.allclose(agent.entropy_mean, 0.99 * 7.0 + 0.01 * mean)


def test_temperature_moves_towards_the_target_entropy() -> None:
    for log_pi, rises in ((5.0, True), (-5.0, False)):
        agent, _ = linear_agent(Config(agent="sac-ardae", alpha=0.2, auto_alpha=True))
        draws = torch.zeros(9, 2), torch.full((9,), log_pi)
        agent.policy.sample = lambda obs, draws=draws: draws
        before = agent.alpha
        agent.update_critic(batch(9))
        # More entropy (smaller log pi) than wanted, 2 nats below zero: the temperature falls.
        assert (agent.alpha > before) == rises
        assert agent.target_entropy == -2


def test_jacobian_penalty() -> None:
    actor = ImplicitActor(3, 2, hidden_dims=(8,), noise_dim=4, noise_hidden_dims=(8,))
    policy = ImplicitPolicy(actor, ARDAE(2, 5), num_draws=4)
    obs = torch.randn(5, 3)
    free = policy.jacobian_penalty(obs, 0.0)
    assert float(free.detach()) == 0
    penalty = policy.jacobian_penalty(obs, 1.0)
    penalty.backward()
    assert 0 < float(penalty.detach()) < 1
    assert all(p.grad is not None for p in actor.parameters())
    agent, _ = linear_agent(Config(agent="sac-ardae", auto_alpha=False))
    assert agent.jacobian_clamp(obs) == 0
    config = Config(agent="sac-ardae", auto_alpha=False, jacobian_clamp=1.0)
    agent = Agent(policy, TwinCritic(3, 2), config)
    agent.updates = 100
    expected = (1 + 100**1.1 / 1000) * penalty.detach()
    assert float(agent.jacobian_clamp(obs).detach()) == pytest.approx(float(expected), rel=0.2)


def test_draws_beyond_the_bounds_are_penalized() -> None:
    agent, actor = linear_agent(Config(agent="sac-ardae", auto_alpha=False, bound=2.0))
    with torch.no_grad():
        actor.factor.copy_(torch.eye(2))
    actor.fixed = torch.tensor([[[1.9, -1.9], [5.0, -2.0]]])
    agent.policy.GAUGE = 0.0
    obs = torch.zeros(2, 3)
    excess = agent.policy.rsample(obs, agent.policy.fit(obs)).penalty
    # Here z = y: 3 beyond 2, the bound of z, and 2 beyond 3, that of y, in one of two draws.
    assert float(excess.detach()) == pytest.approx((3**2 + 2**2) / 2)
    assert ExplicitPolicy(GaussianActor(3, 2)).rsample(torch.zeros(2, 3)).penalty is None


@pytest.mark.usefixtures("float64")
def test_the_penalty_weighs_as_much_as_the_values_pull() -> None:
    """By the running mean of the magnitude of their gradient by z; 1 at least."""
    config = Config(agent="sac-ardae", auto_alpha=False, bound=0.1)
    agent, actor = linear_agent(config)
    agent.policy.GAUGE = 0.0
    actor.fixed = torch.randn(1, 6, 2).clamp(-1, 1)
    obs, before = torch.randn(6, 3), copy.deepcopy(actor.state_dict())
    z = agent.policy.sample(obs)[0].requires_grad_()
    steps = []
    for force, weight in ((0.0, 1.0), (5.0, 5.0)):
        actor.load_state_dict(before)
        agent.actor_optimizer = torch.optim.SGD(actor.parameters(), 1.0)
        agent.force.fill_(force)
        metrics = agent.update_actor(obs, agent.policy.fit(obs))
        of_penalty = 2 * z.sign() * (z.abs() - 0.1).clamp_min(0) / 6
        steps.append(before["loc"] - actor.loc - weight * obs.mT @ of_penalty)
        (pull,) = torch.autograd.grad(agent.critic(obs, z.tanh()).amin(0).sum(), z)
        assert torch.allclose(agent.force, 0.98 * force + 0.02 * pull.abs().mean())
        assert torch.equal(metrics["max_z"], z.detach().abs().max())
    assert torch.allclose(*steps, rtol=0, atol=1e-10)  # what else moves it is the same


@pytest.mark.parametrize("name", ["sac", "sac-nf", "sac-ardae"])
def test_step_sizes(name: Any) -> None:
    """Adam's first step moves a weight by the step size, whatever the gradient."""
    config = Config(agent=name, learning_rate=1e-3, actor_learning_rate=1e-4, **SMALL)  # type: ignore[arg-type]
    agent = Agent(build_policy(config, 3, 2), TwinCritic(3, 2, hidden_dims=(8,)), config)
    before = copy.deepcopy((agent.policy.actor, agent.critic))
    agent.update(batch(8))
    for old, new, size in zip(
        before, (agent.policy.actor, agent.critic), (1e-4, 1e-3), strict=True
    ):
        pairs = zip(old.parameters(), new.parameters(), strict=True)
        moved = max(float((one - other).detach().abs().max()) for one, other in pairs)
        assert moved == pytest.approx(size, rel=0.01)


@pytest.mark.usefixtures("float64")
def test_penalty_on_the_moments_of_y() -> None:
    """Its gradient is, in expectation, that of (v - 1 - log v) / 2 per coordinate, times GAUGE."""
    agent, actor = linear_agent(Config(agent="sac-ardae", auto_alpha=False, bound=1e9))
    obs = torch.zeros(10_000, 3)
    with torch.no_grad():
        actor.factor.copy_(torch.diag(torch.tensor([0.5, 1.3])))
    agent.policy.BOUND_Y = 1e9
    agent.policy.MOMENT_DRAWS = 128  # by few draws, large variances are cut off
    penalty = agent.policy.rsample(obs, agent.policy.fit(obs)).penalty
    (gradient,) = torch.autograd.grad(penalty, actor.factor)
    # v = A^2: by A, (1 - 1 / v) A.
    expected = torch.tensor([(1 - 1 / 0.25) * 0.5, (1 - 1 / 1.69) * 1.3])
    assert torch.allclose(gradient.diagonal(), agent.policy.GAUGE * expected, rtol=0.1)


@pytest.mark.parametrize("name", ["sac", "sac-nf", "sac-ardae"])
@pytest.mark.parametrize("auto_alpha", [True, False])
def test_state_resumes_bit_for_bit(name: Any, auto_alpha: bool) -> None:
    config = Config(
        agent=name,
        auto_alpha=auto_alpha,
        subtract_entropy_mean=True,
        **SMALL,  # type: ignore[arg-type]
    )

    def build() -> Agent:
        critic = TwinCritic(3, 2, hidden_dims=(8,))
        return Agent(build_policy(config, 3, 2), critic, config)

    one, other = build(), build()
    batches = [batch(8) for _ in range(8)]
    for first in batches[:4]:
        one.update(first)
    # A copy: what is restored shares its tensors with the state.
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    results = []
    for agent in (one, other):
        torch.manual_seed(7)
        for more in batches[4:]:
            metrics = agent.update(more)
        results.append((metrics, agent.act(torch.ones(2, 3))))
    assert_equal(*results)
    assert_equal(one.state_dict(), other.state_dict())
    assert (abs(one.alpha - config.alpha) > 1e-6) == auto_alpha


@pytest.mark.parametrize("name", ["sac", "sac-nf", "sac-ardae"])
def test_only_the_actor_learns_in_its_step(name: Any) -> None:
    config = Config(agent=name, **SMALL)  # type: ignore[arg-type]
    agent = Agent(build_policy(config, 3, 2), TwinCritic(3, 2, hidden_dims=(8,)), config)
    obs = torch.randn(8, 3)
    agent.update_actor(obs, agent.policy.fit(obs))
    assert all(p.grad is None for p in agent.critic.parameters())
    metrics = agent.update(batch(8))
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(not p.requires_grad for p in agent.target_critic.parameters())


def test_the_score_comes_from_the_estimator_of_the_elbo() -> None:
    policy = build_policy(Config(agent="sac-ardae"), 3, 2)
    assert isinstance(policy, ImplicitPolicy)
    assert type(policy.estimator) is ARDAE
    found = policy.diagnostics(torch.randn(16, 3))
    assert found.keys() == {"score_loss", "stein", "stein_se", "log_z", "width"}
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps: expected a positive number, found 0"),
        ({"gamma": 1.0}, "--gamma: expected a discount"),
        ({"tau": 0.0}, "--tau: expected a share"),
        ({"alpha": -1.0}, "--alpha: expected a positive temperature"),
        ({"batch_size": 1}, "--batch-size: expected at least 2"),
        ({"score_draws": 1, "score_steps": 2}, "--score-draws: expected --score-steps at least"),
        ({"score_steps": 0}, "--score-steps: expected a positive number"),
        ({"buffer_size": 0}, "--buffer-size: expected --num-envs at least"),
        ({"learning_starts": -1}, "--learning-starts: expected no negative number, found -1"),
        ({"hidden_dims": ()}, "--hidden-dims: expected positive widths"),
        ({"noise_hidden_dims": (0,)}, "--noise-hidden-dims: expected positive widths"),
        ({"noise_scale": 0.0}, "--noise-scale: expected a positive factor"),
        ({"spread": 0.0}, "--spread: expected a positive scale"),
        ({"part_scale": 1.0}, r"--part-scale: expected a scale in \[0, 0.9\], found 1.0"),
        ({"part_bits": 0}, "--part-bits: expected 1 to 10, found 0"),
        ({"even_share": 1.0}, r"--even-share: expected a share in \[0, 1\), found 1.0"),
        ({"min_scale": 0.0}, "--min-scale: expected a positive scale"),
        ({"bound": 0.0}, "--bound: expected a positive magnitude"),
        ({"jacobian_clamp": -0.1}, "--jacobian-clamp: expected no negative number"),
        ({"score_delta": 2.0}, "--score-delta: expected a scale in"),
        ({"score_ratio_weight": -1.0}, "--score-ratio-weight: expected no negative number"),
        ({"score_ratio_weight": 0.0}, "--score-normalizer-draws: expected a positive number, or 0"),
        ({"score_depth": 0}, "--score-depth: expected a positive number"),
        ({"threads": 0}, "--threads: expected a positive number"),
        ({"num_envs": 0}, "--num-envs: expected a positive number"),
        ({"eval_every": 0}, "--eval-every: expected a positive number"),
        ({"eval_episodes": 0}, "--eval-episodes: expected a positive number"),
        ({"checkpoint_every": 0}, "--checkpoint-every: expected a positive number"),
        ({"learning_rate": 0.0}, "--learning-rate: expected a positive number"),
        ({"actor_learning_rate": 0.0}, "--actor-learning-rate: expected a positive number"),
        ({"noise_dim": 0}, "--noise-dim: expected a positive number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(Config(**options))


def test_too_few_draws() -> None:
    with pytest.raises(ValueError, match="expected num_draws >= 1, got 0"):
        ImplicitPolicy(ImplicitActor(3, 2), ARDAE(2, 3), num_draws=0)


@pytest.mark.slow
def test_best_policy_for_a_parabola() -> None:
    """Its second moment is known by quadrature; within a tenth of it after 1,500 updates."""

    # Q = -a^2 / 2 with alpha = 0.5 and zero state: pi is proportional to exp(-a^2).
    class Parabola:
        def __call__(self, obs: Tensor, action: Tensor) -> Tensor:
            return -0.5 * action.square().sum(-1).unsqueeze(0)

    config = Config(agent="sac-ardae", alpha=0.5, auto_alpha=False, actor_learning_rate=1e-3)
    torch.manual_seed(0)
    agent = Agent(build_policy(config, 2, 1), Parabola(), config)
    obs = torch.zeros(256, 2)
    for _ in range(1500):
        agent.update_actor(obs, agent.policy.fit(obs))
    a = agent.act(torch.zeros(20_000, 2))[:, 0].double()
    grid = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    weight = (-grid.square()).exp()
    exact = float((weight * grid.square()).sum() / weight.sum())
    assert float(a.square().mean()) == pytest.approx(exact, rel=0.1)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    config = Config(agent="sac", **SMALL)  # type: ignore[arg-type]
    policy = ExplicitPolicy(GaussianActor(4, 2, hidden_dims=(16,)))
    agent = Agent(policy, TwinCritic(4, 2, hidden_dims=(16,)), config)
    good = Batch(
        torch.randn(2, 4), torch.rand(2, 2), torch.randn(2), torch.randn(2, 4), torch.zeros(2)
    )
    agent.update(good._replace(terminated=torch.tensor([True, False])))
    state = copy.deepcopy(agent.state_dict())
    bad = {
        r"reward \(2, 1\)": good._replace(reward=torch.randn(2, 1)),
        r"obs \(4,\)": good._replace(obs=torch.randn(4)),
        r"next_obs \(2, 3\)": good._replace(next_obs=torch.randn(2, 3)),
        r"action \[B, 2\].*action \(2, 3\)": good._replace(action=torch.rand(2, 3)),
    }
    for message, batch in bad.items():
        with pytest.raises(ValueError, match=message):
            agent.update(batch)
    for name, values in good._asdict().items():
        broken = values.clone()
        broken.flatten()[-1] = torch.nan
        with pytest.raises(ValueError, match="expected finite numbers"):
            agent.update(good._replace(**{name: broken}))
    assert_equal(agent.state_dict(), state)
