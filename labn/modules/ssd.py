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
from torchmetrics import MeanMetric, Metric

from labn.errors import InputError
from labn.metrics.average_precision import AveragePrecision
from labn.models.checkpoints import load_backbone
from labn.models.detectors import Detections, Predictions, Thresholds, detect, ssd300
from labn.models.detectors.torchvision_ssd import SSD300_SIDE, TorchvisionSSD
from labn.modules.base import CheckedModule

LOSSES = ("classification", "localisation", "loss")
Parameters = Iterator[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters, float, float], Optimizer]] = {
    "sgd": lambda parameters, lr, decay: SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay),
    "adamw": lambda parameters, lr, decay: AdamW(parameters, lr=lr, weight_decay=decay),
}


class MatchedMean(MeanMetric):
    """Mean over matched default boxes: their numbers are the weights, and without any it is 0, as SSD's loss is."""

    def compute(self) -> Tensor:
        """The mean over all updates and ranks."""
        return self.mean_value / self.weight.clamp(min=1)


def check_image_side(sides: Sequence[int]) -> None:
    """Raise ValueError unless both sides of the images are those that the default boxes are made for."""
    if set(sides) != {SSD300_SIDE}:
        size = " x ".join(map(str, sides))
        raise InputError(f"images are {size} pixels; SSD300 needs 300 x 300: set data.init_args.image_size to 300.")


class SSD(CheckedModule):
    """Train SSD300 with a VGG-16 trunk on images with boxes; logs losses and mean average precision.

    Batches are those of `datamodules.VOC`. Class channel 0 is the background, so object class c is channel c + 1.
    Validation and test log `<stage>/loss`, `<stage>/map50` (average precision at an overlap of .5, averaged over
    classes, with COCO's interpolation at 101 points) and `<stage>/ap50_<class>` of the classes that the split has boxes
    of (`map50` is NaN where it has none at all). Losses are over the matched default boxes of the whole epoch, so that
    those of validation and test do not depend on the batch size.

    Args:
        num_classes: object classes, without background; taken from the data module on the command line.
        width: factor on the channels of every trunk layer; 1 is SSD300 as published.
        batchnorm: BatchNorm in the VGG part, for training from random weights.
        ckpt: file of weights to start from (`$VARIABLES` are expanded), for example torchvision's `ssd300_vgg16`;
            what fits is taken and printed.
        optimizer: `sgd` (momentum .9) or `adamw`.
        lr: learning rate after the warm-up; it falls to 0 along a half cosine.
        weight_decay: of the optimiser.
        warmup_steps: over which the learning rate rises from 0.
        score_threshold: lowest probability of a detection.
        nms_threshold: overlap above which the lower-scored box of a class is suppressed.
        top_k: detections per image.
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
        """Refuse data of another size before anything is done with it.

        Raises:
            ValueError: images are not 300 x 300.
        """
        super().setup(stage)
        data = getattr(self._trainer, "datamodule", None)
        check_image_side([getattr(data, "image_size", SSD300_SIDE)] * 2)

    def forward(self, images: Tensor) -> Predictions:
        """Raw predictions for normalised images (B, 3, 300, 300).

        Raises:
            ValueError: the images have another size, which the default boxes are not made for.
        """
        check_image_side(images.shape[-2:])
        return self.network(images.contiguous(memory_format=self.memory_format))

    def detections(self, images: Tensor) -> list[Detections]:
        """Detections of every image, with the index of their default box."""
        return detect(self.network, self(images), (images.shape[-2], images.shape[-1]), self.thresholds)

    def losses(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Predictions]:
        """`classification`, `localisation`, their sum `loss`, how many boxes `matched`; and the predictions."""
        images = batch["image"]
        raw = self(images)
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
        found = detect(self.network, predictions, size, self.thresholds)
        metric = self.precision[f"{stage}_"]
        assert isinstance(metric, AveragePrecision)
        metric.update([as_predictions(d) for d in found], as_targets(batch), batch["index"])

    def epoch_metrics(self, stage: str) -> dict[str, Metric]:
        """What an epoch of `stage` logs of the losses: name -> mean over matched boxes."""
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
        found = metric.compute()
        metric.reset()
        names = class_names_of(self)
        values = {
            f"ap50_{names[n]}": value
            for n, value in zip(found["classes"].view(-1).tolist(), found["map_per_class"].view(-1))
            if value >= 0  # -1: the split has no box of this class
        }
        overall = found["map"].where(found["map"] >= 0, math.nan)
        for name, value in {"map50": overall, **values}.items():
            # Every rank has computed the same value.
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


def as_predictions(found: Detections) -> dict[str, Tensor]:
    """Detections in the form of torchmetrics, object classes counted from 0."""
    return {"boxes": found.boxes, "scores": found.scores, "labels": found.labels - 1}


def as_targets(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Ground truth in the form of torchmetrics; difficult objects are neither hits nor misses."""
    return [
        {"boxes": boxes, "labels": labels, "iscrowd": difficult.long()}
        for boxes, labels, difficult in zip(batch["boxes"], batch["labels"], batch["difficult"])
    ]


def class_names_of(module: SSD) -> list[str]:
    """Names of the object classes from the data module, else their numbers."""
    data = getattr(module._trainer, "datamodule", None)
    return data.class_names if data is not None else [str(k) for k in range(module.network.num_classes - 1)]
