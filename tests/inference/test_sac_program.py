# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""inference.sac, inference.bandit and inference.sac_plots as a user runs them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from inference.agents.presets import PRESETS
from inference.sac import Training
from inference.sac_plots import learning_curves, multi_goal_paths
from inference.shared.errors import UserError
from inference.shared.randomness import seed_of
from tests.conftest import assert_equal
from tests.inference.conftest import ROOT, Program, read_csv

#: Options that make a run tiny.
SMALL = (
    *("--batch-size", 8, "--learning-starts", 10, "--hidden-dims", 16),
    *("--eval-episodes", 2, "--buffer-size", 200),
)
AGENTS = ("sac", "sac-nf", "sac-ardae")


@pytest.mark.parametrize("name", ["sac", "bandit", "sac_plots"])
def test_help(name: str, help_of: Callable[[str], str]) -> None:
    shown = help_of(name)
    if name == "sac":
        assert all(preset in shown for preset in PRESETS)


def test_paths_of_many_episodes() -> None:
    """Each from the start, step by step, though ten environments play them in turn."""
    config = PRESETS["multigoal-sac"][1]
    paths = multi_goal_paths(Training(config).agent, config, 40)
    assert len(paths) == 40
    for path in paths:
        assert path[0].abs().max() == 0
        assert 2 <= len(path) <= 31
        assert 0 < path.diff(dim=0).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_run(
    agent: str,
    num_envs: int,
    program: Program,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    options = ("--steps", 16, "--eval-every", 8, "--num-envs", num_envs, "--out", run)
    program("sac", f"multigoal-{agent}", *SMALL, *options)
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files > {
        *("config.json", "command.txt", "versions.json", "metrics.csv", "results.json"),
        *("checkpoints/latest.pt", "figures/run.png", "figures/trajectories.png"),
    }
    first, last = read_csv(run / "metrics.csv")
    assert (first["step"], last["step"]) == ("8", "16")
    # Ten random transitions, then one update for each.
    assert last["updates"] == "6"
    assert first["critic_loss"] == ""
    assert float(last["critic_loss"]) > 0
    assert 0 <= sum(float(last[f"goal_{index}"]) for index in range(4)) <= 1
    assert (last["stein"] != "") == (agent == "sac-ardae")
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 16
    assert 0 <= sum(results["goal_shares_last_five"]) <= 1
    assert "steps/s" in capsys.readouterr().out

    program("sac_plots", run, "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_for_two_updates(
    preset: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole episodes and figures take seconds; `test_run` has them.
    monkeypatch.setattr("inference.sac.Training.evaluate", lambda self: dict.fromkeys(PLAYED, 0.0))
    monkeypatch.setattr("inference.sac_plots.draw_run", lambda *arguments: [])
    options = ("--steps", 4, "--learning-starts", 2, "--batch-size", 4, "--buffer-size", 100)
    program("sac", preset, *options, "--out", tmp_path / "run")
    (row,) = read_csv(tmp_path / "run" / "metrics.csv")
    assert row["updates"] == "2"


#: What an evaluation adds to a row, of what the program prints.
PLAYED = ("eval_return", "eval_return_std", "eval_return_no_noise")


def test_resume_after_sigkill_bit_for_bit(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["pendulum-sac-ardae", *SMALL, "--eval-every", 1_000_000, "--checkpoint-every", 25]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "inference.sac", *map(str, arguments)]
    command += ["--steps", "1000000", "--out", str(killed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        latest = killed / "checkpoints" / "latest.pt"
        deadline = time.monotonic() + 600  # for a machine that has other things to do
        while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    steps = torch.load(latest, weights_only=True)["collector"]["steps"] + 30

    monkeypatch.setattr("inference.sac_plots.draw_run", lambda *arguments: [])
    program("sac", *arguments, "--steps", steps, "--out", whole)
    program("sac", *arguments, "--steps", steps, "--resume", killed)
    states = [
        torch.load(run / "checkpoints" / "latest.pt", weights_only=True) for run in (killed, whole)
    ]
    for state in states:
        del state["seconds"], state["logged"]
    assert states[0]["agent"]["updates"] > 20
    assert_equal(*states)
    # What was noted before the kill is in the row that comes after it.
    rows = [read_csv(run / "metrics.csv")[-1] for run in (killed, whole)]
    for row in rows:
        del row["seconds"], row["steps_per_second"]
    assert rows[0] == rows[1]


def test_bandit(program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--seeds", 0, "--updates", 3, "--draws", 1000, "--out", tmp_path)
    program("bandit", *options, "--bandits", "1d", "2d", "6d", "--config.batch-size", 32)
    rows = read_csv(tmp_path / "results.csv")
    assert len(rows) == 3 * 2 * 4
    assert all(float(row["kl"]) > 0 for row in rows)
    for row in rows:
        assert (row["smallest_mode"] != "") == (row["bandit"] == "6d")
        assert (row["stein"] != "") == (row["agent"] == "sac-ardae")
        assert (row["log_prob_error"] != "") == (
            row["agent"] == "sac-ardae" and row["bandit"] != "6d"
        )
    assert "bandit 1d, agent sac, seed 0" in capsys.readouterr().out


def test_errors_end_in_one_line(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    tiny = (*SMALL, "--steps", 2)
    program("sac", "pendulum-sac", *tiny, "--eval-every", 1000, "--out", run)
    done = tmp_path / "done"
    program("sac", "multigoal-sac", *SMALL, "--steps", 3, "--num-envs", 2, "--out", done)
    program("sac", "multigoal-sac", *SMALL, "--steps", 3, "--num-envs", 2, "--resume", done)
    (tmp_path / "bandit").mkdir()
    (tmp_path / "bandit" / "results.csv").write_text("")
    another = tmp_path / "another"
    shutil.copytree(done, another)
    config = json.loads((done / "config.json").read_text()) | {"seed": 1, "tau": 0.5}
    (another / "config.json").write_text(json.dumps(config))
    empty = tmp_path / "empty"
    empty.mkdir()
    config = dataclasses.asdict(PRESETS["pendulum-sac"][1])
    small = {"batch_size": 8, "learning_starts": 10, "hidden_dims": [16], "eval_episodes": 2}
    config |= small | {"buffer_size": 200, "steps": 2}
    (empty / "config.json").write_text(json.dumps(config, default=str))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "metrics.csv").write_text("step\n")
    other = ("sac", "pendulum-sac-ardae", *tiny)
    never = ("--out", tmp_path / "never")
    table: list[tuple[tuple[object, ...], str]] = [
        (("sac", "pendulum"), "pendulum"),
        (("sac", "pendulum-sac", *tiny, "--eval-every", 1000, "--out", run), "found a run"),
        ((*other, "--eval-every", 1000, "--resume", run), "agent is 'sac' in the run, 'sac-ardae'"),
        (("sac", "pendulum-sac", *tiny, "--env", "CartPole-v1", *never), "actions in a Box"),
        (("sac", "pendulum-sac", *tiny, "--env", "Nothing-v3", *never), "a registered environment"),
        (("sac", "pendulum-sac", *tiny, "--gamma", 1, *never), "--gamma: expected a discount"),
        (("sac", "pendulum-sac", *tiny, "--threads", 0, *never), "--threads: expected a positive"),
        (("sac", "pendulum-sac", *tiny, "--device", "abacus", *never), "--device: expected one"),
        (("sac", "hopper-sac-ardae", *tiny, "--noise-dim", 1, *never), "width at least, 3, found"),
        (("sac", "multigoal-sac", *tiny, "--record-video", *never), "that renders pictures"),
        (("sac", "pendulum-sac", "--record-video", "--env", "No-v3", *never), "a registered envir"),
        (("bandit", "--seconds", 0), "--seconds: expected a positive number"),
        (("sac", "pendulum-sac", *tiny, "--seed", -1, *never), "--seed: expected a number in [0,"),
        (("sac", "pendulum-sac", *tiny, "--part-bits", 3, *never), "sac does not read it"),
        (("bandit", "--config.batch-size", 16), "--config.batch-size: expected 32 at least"),
        (("bandit", "--config.gamma", 2), "--gamma: expected a discount"),
        (("bandit", "--config.gamma", 0.5), "--gamma: the bandit does not read it"),
        (("bandit", "--config.auto-alpha"), "--auto-alpha: the bandit does not read it"),
        (
            ("bandit", "--agents", "sac", "--config.part-bits", 3),
            "--part-bits: a policy with a density does not read it",
        ),
        (("bandit", "--seeds"), "--seeds: expected one at least"),
        (("bandit", "--agents"), "--agents: expected one at least"),
        (("bench", "learn", "--seeds"), "--seeds: expected one at least"),
        (
            ("sac", "multigoal-sac", *tiny, "--target-entropy", 5, *never),
            "--target-entropy: a fixed temperature (--no-auto-alpha) does not read it",
        ),
        (
            ("sac", "pendulum-sac-ardae", *tiny, "--jacobian-exponent", 2, *never),
            "--jacobian-exponent: a run without --jacobian-clamp does not read it",
        ),
        (
            ("sac", "pendulum-sac", *tiny, "--resume", run, "--out", tmp_path / "never"),
            "--out: a resumed run stays in its folder",
        ),
        (
            ("sac", "pendulum-sac", *SMALL, "--steps", 1, "--eval-every", 1000, "--resume", run),
            "--steps: expected more than the 2 that this run has done, found 1",
        ),
        (("bandit", "--bandits", "1d", "6d", "--config.noise-dim", 3), "width at least, 6, found"),
        (("sac_plots", run, "--out", run / "config.json" / "x.png"), "expected a writable folder"),
        (("bench", "sac", "--updates", 0), "--updates: expected a positive number"),
        (("sac_plots", tmp_path / "none"), "expected a run folder, found none"),
        (("sac_plots",), "expected run folders, found none"),
        (("sac_plots", done, done, "--out", tmp_path / "x.png"), "found another of pyro_ardae/Mul"),
        (("sac", "pendulum-sac", *tiny, "--out", empty), "or delete it: it has no checkpoint"),
        (("sac", "pendulum-sac", *tiny, "--resume", empty), "checkpoint, found none: the run has"),
        (("sac_plots", tmp_path / "none.csv"), "give a learning.csv of inference.bench learn"),
        (("sac_plots", tmp_path / "other" / "metrics.csv"), "expected runs, found none"),
        (("sac_plots", tmp_path / "other"), "expected a run of inference.sac with an evaluation"),
        (
            ("sac", "pendulum-sac", *SMALL, "--steps", 9, "--eval-every", 1000, "--resume", run),
            "--steps: expected 2, where this run has ended between two checkpoints, found 9",
        ),
        (("sac", "multigoal-sac", *tiny, "--obs-limit", 3, *never), "--obs-limit: expected 7 at"),
        (("bandit", "--out", tmp_path / "bandit"), "results.csv: expected none yet, found one"),
        (
            ("sac_plots", done, another, "--out", tmp_path / "x.png"),
            "another: expected tau 0.005, as in",
        ),
        (("bench", "learn", "--tasks", "chess"), "--tasks: expected some of pendulum"),
        (
            ("bench", "learn", "--agents", "sb3", "--steps", 0),
            "--steps: expected a positive number",
        ),
    ]
    before = (run / "config.json").read_text()
    capsys.readouterr()
    for arguments, message in table:
        with pytest.raises(SystemExit) as stopped:
            program(*arguments)
        shown = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert message in shown.err + shown.out, arguments
        assert "Traceback" not in shown.err, arguments
    assert not (tmp_path / "never").exists()
    assert (run / "config.json").read_text() == before
    assert len((run / "command.txt").read_text().splitlines()) == 1


def test_checkpoints_count_steps_of_each_environment(program: Program, tmp_path: Path) -> None:
    options = ("--num-envs", 4, "--eval-every", 1000, "--checkpoint-every", 10, "--steps", 80)
    cuts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference.sac.Training.evaluate", lambda self: dict.fromkeys(PLAYED, 0.0))
        patch.setattr("inference.sac_plots.draw_run", lambda *arguments: [])
        patch.setattr("inference.sac.Training.cut_episodes", lambda self: cuts.append(1))
        program("sac", "pendulum-sac", *SMALL, *options, "--out", tmp_path / "run")
    assert len(cuts) == 2


def test_curves_of_the_steps_that_all_seeds_have() -> None:
    every = {"step": [1.0, 2.0, 3.0, 4.0], "eval_return": [1.0, 2.0, 3.0, 4.0]}
    second = {"step": [2.0, 4.0, 6.0], "eval_return": [2.0, 4.0, 6.0]}
    axes = learning_curves(Figure().subplots(), {"sac": [every, second]}, title="")
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 2.0], [4.0, 4.0]]  # type: ignore[union-attr]


def test_seeds_without_a_common_step_have_no_curve() -> None:
    seeds = [{"step": [step], "eval_return": [1.0]} for step in (1.0, 2.0)]
    with pytest.raises(UserError, match="after the same steps, found none in common"):
        learning_curves(Figure().subplots(), {"sac": seeds}, title="")


def test_seeds_of_purposes_and_steps_differ() -> None:
    keys = [(r, p, t) for r in range(3) for p in ("evaluation", "video") for t in (0, 10, 20)]
    seeds = [seed_of(*key) for key in keys]
    assert len({*seeds}) == len(seeds)
    assert seeds == [seed_of(*key) for key in keys]
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_bench_learn_resumes(
    program: Program,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference.sac_plots.draw_run", lambda *arguments: [])
    small = {"hidden_dims": (8,), "batch_size": 4, "learning_starts": 4, "eval_episodes": 1}
    presets = {
        name: (PRESETS[name][0], dataclasses.replace(PRESETS[name][1], **small))  # type: ignore[arg-type]
        for name in ("multigoal-sac", "multigoal-sac-ardae")
    }
    monkeypatch.setattr("inference.benchmarks.learn.PRESETS", presets)
    options = ("--tasks", "multigoal", "--steps", 8, "--eval-every", 4, "--out", tmp_path)
    program("bench", "learn", *options, "--seeds", 0)
    rows = read_csv(tmp_path / "learning.csv")
    agents = ["sac", "sac-ardae", "sb3"]
    assert [(row["agent"], row["step"]) for row in rows] == [
        (agent, step) for agent in agents for step in ("4", "8")
    ]
    assert "| multigoal | sb3 | 1 | 8 |" in capsys.readouterr().out
    (tmp_path / "multigoal-sb3-seed1").mkdir()
    notes = tmp_path / "multigoal-sb3-seed1" / "notes.txt"
    notes.write_text("not a run's")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-seed0/metrics.csv")}
    program("bench", "learn", *options, "--seeds", 0, 1)
    assert notes.exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "| multigoal | sac-ardae | 2 | 8 |" in capsys.readouterr().out
    program("bench", "learn", *options, "--seeds", 1, "--agents", "sac")
    with (tmp_path / "learning.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(rows)  # not that call's runs alone
    program("sac_plots", tmp_path / "learning.csv", "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        program("bench", "learn", *options, "--eval-every", 2, "--seeds", 0)
    assert "expected the run's options, found: eval_every is 4 in the" in capsys.readouterr().err
    another = dataclasses.replace(presets["multigoal-sac"][1], tau=0.1)
    monkeypatch.setitem(presets, "multigoal-sac", ("", another))
    with pytest.raises(SystemExit):
        program("bench", "learn", *options, "--seeds", 0)
    assert "tau is 0.005 in the run, 0.1 here" in capsys.readouterr().err.replace("\n", " ")


def test_bench_sac(program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    small = ("--updates", 2, "--warmup", 1, "--batch-size", 8)
    program("bench", "sac", *small, "--json", path)
    figures = json.loads(path.read_text())
    assert figures["ms"].keys() == {"sb3", *AGENTS}
    assert figures["ratio_to_sb3"].keys() == {*AGENTS}
    assert all(value > 0 for value in figures["ratio_to_sb3"].values())
    assert "sac-ardae" in capsys.readouterr().out
