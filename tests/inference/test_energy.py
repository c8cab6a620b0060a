# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from inference.energies.presets import PRESETS, Config, Guide
from inference.energy import Training, evaluate
from inference.shared import grid
from models.energies import ENERGIES, Energy, log_normalizer
from tests.inference.conftest import Program, read_csv

#: Options that make a run tiny.
FEW = ("--steps", 2, "--draws", 1000)
TINY = (*FEW, "--batch-size", 16, "--flow-batch-size", 16)

GAUSSIAN = Energy("gaussian", lambda z: 0.5 * z.square().sum(-1))


def test_help(help_of: Callable[[str], str]) -> None:
    shown = help_of("energy")
    assert all(preset in shown for preset in PRESETS)


def test_two_steps_of_each_guide(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    program("energy", "u3", *TINY, "--seeds", 0, 1, "--out", out)
    shown = capsys.readouterr().out
    rows = read_csv(out / "results.csv")
    assert [(row["guide"], row["seed"]) for row in rows] == [
        (guide, seed) for seed in "01" for guide in ("implicit", "flow", "gaussian")
    ]
    for row in rows:
        assert row["guide"] in shown
        assert row["steps"] == "2"
        assert math.isfinite(float(row["kl"]))
        assert row["of_modes"] == "4"
        assert (row["kl_exact"] == "") == (row["guide"] == "implicit")
        folder = out / f"{row['guide']}-seed{row['seed']}"
        assert json.loads((folder / "results.json").read_text())["kl"] == float(row["kl"])
        assert (folder / "metrics.csv").read_text().count("\n") == 3
    assert (out / "samples.png").stat().st_size > 10_000


def test_same_seed_same_result(program: Program, tmp_path: Path) -> None:
    results = []
    for out in (tmp_path / "one", tmp_path / "two"):
        program("energy", "u2", *FEW, "--guide", "implicit", "--seed", 3, "--out", out)
        results.append(json.loads((out / "implicit-seed3" / "results.json").read_text()))
        results[-1].pop("seconds")
    assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore:Encountered (NaN|\\+?inf)")
def test_errors_end_in_one_line(
    program: Program,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    tiny = ("energy", "u1", *FEW, "--guide", "gaussian")
    program(*tiny, "--out", tmp_path / "run")
    table: list[tuple[tuple[object, ...], str]] = [
        (("energy", "u5"), "u5"),
        ((*tiny, "--no-such-option", 1), "no-such-option"),
        ((*tiny, "--out", tmp_path / "file" / "run"), "expected a writable folder"),
        ((*tiny, "--out", tmp_path / "run"), "expected a new run folder, found a run"),
        ((*tiny, "--beta-start", 0), "--beta-start: expected a value in (0, 1], found 0.0"),
        ((*tiny, "--budget-seconds", 0), "--budget-seconds: expected a positive number"),
        ((*tiny, "--noise-dim", 1), "--noise-dim: expected at least 2"),
        ((*tiny, "--moves", -1), "--moves: expected no negative number, found -1"),
        ((*tiny, "--langevin-step-size", 0), "--langevin-step-size: expected a positive number"),
        ((*tiny, "--jump-scale", 0), "--jump-scale: expected a positive number"),
        ((*tiny, "--flow-learning-rate", -1), "--flow-learning-rate: expected a positive number"),
        ((*tiny, "--seeds", 0, -1), "--seeds: expected one at least, each in [0, 2^32)"),
        ((*tiny, "--flow-bins", 9), "--flow-bins: the gaussian guide does not read it"),
        (("energy", "u1", "--num-score-samples", 3), "--num-score-samples: expected --score-folds"),
        (
            (*tiny, "--gaussian-learning-rate", 1e30, "--out", tmp_path / "diverged"),
            "gaussian, seed 0: the run failed",
        ),
    ]
    capsys.readouterr()
    for arguments, message in table:
        with pytest.raises(SystemExit) as stopped:
            program(*arguments)
        shown = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert message in shown.err + shown.out, arguments
        assert "Traceback" not in shown.err, arguments
        assert "--resume" not in shown.err, arguments  # which it does not have


# ---- schedules ---------------------------------------------------------------------------------


def small(guide: Guide, **options: Any) -> Training:
    tiny = {"batch_size": 16, "gaussian_batch_size": 16, "num_score_samples": 16, "moves": 0}
    return Training(Config(**{"energy": "u3", "steps": 100, **tiny, **options}), guide)


def test_temperature_falls_geometrically_over_its_share() -> None:
    training = small("gaussian", beta_start=0.01, beta_share=0.5)
    for steps, beta in ((0, 0.01), (25, 0.1), (50, 1.0), (75, 1.0)):
        training.steps_done = steps
        assert training.beta == pytest.approx(beta)
    training.steps_done, training.seconds = 25, 0.3 * training.config.budget_seconds
    assert training.beta == pytest.approx(0.01**0.4)  # whichever limit comes first
    assert small("gaussian", beta_share=0.0).beta == 1


def test_loss_of_a_step_is_that_of_the_tempered_energy() -> None:
    training = small("gaussian", beta_start=0.1)
    z = _again(lambda: next(training.draws(16)))
    with torch.no_grad():
        expected = (training.posterior().log_prob(z) + 0.1 * training.energy(z)).mean()
    assert _again(training.step) == pytest.approx(float(expected), rel=1e-5)


def _again(call: Callable[[], Any]) -> Any:
    pyro.set_rng_seed(1)
    return call()


def test_learned_score_starts_from_that_of_the_tempered_density() -> None:
    training = small("implicit", beta_start=0.1)
    estimator = training.loss.score_estimator(2, 0)
    z = 3 * torch.randn(50, 2, requires_grad=True)
    for steps, beta in ((0, 0.1), (20, 0.1**0.5), (40, 1.0)):
        training.steps_done = steps
        (expected,) = torch.autograd.grad(-beta * training.energy(z).sum(), z)
        torch.testing.assert_close(estimator(z, z), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guide", ["gaussian", "implicit"])
def test_step_sizes_fall_along_half_a_cosine(guide: Guide) -> None:
    training = small(guide, decay_start=0.4)
    training.step()  # makes the estimator
    for steps, decay in ((0, 1.0), (40, 1.0), (60, 0.75), (70, 0.5), (80, 0.25), (100, 0.0)):
        training.steps_done = steps
        assert training.decay == pytest.approx(decay, abs=1e-12)
        training.step()
        rate = training.optim.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(training.rate * decay, abs=1e-12)
        if guide == "implicit":
            learned = training.loss.estimators["z"].learning_rate
            assert learned == pytest.approx(8e-3 * max(0.1, decay))


def test_draws_are_of_the_running_average() -> None:
    training = small("gaussian", average_decay=0.75)

    def locs() -> tuple[torch.Tensor, torch.Tensor]:
        average, last = (
            q.get_parameter("loc").detach().clone()
            for q in (training.average.module, training.posterior)
        )
        return average, last

    training.step()
    before, first = locs()
    assert torch.equal(before, first)
    assert bool((first != 0).all())
    for _ in range(2):
        training.step()
        average, last = locs()
        torch.testing.assert_close(average, 0.75 * before + 0.25 * last)
        before = average
    with torch.no_grad():
        training.posterior.get_parameter("loc").fill_(1e6)
    assert float(next(training.draws(100)).max()) < 100


# ---- the row of results ------------------------------------------------------------------------


def test_kl_by_the_density_of_the_guide() -> None:
    training = small("gaussian", spread=1.5, draws=100)
    training.energy = GAUSSIAN
    row, _ = evaluate(training, math.log(2 * math.pi))
    # log q/p = (s^2 - 1) / 2 times a chi-square variable of variance 4, and a constant: 4.4
    # standard errors of 100,000 draws. The soft box, 4 s away, adds less than 1e-4.
    tolerance = 4.4 * (1.5**2 - 1) / math.sqrt(100_000)
    assert row["kl_exact"] == pytest.approx(gaussian_kl(0.0, 1.5), abs=tolerance)


def test_smallest_share_is_that_of_the_mode_with_fewest_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = small("gaussian", energy="u1", draws=400)
    z = torch.tensor([[-2.0, 0.0]] * 300 + [[2.0, 0.0]] * 100)
    monkeypatch.setattr(training, "draws", lambda num_draws: [z[:num_draws]])
    row, counts = evaluate(training, 0.0)
    assert counts.sum() == 400
    expected = grid.divergence(counts, ENERGIES["u1"]).expected
    assert (row["modes"], row["of_modes"]) == (2, 2)
    # U1 is symmetric: a mode with a quarter of the draws has the smaller share of its own.
    assert expected[0] == pytest.approx(expected[1], rel=1e-6)
    assert row["smallest_share"] == pytest.approx(0.25 / expected[0])


# ---- the divergence ----------------------------------------------------------------------------


def gaussian_kl(loc: float, scale: float) -> float:
    """KL(N(loc, scale^2 I) || N(0, I)) in the plane, loc along one axis."""
    return 0.5 * loc**2 + scale**2 - 1 - 2 * math.log(scale)


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.5, 0.8), (2.0, 1.3)])
def test_divergence_of_gaussians(loc: float, scale: float) -> None:
    draws = (scale * torch.randn(100_000, 2) + torch.tensor([loc, 0.0]) for _ in range(5))
    found = grid.divergence(grid.count(draws), GAUSSIAN)
    # Sampling error: the standard deviation of log q/p is below 3 nats, over the root of 500,000,
    # 4.4 times; and what cells with few draws leave of the bias.
    tolerance = 0.021 * (loc > 0) + 0.4 * found.correction
    for estimate in (found.kl, found.kl_coarse):
        assert estimate == pytest.approx(gaussian_kl(loc, scale), abs=tolerance)
    assert found.kl_coarse <= found.kl + 1e-3


