# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from inference.shared import process


def test_mujoco_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # by default a log file is written here
    before = mujoco.get_mju_user_warning()
    process._say_once.cache_clear()  # other tests may have met the same warning
    process.mujoco_warns_once()
    say = mujoco.get_mju_user_warning()
    try:
        for text in ("one", "another", "one"):
            say(text)
        assert capsys.readouterr().err == "MuJoCo: one\nMuJoCo: another\n"
        # Deprecated since MuJoCo 4.
        model = """<mujoco><compiler settotalmass="1"/><worldbody><body><freejoint/>
            <geom size="1"/></body></worldbody></mujoco>"""
        for _ in range(2):
            mujoco.MjModel.from_xml_string(model)
        assert capsys.readouterr().err.count("settotalmass") == (mujoco.mj_version() >= 4_000_000)
    finally:
        mujoco.set_mju_user_warning(before)
    assert not [*tmp_path.iterdir()]
