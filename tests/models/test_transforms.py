# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The triangular product against dense matrices, values and gradients."""

from __future__ import annotations

import pytest
import torch

from models.transforms import Below


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_product_is_that_of_the_matrices(float64: None, dim: int) -> None:
    below = Below(dim)
    entries = torch.randn(4, below.count, requires_grad=True)
    w = torch.randn(4, dim, requires_grad=True)
    expected = torch.einsum("bij,bj->bi", below.dense(entries), w)
    assert below.dense(entries).triu().abs().sum() == 0
    product = below(entries, w)
    torch.testing.assert_close(product, expected)
    weight = torch.randn(4, dim)
    found = torch.autograd.grad((weight * product).sum(), (entries, w))
    wanted = torch.autograd.grad((weight * expected).sum(), (entries, w))
    torch.testing.assert_close(found, wanted)


def test_product_with_several_to_a_matrix(float64: None) -> None:
    below = Below(5)
    entries, w = torch.randn(4, below.count), torch.randn(3, 4, 5)
    one_by_one = torch.stack([below(entries, one) for one in w])
    torch.testing.assert_close(below(entries, w), one_by_one)