@pytest.mark.parametrize("name", ENERGIES)
def test_draws_of_the_density_itself_have_no_divergence(name: str) -> None:
    energy = ENERGIES[name]
    draws = grid.sample(energy, 1_000_000, torch.Generator().manual_seed(0))
    found = grid.divergence(grid.count(draws.split(250_000)), energy)
    assert abs(found.kl) < 0.4 * found.correction
    assert abs(found.kl_coarse) < 1e-3
    assert found.found == len(found.expected)
    for share, expected in zip(found.shares, found.expected, strict=True):
        assert share == pytest.approx(expected, abs=4.4 * math.sqrt(0.25 / 1e6))
    log_z = log_normalizer(energy)
    # E[-U] - log Z is minus the entropy: the same by draws and on the grid.
    masses = grid.cell_log_masses(energy)
    cell = 2 * math.log(2 * grid.LIMIT / grid.SIZE)
    entropy = -float((masses.exp() * (masses - cell)).sum())
    assert float(energy(draws).mean()) + log_z == pytest.approx(entropy, abs=5e-3)


def test_what_happens_within_a_cell_shows_in_the_finer_grid() -> None:
    # Draws on lines 0.1 apart: a comb that the coarse cells, as wide, do not see.
    z = torch.randn(500_000, 2)
    z[:, 0] = ((z[:, 0] * 10).floor() + 0.25) / 10
    found = grid.divergence(grid.count([z]), GAUSSIAN)
    assert abs(found.kl_coarse) < 2e-3
    assert found.kl == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.parametrize(("name", "number"), [("u1", 2), ("u2", 1), ("u3", 4), ("u4", 3)])
def test_modes(name: str, number: int) -> None:
    energy = ENERGIES[name]
    labels = grid.modes(energy)
    assert labels.max() == number
    draws = grid.sample(energy, 100_000, torch.Generator().manual_seed(0)).float()
    # All to the left of z1 = 0, where the left mode of U1, or the ridge before it parts, is.
    left = draws[draws[:, 0] < 0]
    found = grid.divergence(grid.count([left]), energy)
    assert found.found == {"u1": 1, "u2": 1, "u3": 1, "u4": 1}[name]
    assert found.shares[-1] == (0 if number > 1 else pytest.approx(found.expected[0], abs=0.02))


def test_draws_outside_count_at_the_border_and_nan_is_refused() -> None:
    far = torch.full((10, 2), 1e6)
    counts = grid.count([far])
    assert counts[-1, -1] == 10
    assert math.isfinite(grid.divergence(counts, ENERGIES["u1"]).kl)
    with pytest.raises(ValueError, match="expected finite draws"):
        grid.count([torch.full((1, 2), math.nan)])
