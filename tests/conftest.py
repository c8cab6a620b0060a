# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Every test starts from one seed, an empty param store and validation on, and leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import pyro
import pytest
import torch

FAILURE_RATE = 1e-5
"""Rate at which a statistical test may fail although the code is right."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of every test")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def global_flags() -> dict[str, object]:
    return {
        "validate_args": torch.distributions.Distribution._validate_args,
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad enabled": torch.is_grad_enabled(),
        "module_local_params": pyro.settings.get("module_local_params"),
    }


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(request.config.getoption("--seed"))  # torch, numpy and random
    before = global_flags()
    yield
    after = global_flags()
    torch.distributions.Distribution.set_default_validate_args(True)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    pyro.settings.set(module_local_params=before["module_local_params"])
    pyro.clear_param_store()
    assert after == before, f"the test changed global state: {before} became {after}"


@pytest.fixture
def float64() -> Iterator[None]:
    """Exact tests: rounding is 1e-16, so 1e-10 tells a wrong formula from a right one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def standard_errors() -> Callable[[int], float]:
    """How many standard errors ``comparisons`` right results stay within, at the failure rate."""
    return lambda comparisons: NormalDist().inv_cdf(1 - FAILURE_RATE / comparisons / 2)


@pytest.fixture
def chi_square_bound() -> Callable[[float], float]:
    """A bound that a chi-square variable exceeds at less than the failure rate, by its degrees of
    freedom k: k + 2 sqrt(k t) + 2 t with t = -log rate (Laurent & Massart 2000, lemma 1)."""
    t = -math.log(FAILURE_RATE)
    return lambda k: k + 2 * math.sqrt(k * t) + 2 * t


def assert_equal(one: object, other: object, path: str = "state") -> None:
    """That two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert isinstance(other, dict), path
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple), path
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{path}[{index}]")
    else:
        assert one == other, path
