# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro import poutine

from inference.posterior import evaluate, moments
from inference.posteriors import distances
from inference.posteriors import table as posterior_table
from inference.posteriors.reference import Reference, flatten, reference
from inference.posteriors.table import COLUMNS, FLOOR
from inference.posteriors.training import MAX_SKIPPED, Config, Training
from inference.shared.errors import UserError
from models.posterior_guides import GUIDES
from models.posteriors import POSTERIORS, Posterior
from tests.inference.conftest import Program, read_csv

#: Options that make a run tiny.
TINY = ("--steps", 3, "--draws", 200, "--reference-draws", 60, "--reference-warm-up", 30)


def test_help(help_of: Callable[[str], str]) -> None:
    shown = help_of("posterior")
    assert all(name in shown for name in (*POSTERIORS, *GUIDES))


def test_a_tiny_run_and_going_on_with_it(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("zuko") is None:
        pytest.skip("zuko is not installed")  # importing it here would turn validation off
    out = tmp_path / "out"
    program("posterior", *TINY, "--posteriors", "two-moons", "--seeds", 0, "--out", out)
    found = read_csv(out / "results.csv")
    assert tuple(found[0]) == COLUMNS
    assert [row["guide"] for row in found] == [FLOOR, *GUIDES]
    for row in found[1:]:
        assert row["steps"] == "3"
        assert math.isfinite(float(row["sliced_wasserstein"]))
        assert 0 <= float(row["ks"]) <= float(row["ks_worst"]) <= 1
        assert row["modes"] in ("1", "2")
        draws = np.load(out / "draws" / f"two-moons-{row['guide']}-0.npz")["draws"]
        assert draws.shape == (200, 2)
    assert (out / "figures" / "two-moons.png").stat().st_size > 10_000
    assert not (out / "metrics.csv").exists()  # its rows are the results
    shown = capsys.readouterr().out
    assert "reference of two-moons: grid, 4 x 60 draws" in shown
    assert (out / "table.md").read_text() in shown
    against = reference(POSTERIORS["two-moons"](), out / "references", num_draws=60, warm_up=30)
    error, _ = distances.moment_errors(
        torch.from_numpy(draws).double(), against.draws.flatten(0, 1)
    )
    assert float(row["mean_error_worst"]) == pytest.approx(float(error.abs().max()), rel=1e-4)
    found_moments = read_csv(out / "moments.csv")
    assert [row["coordinate"] for row in found_moments] == ["z[0]", "z[1]"] * len(GUIDES)

    one = ("--guides", "normal", "--no-figures", "--out", out)
    program("posterior", *TINY, "--posteriors", "two-moons", "banana", "--seeds", 0, *one)
    again = read_csv(out / "results.csv")
    assert again[: len(found)] == found
    assert [(row["posterior"], row["guide"]) for row in again[len(found) :]] == [
        ("banana", FLOOR),
        ("banana", "normal"),
    ]
    assert "1 of 2 runs are there already" in capsys.readouterr().out


def test_errors_end_in_one_line(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    table: list[tuple[tuple[object, ...], str]] = [
        (("--posteriors", "banana", "no-such"), "--posteriors: expected some of schools-centred"),
        (("--guides", "no-such"), "--guides: expected some of normal"),
        (("--seconds", 0), "--seconds: expected a positive number, found 0"),
        (("--particles", 1), "--particles: expected an even number, for pairs of opposite noise"),
        (("--particles", 33), "--particles: expected an even number, for pairs of opposite noise"),
        (("--beta-start", 0), "--beta-start: expected a value in (0, 1], found 0.0"),
        (("--draws", 10), "--draws: expected at least 100, found 10"),
        (("--score-samples", 0), "--score-samples: expected at least 2, found 0"),
        (("--flow-learning-rate", 0), "--flow-learning-rate: expected a positive number"),
        (("--seeds", 0, 2**32), "--seeds: expected one at least, each in [0, 2^32)"),
        (("--out", tmp_path / "file" / "run"), "expected a writable folder"),
    ]
    for arguments, message in table:
        out = () if "--out" in arguments else ("--out", tmp_path / "run")
        with pytest.raises(SystemExit) as stopped:
            program("posterior", *arguments, *out)
        shown = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert message in shown.err, arguments
        assert "Traceback" not in shown.err, arguments


def test_a_step_without_a_finite_gradient_is_skipped() -> None:
    training = Training(POSTERIORS["banana"](), "normal", Config(steps=100))
    training.step()
    before = [p.detach().clone() for p in training.guide.parameters()]

    class Failing:
        """As Pyro for a value that rounding has put outside of its support."""

        def __call__(self, *_: object) -> torch.Tensor:
            raise ValueError("Expected value argument to be within the support")

    class Infinite(Failing):
        def __call__(self, *_: object) -> torch.Tensor:
            return sum((p.sum() for p in training.guide.parameters()), torch.zeros(())) * math.inf

    objective = training.objective
    for failing in (Failing(), Infinite()):
        training.objective = failing  # type: ignore[assignment]
        for _ in range(MAX_SKIPPED - 1):
            training.step()
        assert all(
            torch.equal(a, b) for a, b in zip(before, training.guide.parameters(), strict=True)
        )
        training.objective = objective
        training.step()
        before = [p.detach().clone() for p in training.guide.parameters()]
    training.objective = Failing()  # type: ignore[assignment]
    for _ in range(MAX_SKIPPED):
        training.step()
    with pytest.raises(ValueError, match=f"{MAX_SKIPPED + 1} steps in a row"):
        training.step()


@pytest.mark.parametrize("guide", ["normal", "implicit"])
def test_step_sizes_fall_along_half_a_cosine(guide: str) -> None:
    config = Config(steps=100, decay_start=0.4, particles=4, score_samples=16)
    training = Training(POSTERIORS["banana"](), guide, config)
    for steps, decay in ((0, 1.0), (40, 1.0), (60, 0.75), (70, 0.5), (80, 0.25), (100, 0.0)):
        training.steps_done = steps
        training.step()
        rate = training.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(training.rate * decay, abs=1e-12)
        if guide == "implicit" and steps:  # the first step makes the estimator
            (estimator,) = training.loss.estimators.values()
            assert estimator.learning_rate == pytest.approx(8e-3 * max(0.1, decay))


def test_data_are_tempered_and_the_prior_is_not() -> None:
    posterior = POSTERIORS["intercepts"]()
    config = Config(steps=100, beta_start=0.01, beta_share=0.5, particles=2)
    training = Training(posterior, "normal", config)
    for steps, beta in ((0, 0.01), (25, 0.1), (50, 1.0), (75, 1.0)):
        training.steps_done = steps
        training.step()
        assert training.beta == pytest.approx(beta)
        # What the loss is made of, not what Training calls its model.
        trace = poutine.trace(training.objective.model).get_trace(*posterior.args)
        scales = {n: site["scale"] for n, site in trace.nodes.items() if site["type"] == "sample"}
        assert scales.pop("y") == pytest.approx(4 * beta)  # 100 rows of 400
        assert {"mean", "spread", "slope", "noise", "intercept"} <= scales.keys()
        assert {*scales.values()} == {1.0}


def test_row_of_results_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as wide as the reference, and 3 standard deviations below or one above its mean."""
    # In place of a classifier, which takes a second: whether it sees standardized draws, in order.
    monkeypatch.setattr(distances, "c2st", lambda first, second: float((first - second).mean()))
    corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.double).repeat(50, 1)
    loc, scale = torch.tensor([3.0, -8.0]), torch.tensor([0.1, 5.0])
    std = math.sqrt(200 / 199)
    shift = torch.tensor([-3.0, 1.0], dtype=torch.double)
    against, draws = (loc + scale * z for z in (corners, std * shift + corners / 2))
    posterior = Posterior("corners", lambda: None, modes=lambda z: (z[:, 0] > 3).long())
    row = evaluate(draws, against, posterior)
    assert row["mean_error"] == pytest.approx(math.sqrt(5))
    assert row["mean_error_worst"] == pytest.approx(3)
    assert (row["std_error"], row["std_error_worst"]) == pytest.approx((0.5, 0.5))
    assert (row["ks"], row["ks_worst"]) == pytest.approx((0.75, 1))
    assert row["c2st"] == pytest.approx((-3 + 1) / 2)
    assert row["modes"] == 1
    # Of the squared distance along theta, (theta' shift)^2 varies by 10 / sqrt(8): 4.4 standard
    # errors of its mean over 256 directions.
    distance = row["sliced_wasserstein"] ** 2
    assert distance == pytest.approx(5 + 0.25 / std**2, abs=4.4 * 10 / math.sqrt(8 * 256))
    assert math.isnan(evaluate(draws, against, Posterior("corners", lambda: None))["modes"])


def test_moments_of_the_draws_come_before_those_of_the_reference() -> None:
    draws = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])
    against = torch.tensor([[[0.0, 7.0]], [[0.0, 7.0]], [[0.0, 10.0]]])
    found = Reference(against, ("a", "b"), "grid", 1.0, 1.0)
    posterior = Posterior("b", lambda: None, shown=("b",))
    assert moments(draws, found, posterior) == {"b": pytest.approx((3, 2, 8, math.sqrt(3)))}


def test_references_are_made_once(tmp_path: Path) -> None:
    posterior = POSTERIORS["banana"]()
    first = reference(posterior, tmp_path, num_draws=100)
    again = reference(posterior, tmp_path, num_draws=100)
    assert torch.equal(first.draws, again.draws)
    assert first.draws.shape == (4, 100, 2)
    assert reference(posterior, tmp_path, num_draws=50).draws.shape == (4, 50, 2)


@pytest.mark.parametrize("damage", ["cut", "other bytes", "empty", "flipped", "another file"])
def test_a_damaged_reference_is_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    posterior, path = POSTERIORS["banana"](), tmp_path / "banana.npz"
    first = reference(posterior, tmp_path, num_draws=100)
    whole = path.read_bytes()
    if damage == "another file":
        np.savez(path, a=np.zeros(3))
    else:
        middle = len(whole) // 2
        path.write_bytes(
            {
                "cut": whole[:middle],
                "other bytes": b"damaged",
                "empty": b"",
                "flipped": whole[: middle - 8] + bytes(16) + whole[middle + 8 :],
            }[damage]
        )
    with pytest.raises(UserError, match=r"banana\.npz: expected reference draws.*Delete the file"):
        reference(posterior, tmp_path, num_draws=100)
    path.unlink()
    assert torch.equal(reference(posterior, tmp_path, num_draws=100).draws, first.draws)


def test_exact_draws_have_the_moments_of_the_density(tmp_path: Path) -> None:
    # banana: E z2 = 1.5^2 / 2 - 1, Var z2 = 0.25 * 2 * 1.5^4 + 0.16.
    draws = reference(POSTERIORS["banana"](), tmp_path, num_draws=4000).draws.flatten(0, 1)
    std = torch.tensor([1.5, math.sqrt(0.5 * 1.5**4 + 0.16)], dtype=torch.double)
    error = (draws.mean(0) - torch.tensor([0.0, 0.125])) / std * math.sqrt(16_000)
    assert float(error.abs().max()) < 4.6
    # two-moons: two modes of equal mass at a distance of 2 along the first axis.
    z = reference(POSTERIORS["two-moons"](), tmp_path, num_draws=1000).draws.flatten(0, 1)
    assert float((z[:, 0] > 0).double().mean()) == pytest.approx(0.5, abs=4.4 * 0.5 / 4000**0.5)
    assert float(z.norm(dim=1).mean()) == pytest.approx(2.0, abs=0.1)


@pytest.mark.slow
def test_nuts_on_eight_schools(tmp_path: Path) -> None:
    found = reference(POSTERIORS["schools-centred"](), tmp_path, num_draws=1000)
    assert found.r_hat < 1.01
    mean, std = (f(found.draws.flatten(0, 1)) for f in (lambda z: z.mean(0), lambda z: z.std(0)))
    at = [found.labels.index(name) for name in ("mu", "tau")]
    # By quadrature: mu 4.40, 3.32; tau 3.60, 3.22. Standard errors at 2000 effective draws: 0.07.
    assert mean[at].tolist() == pytest.approx([4.40, 3.60], abs=0.35)
    assert std[at].tolist() == pytest.approx([3.32, 3.22], abs=0.45)


def test_a_short_run_of_nuts(tmp_path: Path) -> None:
    found = reference(POSTERIORS["schools-noncentred"](), tmp_path, num_draws=15, warm_up=10)
    assert found.source == "nuts"
    assert found.draws.shape[0::2] == (4, 10)
    assert found.labels[:2] == ("eta[0]", "eta[1]")
    assert "nuts, 4 x" in str(found)


def test_flatten() -> None:
    draws, labels = flatten({"b": torch.ones(3, 2), "a": torch.zeros(3)})
    assert labels == ("a", "b[0]", "b[1]")
    assert draws.tolist() == [[0.0, 1.0, 1.0]] * 3


def test_table_names_the_nearest() -> None:
    row = dict.fromkeys(COLUMNS[3:], 0.5)
    found = {
        ("banana", FLOOR, 0): {**row, "sliced_wasserstein": 0.05},
        ("banana", "normal", 0): {**row, "sliced_wasserstein": 0.8, "modes": math.nan},
        ("banana", "normal", 1): {**row, "sliced_wasserstein": 0.6},
        ("banana", "implicit", 0): {**row, "sliced_wasserstein": 0.3},
    }
    text = posterior_table.table(found, {}, 30.0, "wall")
    assert "| banana | 0.700 ± 0.141 | **0.300** | 0.050 |" in text
    assert "seeds 0, 1" in text


def test_reference_prints_what_it_is_worth() -> None:
    text = str(Reference(torch.zeros(4, 10, 1), ("a",), "nuts", 1.0042, 321.4))
    assert text == "nuts, 4 x 10 draws, r-hat 1.0042, effective sample size 321"
