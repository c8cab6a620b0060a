# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from inference.agents.video import check_renders, record_episode
from inference.shared.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_environments")


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("test/Count-v0", "an environment that renders pictures, found test/Count-v0; leave"),
        ("test/Broken-v0", "to render without a display, found: no display; set MUJOCO_GL=egl"),
    ],
)
def test_recording_what_cannot_be_rendered(env_id: str, message: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=message):
        check_renders(env_id)
    with pytest.raises(UserError, match=message):
        record_episode(env_id, lambda obs: obs[:, :1] * 0, tmp_path / "x.gif", seed=0)


def test_recording(tmp_path: Any) -> None:
    check_renders("test/Picture-v0")
    path = tmp_path / "x.gif"
    record_episode("test/Picture-v0", lambda obs: obs[:, :1] * 0, path, seed=0)
    with Image.open(path) as image:
        assert image.size == (240, 180)
