# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The comparison of score estimators as a user runs it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.score import ESTIMATORS, MOMENTS, GaussianScore, Run, Score
from inference.scores import plots as score_plots
from inference.scores.table import COLUMNS, Key, Row, table, write
from inference.scores.table import read as read_runs
from models.targets import TARGETS
from pyro_ardae.score import ARDAE
from tests.inference.conftest import Program, read_csv

SMALL = (
    *("--num-contexts", 4, "--num-samples", 8, "--eval-contexts", 4, "--eval-samples", 4),
    *("--draws", 8, 16),
)


def test_help(help_of: Callable[[str], str]) -> None:
    shown = help_of("score")
    assert all(name in shown for name in (*ESTIMATORS, *TARGETS))


def test_run_then_go_on(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ("--seconds", 0.2, *SMALL, "--no-figures", "--out", run)
    targets = ("--targets", "mixture2", "moving8")
    program("score", "--estimators", "ardae", *targets, "--seeds", 0, *options)
    rows = read_csv(run / "metrics.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 2 * len(MOMENTS)  # two targets, two numbers of draws
    for row in rows:
        assert row["estimator"] == "ardae"
        assert math.isfinite(float(row["error"]))
        assert int(row["updates"]) >= 1
        updates = float(row["cpu_seconds"]) / int(row["updates"])
        assert float(row["update_ms"]) == pytest.approx(1e3 * updates, rel=0.01)
    # An update may overrun a moment, the moments come in order.
    seconds = [float(row["cpu_seconds"]) for row in rows[: 2 * len(MOMENTS)]]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 0.2

    capsys.readouterr()
    program("score", "--estimators", "ardae", "kde", *targets, "--seeds", 0, *options)
    shown = capsys.readouterr().out
    assert "2 of 4 runs are there already" in shown
    again = read_csv(run / "metrics.csv")
    assert again[: len(rows)] == rows
    assert [(row["estimator"], row["updates"]) for row in again[len(rows) :]] == [("kde", "0")] * 4
    text = (run / "table.md").read_text()
    assert text in shown
    assert "| target | ardae | kde | Gaussian, exact moments |" in text
    assert (run / "command.txt").read_text().count("\n") == 2


def test_figures(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_plots, "LEVELS", (0.1, 1.0))
    monkeypatch.setattr(score_plots, "ARROWS", 8)
    run = tmp_path / "run"
    program(
        *("score", "--estimators", "ardae:depth=1,num_folds=2", "gaussian"),
        *(
            "--targets",
            "ring",
            "--seeds",
            0,
            1,
            "--seconds",
            0.02,
            "--figure-seconds",
            0.01,
            *SMALL,
            "--out",
            run,
        ),
    )
    for name in ("errors", "fields", "levels"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--estimators", "ardea"), "--estimators: expected some of ardae, .* found ardea"),
        (("--estimators", "ardae:deep=3"), "expected options of 'ardae', .* 'deep'"),
        (("--estimators", "ardae:depth=0"), "expected options of 'ardae', .* depth >= 1, got 0"),
        (("--estimators", "kde:3"), "expected options of 'kde'"),
        (("--targets", "ring", "rings"), "--targets: expected some of mixture1, .* found rings"),
        (("--num-samples", 2), "--num-samples: expected at least 8, found 2"),
        (("--draws", 2), "--draws: expected 3 or more"),
        (("--seconds", 0), "--seconds: expected a positive number"),
        (("--seeds",), "--seeds: expected one at least"),
        (("--seeds", 0, -1), "--seeds: expected one at least, each in"),
        (("--out", "/proc/none"), "/proc/none: expected a writable folder"),
    ],
)
def test_errors_end_in_one_line(
    options: tuple[object, ...],
    message: str,
    program: Program,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program("score", "--out", tmp_path / "run", *options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_other_options_need_another_folder(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        *("--estimators", "gaussian", "--targets", "ring", "--seeds", 0, *SMALL),
        *("--no-figures", "--out", tmp_path / "run"),
    )
    program("score", *options)
    with pytest.raises(SystemExit):
        program("score", *options, "--seconds", 3)
    assert "seconds is 20.0 in the run, 3.0 here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("target_name", ["mixture2", "thin"])
def test_every_estimator(name: str, target_name: str) -> None:
    target = TARGETS[target_name]()
    options = Score(num_contexts=4, num_samples=16, eval_contexts=3, eval_samples=5)
    run = Run(ESTIMATORS[name](target.dim, target.context_dim), target, 0, options)
    assert run.learns == (name not in ("stein", "spectral", "kde", "gaussian"))
    next(run.train(1.0), None)
    row = run.evaluate(16)
    assert row["updates"] == run.learns
    assert math.isfinite(row["error"])


def test_a_seed_fixes_everything_but_the_time() -> None:
    def error(seed: int) -> float:
        torch.manual_seed(seed)
        target = TARGETS["moving8"]()
        run = Run(ARDAE(8, 4), target, seed, Score(num_contexts=4, num_samples=8))
        for _ in zip(range(3), run.train(60.0), strict=False):
            pass
        return run.evaluate(8)["error"]

    assert error(0) == error(0) != error(1)


def test_evaluation_is_on_other_draws_than_training() -> None:
    class Seen(ARDAE):
        def update(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(samples)
            return super().update(samples, *args, **kwargs)

        def forward(self, value: Tensor, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(value)
            return super().forward(value, samples, *args, **kwargs)

    seen: list[Tensor] = []
    target = TARGETS["mixture2"]()
    options = Score(num_contexts=4, num_samples=8, eval_contexts=4, eval_samples=8)
    run = Run(Seen(target.dim, target.context_dim), target, 0, options)
    next(run.train(60.0))
    run.evaluate(8)
    trained, evaluated = seen
    assert trained.shape == evaluated.shape
    assert not bool((trained == evaluated).any())


def test_a_moving_target_is_evaluated_where_it_is() -> None:
    target = TARGETS["moving8"]()
    now = 50

    class Exact(GaussianScore):
        def forward(
            self,
            value: Tensor,
            samples: Tensor,
            context: Tensor | None = None,
            *,
            center: Tensor | None = None,
        ) -> Tensor:
            assert context is not None
            return target.at(now).score(value, context)

    run = Run(Exact(8, 4), target, 0, Score(eval_contexts=4, eval_samples=4))
    run.updates = 50
    assert run.evaluate(4)["error"] < 1e-9
    now = 0
    assert run.evaluate(4)["error"] > 1e-3


def test_gaussian_score_is_unbiased_for_a_gaussian() -> None:
    target = TARGETS["thin"]()
    context = target.contexts(20_000)
    samples, value = target.sample(12, context), target.sample(1, context)
    value = value[:, :1].expand(1, 20_000, 2)
    estimate = GaussianScore(2)(value, samples)[0]
    error = estimate.std(0) / len(estimate) ** 0.5
    assert ((estimate.mean(0) - target.score(value, context)[0, 0]).abs() < 5 * error).all()
    few = GaussianScore(2)(value, samples[:3])
    torch.testing.assert_close(few, -(value - samples[:3].mean(0)) / samples[:3].var(0))


def test_table_and_file(tmp_path: Path) -> None:
    def rows(*errors: float) -> list[Row]:
        return [
            dict.fromkeys(COLUMNS[3:], 0.0)
            | {"draws": draws, "error": error, "update_ms": 2.0, "query_ms": 4.0}
            for error in errors
            for draws in (64.0, 512.0)
        ]

    runs: dict[Key, list[Row]] = {
        ("ardae", "ring", 0): rows(0.9, 0.1),
        ("ardae", "ring", 1): rows(0.9, 0.4),
        ("ardae", "ring", 2): rows(0.9, 0.2),
        ("dae", "ring", 0): rows(math.nan),
        ("dae", "ring", 1): rows(0.5),
        ("dae", "thin", 0): rows(0.3),
    }
    write(tmp_path / "metrics.csv", runs)
    again = read_runs(tmp_path / "metrics.csv")
    assert str(again) == str(runs)  # a nan differs from itself
    lines = table(runs, {"ring": 0.93, "thin": 0.0}, "What was run.", [64, 512]).splitlines()
    assert lines[0] == "What was run."
    assert "| ring | 0.2 (0.4) | inf (inf) | 0.93 |" in lines
    assert "| thin |  | 0.3 | 0 |" in lines
    assert "| ring | 2 / 4 | 2 / 4 |" in lines
