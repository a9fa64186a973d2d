"""Watches over a training: warnings about the attention gate, and the cost of the network."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from callbacks.explanation.session import network_of
from labn.models.profile import profile


class GateWatch(pl.Callback):
    """Warn if the attention gate is closed at every position, or open at every position with a threshold above 0.

    A gate with threshold 0 (ABN, the ablation of JSAI 2022) is open everywhere by design and causes no warning. Nor
    does a gate whose threshold follows a quantile of the map. The share of images with an empty gate is logged as
    `gate/<stage>_empty`.

    In eval mode the gate is often closed at first, until the running statistics of the BatchNorm before the sigmoid
    have settled. A gate that stays closed makes the prediction independent of the image.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the shares of open positions, `gate/train_open` and `gate/val_open`, of this epoch."""
        network = network_of(pl_module)
        closes = float(getattr(network, "theta", 0.0)) > 0 and getattr(network, "open_share", None) is None
        states = {0.0: ("closed", "Lower"), **({1.0: ("open", "Raise")} if closes else {})}
        for stage, mode in (("train", "train"), ("val", "eval")):
            opened = trainer.callback_metrics.get(f"gate/{stage}_open")
            # Exactly 0 or 1: the share is a mean over all positions of all images.
            if opened is not None and float(opened) in states and trainer.is_global_zero:
                state, remedy = states[float(opened)]
                warnings.warn(
                    f"Epoch {trainer.current_epoch}: the attention gate is {state} everywhere in {mode} mode; the map "
                    f"does not select anything. {remedy} theta, or lower the branch's learning rate, if this persists.",
                    stacklevel=2,
                )


class RunProfile(pl.Callback):
    """Log the number of parameters, FLOPs, latency per image and training time, which the papers report per run.

    Args:
        latency_rounds: number of forwards of one image; their median is the latency.
    """

    def __init__(self, latency_rounds: int = 5) -> None:
        self.latency_rounds = latency_rounds
        self._start = 0.0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        """The training time so far in seconds."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Add the training time of the resumed run."""
        self._seconds = float(state_dict["seconds"])

    def _elapsed(self) -> float:
        # Monotonic: the wall clock jumps when the system's time is set.
        return self._seconds + (time.monotonic() - self._start if self._start else 0.0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Profile the network on one image of the data's size, and start measuring the training time."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        network, size = network_of(pl_module), (data.channels, data.image_size, data.image_size)
        # The image must have the type of the parameters, which `trainer.precision` (bf16-true) has converted by now.
        kinds = [p.dtype for p in network.parameters() if p.is_floating_point()]
        image = torch.zeros(size, device=pl_module.device, dtype=kinds[0] if kinds else None)
        figures = asdict(profile(network, image, self.latency_rounds))
        rank_zero_info(
            f"Network: {figures['parameters']:,.0f} parameters ({figures['trainable']:,.0f} trainable); per image "
            f"{figures['flops'] / 1e9:.3g} GFLOPs and {figures['latency'] * 1e3:.3g} ms"
        )
        for logger in trainer.loggers:
            logger.log_metrics({f"profile/{name}": value for name, value in figures.items()}, step=trainer.global_step)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the training time in seconds as `profile/train_seconds`."""
        pl_module.log("profile/train_seconds", self._elapsed(), rank_zero_only=True)
