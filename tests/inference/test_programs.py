# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The programs as a user runs them."""

from __future__ import annotations

import csv
import json
import math
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

from inference.autoencoders.presets import PAPER_PRESETS, PRESETS
from inference.autoencoders.training import Training
from inference.shared.precision import full_precision
from tests.conftest import assert_equal
from tests.inference.conftest import ROOT, TINY, Program, read_csv


@pytest.mark.parametrize("name", ["vae", "evaluate", "demo", "bench"])
def test_help(name: str, help_of: Callable[[str], str]) -> None:
    shown = help_of(name)
    if name == "vae":
        assert all(preset in shown for preset in PRESETS)


#: Dynamically binarized rows differ from the static ones in the data alone: one of them here, all
#: in ``test_vae_presets.py``.
WHOLE = [name for name in PRESETS if not name.startswith("dbmnist")] + ["dbmnist-mlp-flow"]


@pytest.mark.parametrize("preset", WHOLE)
def test_two_steps_and_evaluation_again(
    preset: str,
    program: Program,
    sample_dir: Path,
    idx_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    data_dir = idx_dir if preset.startswith("dbmnist") else sample_dir
    program("vae", preset, *TINY, "--steps", 2, "--data-dir", data_dir, "--out", run)
    shown = capsys.readouterr().out
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files > {
        *("config.json", "command.txt", "versions.json", "metrics.csv", "results.json"),
        *("checkpoints/latest.pt", "checkpoints/best.pt", "figures/model.png"),
    }
    assert any(name.startswith("tensorboard/events") for name in files)
    (row,) = read_csv(run / "metrics.csv")
    assert row["step"] == "2"
    assert float(row["valid_log_px"]) < 0
    assert (row["stein"] != "") == preset.endswith(("implicit", "avb"))
    results = json.loads((run / "results.json").read_text())
    assert results["test_points"] == 8
    assert results["test_samples"] == 4

    # The same seed and numbers of samples give the same lines.
    program("evaluate", run)
    again = capsys.readouterr().out
    assert "test log p(x)" in again
    assert all(line in shown for line in again.splitlines() if not line.startswith("note:"))
    program("evaluate", run, "--seed", 1)
    assert capsys.readouterr().out != again


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("25gaussians-gaussian", ("--beta-start", 0.1, "--beta-steps", 1000, "--clip", 2.0)),
        ("sbmnist-mlp-implicit", ()),
    ],
)
def test_resume_after_sigkill_bit_for_bit(
    preset: str, options: tuple[object, ...], program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    arguments = [preset, *TINY, *options, "--data-dir", sample_dir, "--valid-every", 1_000_000]
    arguments += ["--checkpoint-every", 5]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "inference.vae", *map(str, arguments)]
    command += ["--steps", "1000000", "--out", str(killed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        latest = killed / "checkpoints" / "latest.pt"
        deadline = time.monotonic() + 60
        while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    steps = torch.load(latest, weights_only=True)["steps_done"] + 7

    program("vae", *arguments, "--steps", steps, "--out", whole)
    program("vae", *arguments, "--steps", steps, "--resume", killed)
    states = [
        torch.load(run / "checkpoints" / "latest.pt", weights_only=True) for run in (killed, whole)
    ]
    for state in states:
        state.pop("seconds")
    assert_equal(*states)
    assert len((killed / "command.txt").read_text().splitlines()) == 2


def test_budget_stops_training(program: Program, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program("vae", "25gaussians-gaussian", *TINY, "--budget-seconds", 0.05, "--out", run)
    assert json.loads((run / "results.json").read_text())["steps"] < 10_000


def test_a_budget_that_a_validation_uses_up_leaves_a_checkpoint(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, validate = tmp_path / "run", Training.validate
    clock, passed = time.perf_counter, [0.0]

    def slow(self: Training) -> dict[str, float]:
        passed[0] += 30
        return validate(self)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr(Training, "validate", slow)
    often = ("--valid-every", 2, "--checkpoint-every", 1000)
    program("vae", "25gaussians-gaussian", *TINY, *often, "--budget-seconds", 30, "--out", run)
    state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    assert json.loads((run / "results.json").read_text())["steps"] == state["steps_done"] == 2


def test_rows_of_a_resumed_run_are_those_of_the_whole_one(
    program: Program, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first one, whose steps lie on both sides of the checkpoint."""
    command = ["vae", "sbmnist-mlp-gaussian", *TINY, "--data-dir", sample_dir]
    command += ["--checkpoint-every", 3, "--valid-every", 4]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.delattr(Training, "validate")
        with pytest.raises(AttributeError):  # at step 4
            program(*command, "--steps", 8, "--out", cut)
    program(*command, "--steps", 8, "--resume", cut)
    program(*command, "--steps", 8, "--out", whole)
    rows = []
    for run in (cut, whole):
        with (run / "metrics.csv").open() as file:
            rows.append([(row["step"], row["loss"]) for row in csv.DictReader(file)])
    assert [step for step, _ in rows[0]] == ["4", "8"]
    assert rows[0] == rows[1]


def test_other_validation_figures_are_not_compared(
    program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    """log p(x) by one sample is lower than by many: the better of two weights would not be kept."""
    run = tmp_path / "run"
    command = ("vae", "sbmnist-mlp-gaussian", *TINY, "--data-dir", sample_dir)
    program(*command, "--steps", 2, "--valid-samples", 500, "--out", run)
    (run / "ais.npz").write_bytes(b"of the weights before")
    program(*command, "--steps", 3, "--valid-samples", 1, "--resume", run)
    assert json.loads((run / "results.json").read_text())["best_step"] == 3
    assert not (run / "ais.npz").exists()


def test_a_run_that_goes_on_keeps_what_belongs_to_its_best_weights(
    program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("vae", "sbmnist-mlp-gaussian", *TINY, "--data-dir", sample_dir, "--valid-every", 1)
    program(*command, "--steps", 2, "--checkpoint-every", 2, "--out", run)
    small = ("--points", 8, "--chains", 2, "--temperatures", 2)
    program("evaluate", run, "--ais", *small)
    program(*command, "--steps", 2, "--resume", run)  # no step is left
    results = json.loads((run / "results.json").read_text())
    assert "ais_log_px" in results
    assert (run / "ais.npz").exists()

    # Of weights that it has not come to: as if it had been killed after the validation of step 9.
    best = run / "checkpoints" / "best.pt"
    torch.save(torch.load(best, weights_only=True) | {"step": 9}, best)
    latest = run / "checkpoints" / "latest.pt"
    torch.save(torch.load(latest, weights_only=True) | {"best_valid": 0.0}, latest)
    program(*command, "--steps", 3, "--resume", run)
    results = json.loads((run / "results.json").read_text())
    assert results["best_step"] == 3
    assert "ais_log_px" not in results
    assert not (run / "ais.npz").exists()


def test_evaluation_does_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions neither, whatever the setting of matrix products."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert torch.get_float32_matmul_precision() == "highest"
    with full_precision(torch.nn.Identity()):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_demo(program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--test-points", 8, "--test-samples", 4)
    program("demo", "--steps", 2, *small, "--out", tmp_path / "demo")
    shown = capsys.readouterr().out
    assert "implicit" in shown
    assert "gaussian" in shown
    assert "-3.754" in shown
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 10_000


def test_help_lists_the_defaults_of_the_schedule(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    fast, paper = (presets["sbmnist-conv-flow"][1] for presets in (PRESETS, PAPER_PRESETS))
    for options, config in (((), fast), (("--schedule", "paper"), paper)):
        with pytest.raises(SystemExit):
            program("vae", "sbmnist-conv-flow", *options, "--help")
        assert f"(default: {config.steps})" in capsys.readouterr().out
    assert fast.steps != paper.steps


def test_bench_step(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    program("bench", "step", "--steps", 2, "--warmup", 1, "--memory-steps", 1, "--json", path)
    figures = json.loads(path.read_text())
    assert figures["ms"].keys() == {"explicit", "implicit"}
    assert figures["ratio"] > 0
    assert figures["gemm_gflops"].keys() == {"fp32", "bf16"}
    assert all(peak["total"] > peak["above_imports"] for peak in figures["peak_memory_mb"].values())


def test_bench_rows(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    rows = ("sbmnist-mlp2-gaussian", "sbmnist-mlp2-implicit")
    small = ("--steps", 2, "--warmup", 1, "--batch-size", 8, "--json", path)
    program("bench", "step", "--rows", *rows, *small)
    figures = json.loads(path.read_text())["rows"]
    assert set(figures) == set(rows)
    gaussian, implicit = figures.values()
    assert gaussian["score_ms"] == 0
    assert 0 < implicit["score_ms"] < implicit["ms"]
    assert implicit["ratio"] == implicit["ms"] / gaussian["ms"]


def test_a_prolonged_run_is_evaluated_as_it_was_prolonged(
    program: Program, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ("vae", "sbmnist-mlp-gaussian", *TINY, "--data-dir", sample_dir, "--train-on-valid")
    program(*command, "--steps", 1, "--out", run)
    program(*command, "--steps", 2, "--test-samples", 5, "--resume", run)
    recorded = json.loads((run / "config.json").read_text())
    assert (recorded["steps"], recorded["test_samples"]) == (2, 5)
    assert (recorded["out"], recorded["resume"]) == (str(run), None)
    capsys.readouterr()
    program("evaluate", run)
    again = capsys.readouterr().out
    assert f"{json.loads((run / 'results.json').read_text())['log_px']:.3f}" in again
    program("vae_plots", run, "--out", tmp_path / "figures")  # of what it has: no validation
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["run.png"]


def test_a_guide_for_missing_pixels_under_the_decoder_of_another_run(
    program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    def weights(run: Path) -> dict[str, torch.Tensor]:
        state = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["vae"]
        return {name: value for name, value in state.items() if name.startswith("decoder.")}

    whole, run = tmp_path / "whole", tmp_path / "run"
    options = (*TINY, "--data-dir", sample_dir)
    program("vae", "sbmnist-mlp-2d-gaussian", *options, "--steps", 3, "--out", whole)
    options += ("--decoder", whole, "--seen-share", 0.2)
    program("vae", "sbmnist-mlp-2d-implicit", *options, "--steps", 2, "--out", run)
    held = weights(whole)
    shutil.rmtree(whole / "checkpoints")  # a run that goes on has the decoder itself
    program("vae", "sbmnist-mlp-2d-implicit", *options, "--steps", 4, "--resume", run)
    assert_equal(weights(run), held)
    program("vae_plots", run, "--out", tmp_path, "--images", 2, "--draws", 1000)
    rows = read_csv(tmp_path / "posteriors.csv")
    assert len(rows) == 2
    assert all(math.isfinite(float(row["log_px"])) for row in rows)


def test_benchmarks_of_vaes_do_without_gymnasium() -> None:
    code = "import sys; sys.modules['gymnasium'] = None; import inference.bench"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_errors_end_in_one_line(
    program: Program, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    toy = ("vae", "25gaussians-gaussian", *TINY, "--steps", 1)
    program(*toy, "--out", run)
    damaged = tmp_path / "damaged"
    program(*toy, "--out", damaged)
    (damaged / "checkpoints" / "latest.pt").write_bytes(b"cut short")
    older = shutil.copytree(run, tmp_path / "older")
    torch.save({"vae": {}}, older / "checkpoints" / "latest.pt")
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "binarized_mnist.npz").write_bytes(b"nothing")
    mnist = ("vae", "sbmnist-mlp-gaussian", *TINY, "--steps", 1, "--out", tmp_path / "never")
    bench = ("bench", "step", "--steps", 1, "--warmup", 0, "--memory-steps", 0)
    table: list[tuple[tuple[object, ...], str]] = [
        (("vae", "30gaussians"), "30gaussians"),
        ((*toy, "--out", tmp_path / "file" / "run"), "expected a writable folder"),
        ((*toy, "--out", run), "expected a new run folder, found a run"),
        ((*toy, "--resume", tmp_path / "none"), "expected a run folder, found none"),
        ((*toy, "--resume", run, "--seed", 5), "seed is 0 in the run, 5 here"),
        ((*toy, "--resume", damaged), "latest.pt: expected a checkpoint"),
        ((*toy, "--resume", older), "expected the state of a training run of this version"),
        ((*mnist, "--data-dir", tmp_path / "bad"), "expected a readable npz file"),
        ((*mnist, "--gain", 0.5), "--gain: sbmnist-mlp-gaussian does not read it"),
        ((*mnist, "--steps", 0), "--steps: expected a positive number, found 0"),
        ((*mnist, "--threads", 0), "--threads: expected a positive number, found 0"),
        ((*mnist, "--valid-every", 0), "--valid-every: expected a positive number"),
        ((*mnist, "--seed", -1), "--seed: expected a number in [0, 2^32)"),
        ((*mnist, "--decay-steps", -5), "--decay-steps: expected 0 at least"),
        ((*mnist, "--test-points", -5), "--test-points: expected a positive number"),
        ((*mnist, "--guide-samples", 63), "--guide-samples: expected two a latent, 64"),
        ((*mnist, "--prior-weight", 0.1), "--valid-samples: expected enough for a share of"),
        (("vae", "25gaussians-implicit", "--decay-start", 5), "--decay-start: 25gaussians-impl"),
        ((*toy, "--resume", run, "--out", run), "--out: a resumed run stays in its folder"),
        (("vae", "25gaussians-implicit", "--gain", 0.5), "--gain: 25gaussians-implicit does not"),
        ((*toy, "--decoder", run), "--decoder: 25gaussians-gaussian does not read it"),
        (
            (*mnist, "--data-dir", sample_dir, "--decoder", run),
            "--decoder: expected a run of sbmnist-mlp with elu, found one of 25gaussians with tanh",
        ),
        ((*mnist, "--seen-share", 1), "--seen-share: expected a number in (0, 1)"),
        (("vae", "sbmnist-mlp-auxiliary", "--seen-share", 0.5), "--seen-share: sbmnist-mlp-aux"),
        ((*mnist, "--fantasy-share", 1), "--fantasy-share: expected a number in [0, 1)"),
        ((*mnist, "--fantasy-start", 5), "--fantasy-start: sbmnist-mlp-gaussian does not read it"),
        (("evaluate", run, "--test-points", 0), "--test-points: expected a positive number"),
        (("evaluate", run, "--test-samples", 1), "--test-samples: expected enough for a share"),
        (("evaluate", run, "--points", 5), "--points: an evaluation without --ais does not read"),
        (("evaluate", run, "--ais", "--seed", 3), "--seed: --ais does not read it"),
        (("evaluate", run, "--ais", "--chains", 0), "--chains: expected 2 at least, found 0"),
        (("vae_plots", run, tmp_path / "x" / "run"), "expected folders of different names"),
        (("bench", "vae", "--steps", 0), "--steps: expected a positive number"),
        ((*mnist, "--device", "abacus"), "--device: expected one that torch can use here"),
        (("vae", "sbmnist-mlp-implicit", "--gain", 1.5), "--gain: expected a number in (0, 1)"),
        (("vae", "sbmnist-mlp-implicit", "--noise-dim", 5), "--noise-dim: expected the latent's"),
        (("vae", "sbmnist-mlp-avb", "--score-folds", 9), "--num-score-samples: expected --score-"),
        (("vae", "sbmnist-mlp-avb", "--score-steps", 2), "--score-steps: expected --score-folds"),
        (
            ("vae", "sbmnist-mlp-avb", "--base", "none", "--score-whitening", "pooled"),
            "--score-folds: expected 2 at least with --score-whitening pooled, found 1",
        ),
        (("evaluate", run, "--device", "abacus"), "--device: expected one that torch can use"),
        (("vae_plots", run, "--out", tmp_path / "f"), "expected a run on images, found 25gaus"),
        (
            ("vae", "sbmnist-mlp-hierarchical-implicit", "--base", "none"),
            "--base: sbmnist-mlp-hierarchical-implicit deviates from a Gaussian",
        ),
        ((*mnist, "--train-on-valid", "--budget-seconds", 1), "found --budget-seconds"),
        ((*mnist, "--precision", "tf32"), "--precision tf32: expected a CUDA device"),
        (("vae", "dbmnist-mlp-flow", "--data-dir", tmp_path), "add --download"),
        ((*toy, "--schedule", "paper"), "expected an MNIST preset"),
        (("evaluate", tmp_path / "none"), "expected a run folder, found none"),
        ((*bench, "--json", tmp_path / "file" / "x.json"), "expected a writable file"),
        ((*bench, "--rows", "sbmnist-mlp-gauss"), "--rows: expected MNIST presets"),
        ((*bench, "--rows", "sbmnist-mlp-flow --precision bf16"), "expected no --precision in a"),
        ((*bench, "--rows", "sbmnist-mlp-flow --threads 4"), "expected no --threads in a row"),
        (
            (*bench, "--rows", "sbmnist-mlp-flow", "--precision", "tf32"),
            "--precision tf32: expected a CUDA device",
        ),
        ((*bench, "--rows", "sbmnist-mlp-implicit --gain 3"), "--gain: expected a number in (0, 1"),
        (("vae_plots", run, "--step-times", tmp_path / "no.csv"), "--step-times: expected a steps"),
        (
            (*mnist, "--fantasy-share", 0.001),
            "--fantasy-share: expected enough of --batch-size",
        ),
        ((*mnist, "--decay-steps", 0, "--decay-start", 9), "--decay-start: sbmnist-mlp-gaussian"),
        (("bench", "step", "--steps", 0), "--steps: expected a positive number"),
        (("bench", "vae", "--start-samples", 8), "--start-samples: expected two a latent, 64"),
        (("bench", "vae", "--threads", 0), "--threads: expected a positive number"),
        (("demo", "--threads", 0), "--threads: expected a positive number"),
    ]
    capsys.readouterr()
    for arguments, message in table:
        with pytest.raises(SystemExit) as stopped:
            program(*arguments)
        shown = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert message in shown.err + shown.out, arguments
        assert "Traceback" not in shown.err, arguments
    assert not (tmp_path / "never").exists()
