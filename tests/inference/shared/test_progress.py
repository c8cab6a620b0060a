# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""A bar of seconds takes steps that end past its time; warnings are errors here."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from inference.shared.progress import advance


def test_a_bar_never_passes_its_end() -> None:
    shown = io.StringIO()
    with tqdm(total=0.2 * 3, mininterval=0.0, miniters=0, file=shown) as progress:
        for run in (1, 2, 3):
            for _ in range(4):
                advance(progress, progress.n + 0.07)  # 0.28 of 0.2 s
            advance(progress, 0.2 * run)
            assert progress.n <= progress.total
        assert progress.n == pytest.approx(0.6)
    assert "100%" in shown.getvalue()
