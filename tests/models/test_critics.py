# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.critics import TwinCritic


@pytest.mark.usefixtures("float64")
def test_twin_critics_are_two() -> None:
    critic = TwinCritic(3, 2, hidden_dims=(8, 8))
    obs, action = torch.randn(5, 3), torch.rand(5, 2)
    q: Tensor = critic(obs, action)
    assert q.shape == (2, 5)
    assert not torch.allclose(q[0], q[1])
    # A step on the sum of their losses is, for each, the step on its own.
    (together,) = torch.autograd.grad(q.square().sum(), [critic.stack.flat])
    apart = [
        torch.autograd.grad(critic(obs, action)[net].square().sum(), [critic.stack.flat])[0]
        for net in range(2)
    ]
    assert torch.allclose(together, apart[0] + apart[1], atol=1e-10)
    assert not (apart[0] * apart[1]).any()


@pytest.mark.usefixtures("float64")
def test_gradient_of_the_critics_by_the_action() -> None:
    critic = TwinCritic(3, 2, hidden_dims=(8, 8))
    obs, action = torch.randn(5, 3), torch.rand(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: critic(obs, a), (action,))
    critic(obs, action).amin(0).sum().backward(inputs=[action])
    assert action.grad is not None
    assert all(parameter.grad is None for parameter in critic.parameters())
