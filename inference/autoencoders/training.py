# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What the training of a VAE changes, and one step of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from torch import Tensor

from inference.autoencoders.data import Dataset
from inference.autoencoders.evaluation import evaluate, restore
from inference.autoencoders.presets import Config, build_loss, build_vae
from inference.autoencoders.surrogate import surrogate_loss
from inference.shared.errors import UserError
from inference.shared.optim import TorchOptim
from inference.shared.randomness import load_rng_state, rng_state
from inference.shared.schedules import annealed
from models.vae import VAE
from pyro_ardae import TraceImplicit_ELBO

__all__ = ["Training"]

#: Steps between updates of the Polyak average: with decay ** 5, it is the same average, cheaper.
AVERAGE_EVERY = 5


class Training:
    """All that a training run changes, and one step of it.

    :param Config config: options.
    :param Dataset data: data.
    :param str name: as in :class:`models.vae.VAE`.
    """

    def __init__(self, config: Config, data: Dataset, *, name: str = "vae") -> None:
        rows = len(data.minibatch(0))
        if rows < config.batch_size:
            raise UserError(
                f"--batch-size: expected the number of training data at most, {rows}, found "
                f"{config.batch_size}"
            )
        self.config = config
        self.data = data
        self.vae = build_vae(config, data.mean, name=name)
        if config.decoder is not None:
            self.vae.decoder.requires_grad_(False).eval()  # else Pyro warns of it
        self.loss: ELBO = build_loss(config)
        self.optim = TorchOptim(self.vae, self._adam(), clip=config.clip)
        self.rates = [group["lr"] for group in self.optim.optimizer.param_groups]
        self.svi = SVI(self.vae.model, self.vae.guide, self.optim, loss=self.loss)
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        self.steps_done = 0
        self.seconds = 0.0
        self.best_valid = -float("inf")
        self.loss_sum: float | Tensor = 0.0
        """Of the steps since the last row of metrics.csv, ..."""
        self.loss_count = 0
        """... as many as these."""

    def take_decoder(self, run: Path) -> None:
        """Starts with the decoder of another run.

        :raises UserError: if that is no run, or one with another decoder.
        """
        config = self.config
        recorded, trained = restore(run, data_dir=config.data_dir, device=config.device)
        expected, found = (
            f"{one.task}{'' if one.images == 'mnist' else ' of ' + one.images} with "
            f"{one.decoder_activation or one.activation}"
            for one in (config, recorded)
        )
        if found != expected:
            raise UserError(f"--decoder: expected a run of {expected}, found one of {found}")
        for vae in (self.vae, self.average):
            vae.decoder.load_state_dict(trained.decoder.state_dict())

    def _adam(self) -> torch.optim.Optimizer:
        config, vae = self.config, self.vae
        deviations = [
            module.deviation_parameters()
            for module in vae.modules()
            if config.deviation_decay and hasattr(module, "deviation_parameters")
        ]
        deviation = [p for parameters in deviations for p in parameters]
        decoder = [*vae.decoder.parameters()]
        apart = {id(p) for p in (*deviation, *decoder)}
        rate, decay = config.learning_rate, config.deviation_decay
        groups = [
            {"params": [p for p in vae.parameters() if id(p) not in apart], "lr": rate},
            {"params": decoder, "lr": config.decoder_learning_rate or rate},
            {"params": deviation, "lr": rate, "weight_decay": decay},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(config.adam_beta1, 0.999),
            eps=config.adam_eps,
            weight_decay=0.0,
            fused=True,
        )

    @property
    def beta(self) -> float:
        """Weight of the KL terms at the next step."""
        start, steps = self.config.beta_start, self.config.beta_steps
        if self.config.beta_shape == "geometric":
            return annealed(self.steps_done, start, steps)
        return 1 - max(0.0, 1 - self.steps_done / steps) * (1 - start) if steps else 1.0

    @property
    def decay(self) -> float:
        """Factor on the step sizes of the next step: 1, then falling linearly to a hundredth."""
        past = self.steps_done - self.config.decay_start
        if self.config.decay_steps == 0 or past < 0:
            return 1.0
        return max(0.01, 1 - past / self.config.decay_steps)

    @property
    def averaged(self) -> VAE:
        """The model with averaged weights: what is evaluated."""
        return self.average if self.config.average_decay > 0 else self.vae

    def step(self) -> float | Tensor:
        """Takes one training step; returns the loss per data point or fantasy, on a GPU
        without waiting.
        """
        config = self.config
        x = self.data.minibatch(self.steps_done).to(config.device)
        count, fantasies = len(x), None
        if config.fantasies and self.steps_done >= config.fantasy_start:
            x = x[: -config.fantasies]
            fantasies = self.vae.draw(config.fantasies, x)
        args = x, self.beta, fantasies
        for group, rate in zip(self.optim.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.decay
        loss = (self.step_without_waiting(*args) if x.is_cuda else self.svi.step(*args)) / count
        self.steps_done += 1
        if self.steps_done % AVERAGE_EVERY == 0:
            self._update_average()
        return loss

    def step_without_waiting(self, *args: Any) -> Tensor:
        """What ``SVI.step`` does, without a transfer from the device; returns the loss."""
        surrogate = surrogate_loss(self.loss, self.vae.model, self.vae.guide, *args)
        surrogate.backward()
        self.optim(self.optim.parameters)
        return surrogate.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short horizon at first, (1 + n) / (10 + n), none for the initial weights.
        count = self.steps_done // AVERAGE_EVERY - 1
        decay = min(self.config.average_decay**AVERAGE_EVERY, (1 + count) / (10 + count))
        parameters = list(self.average.parameters()), list(self.vae.parameters())
        torch._foreach_lerp_(*parameters, 1 - decay if count else 1.0)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "vae": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "optim": self.optim.get_state(),
            "loss": self.loss.state_dict() if isinstance(self.loss, TraceImplicit_ELBO) else {},
            "rng": rng_state(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "best_valid": self.best_valid,
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self.vae.load_state_dict(state["vae"])
        self.average.load_state_dict(state["average"])
        self.optim.set_state(state["optim"])
        if isinstance(self.loss, TraceImplicit_ELBO):
            self.loss.load_state_dict(state["loss"])
        load_rng_state(state["rng"])
        self.steps_done = state["steps_done"]
        self.seconds = state["seconds"]
        self.best_valid = state["best_valid"]
        self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]

    def validate(self) -> dict[str, float]:
        """Evaluates the averaged weights on the validation points; the row of metrics.csv."""
        config = self.config
        figures = evaluate(
            self.averaged,
            self.data.subset("valid", config.valid_points, config.seed).to(config.device),
            explicit=config.explicit,
            own=False,
            num_samples=config.valid_samples,
            guide_samples=config.guide_samples,
            prior_weight=config.prior_weight,
            seed=config.seed,
        )
        row = {
            "valid_log_px": figures["log_px"],
            "valid_log_px_se": figures["log_px_se"],
            "aggregate_std": figures["aggregate_std"],
            "point_std": figures["point_std"],
        }
        if "elbo" in figures:
            row["valid_elbo"] = figures["elbo"]
        return row

    def score_figures(self) -> dict[str, float]:
        """Diagnostics of the score estimators in the last step, means over the sites."""
        if not isinstance(self.loss, TraceImplicit_ELBO):
            return {}
        sites = self.loss.diagnostics().values()
        return {
            name: sum(site[name] for site in sites) / len(sites)
            for name in ("score_loss", "stein")
            if sites and all(name in site for site in sites)
        }
