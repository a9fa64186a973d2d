"""What a run cost, and whether its attention gate is alive."""

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
    """Warn when the attention gate is closed everywhere, or open everywhere though its threshold is above 0.

    A threshold of 0 (ABN, the ablation) never closes, so that it warrants no warning. Which share of the images has an
    empty gate is logged as `gate/<stage>_empty`.

    The BatchNorm before the sigmoid has fresh running statistics at first, so in eval mode the gate is often closed
    until they settle; a gate that stays closed makes the prediction independent of the image.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the shares that the module logged this epoch."""
        closes = float(getattr(network_of(pl_module), "theta", 0.0)) > 0
        states = {0.0: ("closed", "Lower"), **({1.0: ("open", "Raise")} if closes else {})}
        for stage, mode in (("train", "train"), ("val", "eval")):
            opened = trainer.callback_metrics.get(f"gate/{stage}_open")
            if opened is not None and float(opened) in states and trainer.is_global_zero:
                state, remedy = states[float(opened)]
                warnings.warn(
                    f"Epoch {trainer.current_epoch}: the attention gate is {state} everywhere in {mode} mode; the map "
                    f"does not select anything. {remedy} theta, or lower the branch's learning rate, if this lasts.",
                    stacklevel=2,
                )


class RunProfile(pl.Callback):
    """Log parameters, FLOPs, latency per image and training time, the figures that the papers report per run.

    Args:
        latency_rounds: forwards of one image that the median latency is taken over.
    """

    def __init__(self, latency_rounds: int = 5) -> None:
        self.latency_rounds = latency_rounds
        self._start = 0.0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        """Training time so far, so that a resumed run goes on counting."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take up the count of the run that is resumed."""
        self._seconds = float(state_dict["seconds"])

    def _elapsed(self) -> float:
        return self._seconds + (time.monotonic() - self._start if self._start else 0.0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Profile the network on one image of the data's size, and start the clock."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        network, size = network_of(pl_module), (data.channels, data.image_size, data.image_size)
        # That of the parameters: `trainer.precision` such as bf16-true has converted them by now.
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
        """Log the training time."""
        pl_module.log("profile/train_seconds", self._elapsed(), rank_zero_only=True)
