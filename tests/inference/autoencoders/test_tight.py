# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Tight log p(x), posterior gap, their benchmark and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from inference.autoencoders.plane_posterior import PlanePosterior, plane_posterior
from inference.autoencoders.tight import (
    FILE_NAME,
    Tight,
    load,
    paired,
    save,
    summary,
    tight_evaluation,
)
from inference.shared.errors import UserError
from inference.shared.run import RunFolder
from models.guides import DeviatingGuide, GaussianGuide
from models.vae import VAE
from tests.inference.conftest import TINY, Program, read_csv

FAST = Tight(
    chains=4,
    temperatures=10,
    refinement_steps=40,
    start_samples=256,
    elbo_samples=1000,
    energy_updates=20,
)
SMALL = (
    *("--points", 8, "--chains", 2, "--temperatures", 2, "--leapfrog", 1, "--elbo-samples", 4),
    *("--refinement-steps", 1, "--start-samples", 64, "--energy-updates", 1),
    *("--bound-samples", 2, "--bound-mixing", 2),
)


class LinearDecoder(nn.Module):
    """x ~ N(W z, 1): posterior and evidence of the VAE are Gaussian."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, latent: Tensor) -> Distribution:
        normal = torch.distributions.Normal(latent @ self.weight.T, 1.0)
        return torch.distributions.Independent(normal, 1)


def linear_vae(head: nn.Module, weight: Tensor) -> VAE:
    return VAE(nn.Identity(), head, LinearDecoder(weight), latent_dim=2)


@pytest.mark.parametrize("guide", ["gaussian", "implicit"])
def test_gap_is_the_divergence_from_the_posterior(guide: str) -> None:
    weight, x = torch.tensor([[1.0, 0.4], [0.2, 1.0], [0.5, -0.5]]), torch.randn(20, 3)
    head: nn.Module = GaussianGuide(3, 2)
    if guide == "implicit":  # it starts as its Gaussian base, so the truth is the same
        head = DeviatingGuide(GaussianGuide(3, 2), 3, 2, noise_dim=4, hidden_dims=(8,))
    vae = linear_vae(head, weight)
    with torch.no_grad():
        posterior = GaussianGuide.forward(head if guide == "gaussian" else head.base, x)  # type: ignore[arg-type]
    evidence = MultivariateNormal(torch.zeros(3), weight @ weight.T + torch.eye(3))
    exact = evidence.log_prob(x).double().numpy()
    precision = torch.eye(2) + weight.T @ weight
    true = MultivariateNormal(
        x @ weight @ precision.inverse(), precision_matrix=precision.expand(20, 2, 2)
    )
    q = MultivariateNormal(posterior.mean, scale_tril=torch.diag_embed(posterior.stddev))
    gap = torch.distributions.kl_divergence(q, true).double().mean().item()

    arrays = tight_evaluation(vae, x, FAST, explicit=guide == "gaussian")
    assert np.abs(arrays["log_px"] - exact).max() < 0.02
    found = summary(arrays)
    # 1000 draws of 20 images: an error of the mean of about 0.01. The entropy of an implicit guide
    # comes from a fit, whose misfit makes the gap smaller, never much larger.
    assert found["ais_gap"] == pytest.approx(gap, abs=0.05)
    assert ("elbo_energy" in arrays) == (guide == "implicit")
    assert ("ais_gap_bound" in found) == (guide == "implicit")
    if guide == "implicit":  # nothing deviates yet, so the bound is exact, but for draws: sd 0.05
        assert found["ais_gap_bound"] == pytest.approx(gap, abs=0.2)
    assert found["ais_chain_error"] < 0.01


def test_random_state_is_left_alone() -> None:
    vae = linear_vae(GaussianGuide(3, 2), torch.randn(3, 2))
    before = torch.get_rng_state()
    one, again = (tight_evaluation(vae, torch.ones(4, 3), FAST, explicit=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(one["log_px"], again["log_px"])


def test_paired_needs_the_same_images(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    one = {"log_px": np.arange(5.0), "elbo": np.zeros(5)}
    other = {"log_px": np.arange(5.0) - np.array([1.0, 1, 1, 1, 2]), "elbo": np.zeros(5)}
    for name, arrays, images in (("a", one, x), ("b", other, x), ("c", one, x + 1)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, arrays, images)
    mean, error = paired(load(tmp_path / "a"), load(tmp_path / "b"))
    assert mean == pytest.approx(1.2)
    assert error == pytest.approx(math.sqrt(0.2 / 5))
    with pytest.raises(UserError, match="same images"):
        paired(load(tmp_path / "a"), load(tmp_path / "c"))
    with pytest.raises(UserError, match="--ais"):
        load(tmp_path)
    file = tmp_path / "a" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="--ais"):
        load(tmp_path / "a")


def test_plane_posterior_of_a_linear_model() -> None:
    weight, x = torch.tensor([[2.0, 0.4], [0.2, 1.0], [0.5, -0.5]]), torch.randn(1, 3)
    vae = linear_vae(GaussianGuide(3, 2), weight)
    with torch.no_grad():
        vae.head.log_scale.bias.sub_(0.5)
        posterior = vae.posterior(x)
    evidence = MultivariateNormal(torch.zeros(3), weight @ weight.T + torch.eye(3))
    precision = torch.eye(2) + weight.T @ weight
    true = MultivariateNormal(x @ weight @ precision.inverse(), precision_matrix=precision)
    q = MultivariateNormal(posterior.mean, torch.diag_embed(posterior.stddev.square()))
    found = plane_posterior(vae, x)
    assert found.log_px == pytest.approx(evidence.log_prob(x).item(), abs=1e-3)
    # Cells leave out what happens within them, and 400,000 draws their noise.
    assert found.kl == pytest.approx(torch.distributions.kl_divergence(q, true).item(), rel=0.02)
    assert found.negentropy == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="2 latents and 1 image"):
        plane_posterior(vae, x.expand(2, 3))


def test_negentropy_of_two_equal_modes() -> None:
    """Two normals of scale .1 a distance of 4 apart: log sqrt(1 + 4 / .01) less log 2."""
    axis = torch.linspace(-4, 4, 1601)[1::2]
    normal = torch.distributions.Normal(0.0, 0.1)
    first = torch.logaddexp(normal.log_prob(axis - 2), normal.log_prob(axis + 2))
    log_masses = (first.unsqueeze(1) + normal.log_prob(axis)).double()
    posterior = PlanePosterior(
        log_px=0.0,
        log_masses=log_masses - log_masses.logsumexp((0, 1)),
        centres=(axis, axis),
        draws=torch.zeros(1, 2),
        kl=0.0,
    )
    expected = 0.5 * math.log(1 + 4 / 0.01) - math.log(2)
    assert posterior.negentropy == pytest.approx(expected, abs=1e-3)


def test_evaluate_ais_and_against(
    program: Program,
    sample_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [tmp_path / f"sbmnist-mlp-gaussian-gain-0.5-seed{seed}" for seed in range(2)]
    for seed, run in enumerate(runs):
        options = ("--steps", 2, "--data-dir", sample_dir, "--seed", seed, "--out", run)
        program("vae", "sbmnist-mlp-gaussian", *TINY, *options)
        program("evaluate", run, "--ais", *SMALL)
    capsys.readouterr()
    program("evaluate", runs[0], "--ais", *SMALL, "--against", runs[1])
    shown = capsys.readouterr().out
    assert "annealed importance sampling (8 images, 2 chains of 2 temperatures" in shown
    assert "posterior gap" in shown
    assert f"nats against {runs[1]}" in shown
    results = json.loads((runs[0] / "results.json").read_text())
    assert results["ais_gap"] == pytest.approx(results["ais_log_px"] - results["ais_elbo"])
    assert results["test_points"] == 8  # what the run itself recorded is still there

    times = tmp_path / "steps.csv"
    times.write_text(
        "row,step_ms,model_ms,score_ms\nsbmnist-mlp-gaussian --gain 0.5,60000,60000,0\n"
    )
    drawn: list[np.ndarray] = []
    plot = Axes.plot

    def keep(axes: Axes, x: np.ndarray, *given: Any, **options: Any) -> Any:
        drawn.append(x)
        return plot(axes, x, *given, **options)

    monkeypatch.setattr(Axes, "plot", keep)
    program("vae_plots", *runs, "--out", tmp_path / "figures", "--step-times", times)
    assert len(drawn) == 2
    for minutes in drawn:  # a step a minute
        assert np.array_equal(minutes, [2.0])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *(f"{run.name}.png" for run in runs),
        "log_px.png",
    }
    times.write_text("row,step_ms,model_ms,score_ms\nsbmnist-mlp-gaussian,60000,60000,0\n")
    with pytest.raises(SystemExit):  # the time of a run with other options is another
        program("vae_plots", *runs, "--out", tmp_path / "figures", "--step-times", times)
    assert "expected a row for" in capsys.readouterr().err


def test_bench_vae_goes_on_where_it_was_stopped(
    program: Program, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    rows = ("sbmnist-mlp-gaussian", "sbmnist-mlp-implicit", "sbmnist-mlp-sivi --gain 0.5")
    options = ("--steps", 2, "--timed-steps", 1, "--warmup", 2, "--test-points", 8)
    options += ("--test-samples", 4, *SMALL, "--data-dir", sample_dir, "--out", out)
    program("bench", "vae", "--rows", rows[0], "--seeds", 0, *options)
    first = (out / f"{rows[0]}-seed0" / "results.json").stat().st_mtime_ns
    # A run that was stopped before its first checkpoint is started anew, evaluated or not.
    (out / f"{rows[1]}-seed0").mkdir()
    (out / f"{rows[1]}-seed0" / "config.json").write_text("{}")
    (out / f"{rows[1]}-seed0" / "results.json").write_text('{"ais_log_px": 0}')
    capsys.readouterr()
    program("bench", "vae", "--rows", *rows, "--seeds", 0, *options)
    assert (out / f"{rows[0]}-seed0" / "results.json").stat().st_mtime_ns == first
    gaussian, implicit, sivi = read_csv(out / "results.csv")
    assert [gaussian["row"], implicit["row"], sivi["row"]] == [*rows]
    assert RunFolder.read_config(out / "sbmnist-mlp-sivi-gain-0.5-seed0")["gain"] == 0.5
    # The last one's density is a bound, and its gap another.
    assert [gaussian["density"], implicit["density"], sivi["density"]] == ["1", "0", "0"]
    assert float(gaussian["score_ms"]) == 0 < float(implicit["score_ms"])
    assert gaussian["against_gaussian"] == ""
    difference = float(implicit["ais_log_px"]) - float(gaussian["ais_log_px"])
    assert float(implicit["against_gaussian"]) == pytest.approx(difference, abs=2e-3)
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"| {row} | 0 | 2 |" in table for row in rows)
    # A call for other rows leaves those that are there where they are.
    steps, other = read_csv(out / "steps.csv"), "sbmnist-mlp-fullcov"
    program("bench", "vae", "--rows", rows[0], other, "--seeds", 0, *options)
    assert read_csv(out / "steps.csv")[:3] == steps
    assert [one["row"] for one in read_csv(out / "results.csv")] == [*rows, other]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        program("bench", "vae", "--rows", *rows, "--seeds", 0, *options, "--budget-seconds", 9)
    assert "budget_seconds is 3600.0 in the run, 9.0 here" in capsys.readouterr().err


def test_bench_vae_times_new_rows_at_the_pace_of_the_others(
    program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    """Also where a call names none of them."""
    options = ("--steps", 2, "--timed-steps", 1, "--warmup", 2, "--test-points", 8)
    options += ("--test-samples", 4, *SMALL, "--data-dir", sample_dir, "--out", tmp_path)
    slow = "sbmnist-mlp-gaussian,1000000,1000000,0"
    (tmp_path / "steps.csv").write_text(f"row,step_ms,model_ms,score_ms\n{slow}\n")
    program("bench", "vae", "--rows", "sbmnist-mlp-fullcov", "--seeds", 0, *options)
    gaussian, other = read_csv(tmp_path / "steps.csv")
    assert float(gaussian["step_ms"]) == 1e6
    assert 1e5 < float(other["step_ms"]) < 1e7


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["nothing"], "expected MNIST presets of inference.vae, each with options of it or none"),
        (["25gaussians-implicit"], "found '25gaussians-implicit'"),
        (["sbmnist-mlp-implicit --steps 9"], "expected no --steps in a row"),
        (["sbmnist-mlp-flow --valid-every 9"], "expected no --valid-every in a row"),
        (["sbmnist-mlp-implicit --fantasy-share 2"], "--fantasy-share"),
        (["sbmnist-mlp-gaussian"] * 2, "expected different ones"),
        (
            ["sbmnist-mlp-gaussian", "sbmnist-mlp-fullcov --train-on-valid"],
            "--train-on-valid: expected a fixed number of --steps",
        ),
    ],
)
def test_bench_vae_refuses_rows(
    rows: list[str],
    message: str,
    program: Program,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        program("bench", "vae", "--rows", *rows, "--out", tmp_path / "bench")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()
