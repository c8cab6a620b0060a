# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.inference.agents.toy_environments import registered


@pytest.fixture(scope="module")
def toy_environments() -> Iterator[None]:
    with registered():
        yield
