# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Every row of the VAE benchmark in training, without the program around it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from inference.autoencoders.options import EXPLICIT, SCORED, Config
from inference.autoencoders.presets import (
    PAPER_PRESETS,
    PRESETS,
    build_data,
    build_loss,
    build_vae,
    check,
)
from inference.autoencoders.surrogate import surrogate_loss
from inference.autoencoders.training import AVERAGE_EVERY, Training
from models.vae import VAE
from pyro_ardae import TraceImplicit_ELBO
from tests.conftest import assert_equal
from tests.inference.conftest import TINY, Program, read_csv


def tiny(preset: str, directory: Path, **changes: object) -> Config:
    options = {"batch_size": 8, "precision": "fp32", "data_dir": directory, **changes}
    return dataclasses.replace(PRESETS[preset][1], **options)


def test_the_rows_of_the_paper_and_their_peers() -> None:
    guides = ("gaussian", "fullcov", "auxiliary", "flow", "implicit", "hierarchical-implicit")
    expected = {
        f"{data}-{architecture}-{guide}"
        for data in ("sbmnist", "dbmnist")
        for architecture in ("mlp", "conv", "resconv")
        for guide in guides
    }
    expected |= {"sbmnist-mlp-sivi", "sbmnist-mlp-avb"}
    expected |= {"sbmnist-mlp2-gaussian", "sbmnist-mlp2-implicit"}
    expected |= {"sbmnist-mlp-2d-gaussian", "sbmnist-mlp-2d-implicit"}
    assert expected | {"25gaussians-implicit", "25gaussians-gaussian"} == set(PRESETS)
    assert set(PAPER_PRESETS) == expected
    for name, (_, config) in PRESETS.items():
        assert config.preset == name
        assert (config.guide in SCORED) != (config.guide in EXPLICIT)
        check(config)
    for _, config in PAPER_PRESETS.values():
        assert config.batch_size == 128
        check(config)


@pytest.mark.parametrize(
    ("preset", "epochs", "rate", "beta_steps"),
    [
        ("dbmnist-mlp-gaussian", 4700, 1e-4, 0),
        ("dbmnist-conv-auxiliary", 4700, 1e-4, 0),
        ("dbmnist-mlp-implicit", 6400, 1e-4, 0),
        ("dbmnist-conv-hierarchical-implicit", 6400, 1e-4, 0),
        ("dbmnist-resconv-gaussian", 6400, 1e-4, 0),
        ("dbmnist-resconv-implicit", 6400, 1e-3, 0),
        ("dbmnist-resconv-hierarchical-implicit", 6400, 1e-3, 50_000),
        ("sbmnist-resconv-gaussian", 6400, 1e-3, 50_000),
        ("sbmnist-resconv-implicit", 6400, 1e-3, 50_000),
    ],
)
def test_schedules_of_the_paper(preset: str, epochs: int, rate: float, beta_steps: int) -> None:
    """Those of the authors' run scripts."""
    config = PAPER_PRESETS[preset][1]
    assert config.steps == 390 * epochs
    assert config.learning_rate == rate
    assert (config.beta_start, config.beta_steps) == ((1e-4 if beta_steps else 1.0), beta_steps)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_learns_and_a_resumed_run_goes_on_bit_for_bit(
    preset: str, sample_dir: Path, idx_dir: Path
) -> None:
    directory = idx_dir if preset.startswith("dbmnist") else sample_dir
    config = tiny(preset, directory, fantasy_start=0)
    data = build_data(config)

    def started() -> Training:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return Training(config, data)

    training = started()
    before = {name: p.clone() for name, p in training.vae.named_parameters()}
    training.step()
    training.step()
    still = [name for name, p in training.vae.named_parameters() if torch.equal(p, before[name])]
    assert not still
    state = training.state()
    copied = torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state
    )
    training.step()
    resumed = started()
    resumed.load_state(copied)
    resumed.step()
    assert_equal(resumed.state(), training.state())


