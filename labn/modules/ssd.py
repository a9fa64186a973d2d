"""LightningModule of the single-shot detector (Liu et al., ECCV 2016)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from labn.errors import InputError
from labn.metrics.average_precision import AveragePrecision
from labn.models.checkpoints import load_backbone
from labn.models.detectors import Detections, Predictions, Thresholds, detect, ssd300
from labn.models.detectors.torchvision_ssd import SSD300_SIDE, TorchvisionSSD
from labn.modules.base import CheckedModule
from labn.modules.weighted_mean import WeightedMean

LOSSES = ("classification", "localisation", "loss")
Parameters = Iterator[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters, float, float], Optimizer]] = {
    "sgd": lambda parameters, lr, decay: SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay),
    "adamw": lambda parameters, lr, decay: AdamW(parameters, lr=lr, weight_decay=decay),
}


class MatchedMean(WeightedMean):
    """Mean over matched default boxes, with their number in each batch as weight; 0 without any, as SSD's loss."""

    def compute(self) -> Tensor:
        """The mean over all updates and ranks."""
        return self.mean_value / self.weight.clamp(min=1)


def check_image_side(sides: Sequence[int]) -> None:
    """Check the height and width of images.

    Raises:
        InputError: a side is not 300 pixels, which the default boxes are defined for.
    """
    if set(sides) != {SSD300_SIDE}:
        size = " x ".join(map(str, sides))
        raise InputError(f"images are {size} pixels; SSD300 needs 300 x 300: set data.init_args.image_size to 300.")


