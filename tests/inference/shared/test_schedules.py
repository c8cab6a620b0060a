# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from inference.shared.precision import training_dtype
from inference.shared.schedules import annealed, cosine_decay


def test_annealed() -> None:
    found = [annealed(progress, 0.01, 0.4) for progress in (0.0, 0.2, 0.4, 1.0)]
    assert found == pytest.approx([0.01, 0.1, 1.0, 1.0])
    assert annealed(0.0, 0.01, 0.0) == 1.0


def test_cosine_decay() -> None:
    found = [cosine_decay(progress, 0.5) for progress in (0.0, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, None),
        (None, None),  # a torch that does not tell
    ],
)
def test_precision_by_what_the_processor_has(
    capabilities: dict[str, bool] | None,
    expected: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert training_dtype("auto", "cpu") == expected
    assert training_dtype("auto", "cuda") is None
    assert training_dtype("bf16", "cuda") == torch.bfloat16
    assert training_dtype("fp32", "cpu") is None