@pytest.mark.parametrize(
    "preset",
    [
        *("sbmnist-mlp-implicit", "sbmnist-mlp-auxiliary", "sbmnist-mlp2-implicit"),
        *("sbmnist-conv-flow", "25gaussians-implicit"),
    ],
)
def test_draws_of_the_model_take_the_place_of_data(
    preset: str, sample_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(preset, sample_dir, fantasy_share=0.4, fantasy_start=1)
    check(config)
    pyro.clear_param_store()
    training = Training(config, build_data(config))
    drawn: list[Tensor] = []

    def draw(count: int, like: Tensor) -> Tensor:
        assert len(like) == 5
        drawn.append(VAE.draw(training.vae, count, like))
        return drawn[-1]

    monkeypatch.setattr(training.vae, "draw", draw)
    for expected in (0, 1, 2):
        training.step()
        assert len(drawn) == expected
    assert all(one.shape == (3, training.data.mean.numel()) for one in drawn)
    assert torch.isfinite(torch.stack([p.sum() for p in training.vae.parameters()])).all()


@pytest.mark.parametrize(
    "preset",
    ["sbmnist-mlp-gaussian", "sbmnist-mlp-auxiliary", "sbmnist-mlp-sivi", "sbmnist-mlp2-implicit"],
)
def test_the_loss_that_does_not_wait_is_pyros(preset: str, sample_dir: Path) -> None:
    """Value and gradient, of explicit guides and of implicit ones."""
    config = tiny(preset, sample_dir)
    vae = build_vae(config)
    x = build_data(config).minibatch(0)
    gradients, losses = [], []
    for waits in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        elbo = build_loss(config)
        assert isinstance(elbo, Trace_ELBO)
        assert isinstance(elbo, TraceImplicit_ELBO) == preset.endswith("implicit")
        args = x[:5], 0.5, x[5:]
        if waits:
            losses.append(elbo.loss_and_grads(vae.model, vae.guide, *args))
        else:
            loss = surrogate_loss(elbo, vae.model, vae.guide, *args)
            loss.backward()
            losses.append(loss.item())
        gradients.append([p.grad for p in vae.parameters()])
        vae.zero_grad(set_to_none=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_a_step_that_does_not_wait_leaves_a_given_decoder_as_it_is(sample_dir: Path) -> None:
    config = dataclasses.replace(tiny("sbmnist-mlp-gaussian", sample_dir), decoder=Path("RUN"))
    data = build_data(config)
    training = Training(config, data)
    before = copy.deepcopy(training.vae.state_dict())
    assert torch.isfinite(training.step_without_waiting(data.minibatch(0), 1.0, None))
    for name, value in training.vae.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("decoder"), name


def test_paper_schedule_and_options_over_it(
    program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (*TINY, "--schedule", "paper", "--steps", 2, "--beta-steps", 7)
    program("vae", "sbmnist-mlp-gaussian", *options, "--data-dir", sample_dir, "--out", run)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["learning_rate"] == 1e-4
    assert recorded["activation"] == "softplus"
    assert (recorded["batch_size"], recorded["steps"], recorded["beta_steps"]) == (16, 2, 7)


@pytest.mark.parametrize(("shape", "half"), [("geometric", 0.1), ("linear", 0.505)])
def test_annealing(shape: str, half: float, sample_dir: Path) -> None:
    options = {"beta_start": 0.01, "beta_steps": 100, "beta_shape": shape}
    config = tiny("sbmnist-mlp-gaussian", sample_dir, **options)
    training = Training(config, build_data(config))
    seen = []
    for training.steps_done in (0, 50, 100, 200):
        seen.append(training.beta)
    assert seen == pytest.approx([0.01, half, 1.0, 1.0])


def test_training_on_validation_images_keeps_the_last_weights(
    program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (*TINY, "--train-on-valid", "--steps", 4, "--valid-every", 2)
    program("vae", "sbmnist-mlp-gaussian", *options, "--data-dir", sample_dir, "--out", run)
    rows = read_csv(run / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(row["valid_log_px"] == "" and float(row["loss"]) > 0 for row in rows)
    assert json.loads((run / "results.json").read_text())["best_step"] == 4


@pytest.mark.parametrize("preset", ["sbmnist-mlp-gaussian", "sbmnist-mlp-implicit"])
def test_a_step_that_does_not_wait_reads_nothing(
    preset: str, sample_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a number of the score network every fourth update, of which there is one in two steps."""
    config = tiny(preset, sample_dir)
    training = Training(config, build_data(config))
    data = training.data.minibatch(0)
    for _ in range(32):  # while the score is young its coordinates change in every update
        training.step_without_waiting(data)
    read: list[str] = []

    def counting(name: str) -> Callable[[Tensor], Any]:
        original = getattr(Tensor, name)

        def method(tensor: Tensor) -> Any:
            read.append(name)
            return original(tensor)

        return method

    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, counting(name))
    for _ in range(8):
        training.step_without_waiting(data)
    assert len(read) == (1 if config.guide in SCORED else 0)


def test_presets_of_images_with_a_score_bound_their_gradient() -> None:
    """Without one, some have diverged from one spike."""
    scored = [config for _, config in PRESETS.values() if config.guide in SCORED]
    assert all(config.clip == 2 for config in scored if config.latent_dim > 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "preset", ["sbmnist-mlp-implicit", "sbmnist-mlp-fullcov", "sbmnist-conv-flow"]
)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_on_a_gpu(
    preset: str, precision: str, program: Program, sample_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--steps", 3, "--device", "cuda", "--data-dir", sample_dir, "--out", run)
    program("vae", preset, *TINY[:-2], "--precision", precision, *options)
    assert json.loads((run / "results.json").read_text())["steps"] == 3
    config = tiny(preset, sample_dir, device="cuda")
    pyro.clear_param_store()
    training = Training(config, build_data(config))
    training.step()
    if config.guide not in SCORED:  # the score network reads one number back every few updates
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(AVERAGE_EVERY + 1):
                training.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