class SSD(CheckedModule):
    """Trains SSD300 with a VGG-16 trunk on images with boxes; logs losses and mean average precision.

    Batches are those of `datamodules.VOC`. Channel 0 of the class scores is the background, so that object class c is
    channel c + 1. Validation and test log `<stage>/loss`, `<stage>/map50` (average precision at an IoU of 0.5 with
    COCO's 101-point interpolation, averaged over classes; NaN for a split without boxes) and `<stage>/ap50_<class>` of
    the classes that have boxes in the split. Losses are means over the matched default boxes of the whole epoch, so
    that those of validation and test do not depend on the batch size.

    Args:
        num_classes: object classes, without background; the command line takes it from the data module.
        width: factor of the number of channels of every trunk layer; 1 is SSD300 as published.
        batchnorm: add BatchNorm to the VGG layers, for training from random weights.
        ckpt: file of weights to start from (`$VARIABLES` are expanded), such as torchvision's `ssd300_vgg16`; tensors
            that fit are loaded, and a report is printed.
        optimizer: `sgd` (momentum 0.9) or `adamw`.
        lr: learning rate after the warm-up; it falls to 0 along half a cosine.
        weight_decay: weight decay of the optimiser.
        warmup_steps: number of steps in which the learning rate rises from 0.
        score_threshold: smallest probability of a detection.
        nms_threshold: IoU above which the lower-scored of two boxes of a class is suppressed.
        top_k: largest number of detections per image.

    Example:
        >>> import torch
        >>> module = SSD(num_classes=2, width=1 / 16)
        >>> module(torch.zeros(1, 3, 300, 300)).classes.shape
        torch.Size([1, 8732, 3])
    """

    network: TorchvisionSSD

    def __init__(
        self,
        num_classes: int = 20,
        width: float = 1.0,
        batchnorm: bool = False,
        ckpt: str | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        warmup_steps: int = 500,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        top_k: int = 200,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer is {optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}.")
        self.network = ssd300(num_classes + 1, width, batchnorm)
        self.note_random_weights(None if ckpt is None else load_backbone(self.network, os.path.expandvars(ckpt)))
        self.thresholds = Thresholds(score_threshold, nms_threshold, top_k=top_k)
        stages = ("train", "val", "test")
        self.epoch_losses = nn.ModuleDict({f"{stage}_{name}": MatchedMean() for stage in stages for name in LOSSES})
        self.precision = nn.ModuleDict({stage: AveragePrecision() for stage in ("val_", "test_")})

    def setup(self, stage: str) -> None:
        """Set up as `CheckedModule`, and check the size of the data module's images.

        Raises:
            InputError: images are not 300 x 300 pixels.
        """
        super().setup(stage)
        data = getattr(self._trainer, "datamodule", None)
        check_image_side([getattr(data, "image_size", SSD300_SIDE)] * 2)

    def forward(self, images: Tensor) -> Predictions:
        """Compute class scores and box offsets of normalised images (B, 3, 300, 300).

        Raises:
            InputError: the images have another size, which the default boxes are not defined for.
        """
        check_image_side(images.shape[-2:])
        return self.network(images.contiguous(memory_format=self.memory_format))

    def detections(self, images: Tensor) -> list[Detections]:
        """Compute the detections of every image, with the indices of their default boxes."""
        return detect(self.network, self(images), (images.shape[-2], images.shape[-1]), self.thresholds)

    def losses(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Predictions]:
        """Compute the terms `classification`, `localisation`, `loss` (their sum) and `matched`, and predictions."""
        images = batch["image"]
        raw = self(images)
        # Losses are computed in float32 also under autocast.
        predictions = Predictions(raw.classes.float(), raw.offsets.float(), raw.grids)
        size = (images.shape[-2], images.shape[-1])
        terms = self.network.losses(predictions, size, batch["boxes"], [labels + 1 for labels in batch["labels"]])
        return {**terms, "loss": terms["classification"] + terms["localisation"]}, predictions

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One optimisation step on a batch."""
        terms, _ = self.losses(batch)
        self.check_not_nan(terms["loss"].detach(), batch, "train")
        size = len(batch["image"])
        for name, mean in self.epoch_metrics("train").items():
            mean.update(terms[name.split("/")[1]].detach(), weight=terms["matched"])
            self.log(name, mean, on_step=False, on_epoch=True, prog_bar=name == "train/loss", batch_size=size)
        return terms["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accumulate losses and detections."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accumulate losses and detections."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: Literal["val", "test"], batch: dict[str, Any]) -> None:
        terms, predictions = self.losses(batch)
        self.check_not_nan(terms["loss"].detach(), batch, stage)
        for name, mean in self.epoch_metrics(stage).items():
            mean.update(terms[name.split("/")[1]].detach(), weight=terms["matched"])
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        detections = detect(self.network, predictions, size, self.thresholds)
        metric = self.precision[f"{stage}_"]
        assert isinstance(metric, AveragePrecision)
        metric.update([as_predictions(d) for d in detections], as_targets(batch), batch["index"])

    def epoch_metrics(self, stage: str) -> dict[str, Metric]:
        """Name -> mean over matched boxes, for the losses that an epoch of `stage` logs."""
        return {f"{stage}/{name}": self.epoch_losses[f"{stage}_{name}"] for name in LOSSES}  # type: ignore[misc]

    def on_validation_epoch_end(self) -> None:
        """Log losses and average precision of the validation split."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log losses and average precision of the test split."""
        self._log_epoch("test")

    def _log_epoch(self, stage: str) -> None:
        for name, mean in self.epoch_metrics(stage).items():
            self.log_epoch(name, mean, prog_bar=name.endswith("/loss"))
        metric = self.precision[f"{stage}_"]
        assert isinstance(metric, AveragePrecision)
        precision = metric.compute()
        metric.reset()
        names = class_names_of(self)
        values = {
            f"ap50_{names[n]}": value
            for n, value in zip(precision["classes"].view(-1).tolist(), precision["map_per_class"].view(-1))
            if value >= 0  # torchmetrics gives -1 for a class without boxes in the split
        }
        overall = precision["map"].where(precision["map"] >= 0, math.nan)
        for name, value in {"map50": overall, **values}.items():
            # `compute` has synchronised the metric: every rank has the same value.
            self.log(f"{stage}/{name}", value, prog_bar=name == "map50", sync_dist=False, rank_zero_only=False)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser with warm-up and cosine decay over all steps of the run."""
        hp = self.hparams
        optimizer = OPTIMIZERS[hp["optimizer"]](self.network.parameters(), hp["lr"], hp["weight_decay"])
        steps, warmup = int(self.trainer.estimated_stepping_batches), hp["warmup_steps"]

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def as_predictions(detections: Detections) -> dict[str, Tensor]:
    """Detections in the format of torchmetrics, with object classes from 0."""
    return {"boxes": detections.boxes, "scores": detections.scores, "labels": detections.labels - 1}


def as_targets(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Ground truth in the format of torchmetrics; difficult objects count neither as hits nor as misses."""
    # torchmetrics ignores objects with `iscrowd` in this way.
    return [
        {"boxes": boxes, "labels": labels, "iscrowd": difficult.long()}
        for boxes, labels, difficult in zip(batch["boxes"], batch["labels"], batch["difficult"])
    ]


def class_names_of(module: SSD) -> list[str]:
    """Names of the object classes from the data module, or their numbers without one."""
    data = getattr(module._trainer, "datamodule", None)
    return data.class_names if data is not None else [str(k) for k in range(module.network.num_classes - 1)]
