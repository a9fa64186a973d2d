"""What every classification LightningModule shares: steps, exact epoch means, checkpoint checks."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, Metric

from labn.metrics.forecast import ForecastSkill
from labn.models.checkpoints import LoadReport
from labn.modules.losses import WeightedCrossEntropy

CONFUSION_CLASSES = 10  # a confusion matrix of more classes is no reading for a log
RESAMPLES = 10_000
TOP = 5


def top_error(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) 1.0 where the label (B,) is not among the five largest logits of (B, K), else 0.0."""
    return (logits.topk(TOP, dim=1).indices != labels[:, None]).all(dim=1).float()


class CheckedModule(pl.LightningModule):
    """A module that remembers the epoch of a loaded checkpoint and refuses one of another architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded_epoch: int | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture with one sentence instead of a list of every tensor."""
        self.loaded_epoch = checkpoint.get("epoch")
        mine, theirs = self.state_dict(), checkpoint["state_dict"]
        missing = [key for key in mine if key not in theirs]
        foreign = [key for key in theirs if key not in mine]
        shapes = [key for key in mine if key in theirs and mine[key].shape != theirs[key].shape]
        if missing or foreign or shapes:
            source = getattr(self._trainer, "ckpt_path", None) if self._trainer else None
            first = (missing or foreign or shapes)[0]
            raise ValueError(
                f"The checkpoint {source or ''} is of another architecture than the configured {type(self).__name__}: "
                f"{len(missing)} tensors missing, {len(foreign)} unknown, {len(shapes)} of another shape "
                f"(first: {first}); use the configuration that it was trained with."
            )


class ClassificationModule(CheckedModule):
    """Base of the classifiers: subclasses set `network` and implement `losses` and `configure_optimizers`.

    Epoch values (`<stage>/loss`, `<stage>/accuracy`, and with more than five classes `<stage>/top5_error`, the share of
    samples whose class is not among the five most probable) are means over samples, not over batches, synchronised
    across ranks by torchmetrics, so that they do not depend on batch size or world size. Validation and test
    also log the true skill statistic, the Brier skill score and the confusion matrix
    (`<stage>/confusion/<true>_<predicted>`), the test their 95 % intervals too where the data has groups.
    """

    network: nn.Module
    criterion: WeightedCrossEntropy

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.memory_format = torch.contiguous_format
        self.num_classes = num_classes
        self.random_weights: tuple[str, ...] = ()
        self.epoch_loss = nn.ModuleDict({stage: MeanMetric() for stage in ("train_", "val_", "test_")})
        self.epoch_accuracy = nn.ModuleDict(
            {s: Accuracy(task="multiclass", num_classes=num_classes) for s in ("train_", "val_", "test_")}
        )
        self.epoch_top5_error = nn.ModuleDict({stage: MeanMetric() for stage in ("train_", "val_", "test_")})
        self.skill = nn.ModuleDict({stage: ForecastSkill(num_classes) for stage in ("val_", "test_")})

    def forward(self, images: Tensor) -> Any:
        """Run the network on (B, C, H, W) normalised images."""
        return self.network(images.contiguous(memory_format=self.memory_format))

    def note_random_weights(self, report: LoadReport | None) -> None:
        """Print what a file of weights gave, and remember the network's parameters that it left random (None: all)."""
        names = [name for name, _ in self.network.named_parameters()]
        if report is not None:
            print(report)
        self.random_weights = tuple(name for name in names if report is None or name in report.fresh)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `CheckedModule`; a checkpoint brings every weight."""
        super().on_load_checkpoint(checkpoint)
        self.random_weights = ()

    def on_validation_start(self) -> None:
        """Refuse to validate random weights."""
        self._refuse_random_weights()

    def on_test_start(self) -> None:
        """Refuse to test random weights."""
        self._refuse_random_weights()

    def _refuse_random_weights(self) -> None:
        if self.random_weights:
            raise ValueError(
                f"{len(self.random_weights)} weights of {self.hparams['backbone']} (first: {self.random_weights[0]}) "
                "are random: give --ckpt_path, or a backbone_ckpt that has them all."
            )

    def on_fit_start(self) -> None:
        """Train in channels_last, which convolutions and lambda layers run faster in; the values are the same."""
        self.random_weights = ()
        self.memory_format = torch.channels_last
        self.network.to(memory_format=torch.channels_last)

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms of a batch (with key `loss`, the one that is minimised) and the logits (B, K)."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One optimisation step on a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accumulate the validation loss and accuracy."""
        self._step(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accumulate the test loss and accuracy."""
        self._step(batch, "test")

    def _step(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        terms, logits = self.losses(batch, stage)
        size = len(logits)
        loss_mean, accuracy = self.epoch_loss[f"{stage}_"], self.epoch_accuracy[f"{stage}_"]
        assert isinstance(loss_mean, Metric)
        assert isinstance(accuracy, Metric)
        loss_mean.update(terms["loss"].detach(), weight=self.criterion.normaliser(batch["label"]))
        accuracy.update(logits.detach(), batch["label"])
        self.log(f"{stage}/loss", loss_mean, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        self._watch(logits.detach(), batch, stage)
        for name, value in terms.items():
            if name != "loss" and stage == "train":
                self.log(f"{stage}/{name}", value.detach(), on_step=False, on_epoch=True, batch_size=size)
        return terms["loss"]

    def _watch(self, logits: Tensor, batch: dict[str, Tensor], stage: str) -> None:
        """The top-5 error where there are classes enough, and on held-out data the rows of the skill scores."""
        if self.num_classes > TOP:
            error = self.epoch_top5_error[f"{stage}_"]
            assert isinstance(error, Metric)
            error.update(top_error(logits, batch["label"]))
            self.log(f"{stage}/top{TOP}_error", error, on_step=False, on_epoch=True, batch_size=len(logits))
        if stage != "train":
            skill = self.skill[f"{stage}_"]
            assert isinstance(skill, ForecastSkill)
            skill.update(logits, batch["label"], batch["index"], batch.get("group"))

    def on_validation_epoch_end(self) -> None:
        """Log the skill on the validation split."""
        self._log_skill("val")

    def on_test_epoch_end(self) -> None:
        """Log the skill on the test split, with intervals where samples come in groups."""
        self._log_skill("test")

    def _log_skill(self, stage: Literal["val", "test"]) -> None:
        skill, data = self.skill[f"{stage}_"], getattr(self._trainer, "datamodule", None)
        assert isinstance(skill, ForecastSkill)
        if data is not None:
            skill.positive = tuple(data.positive_classes)
            skill.n_resamples = RESAMPLES if stage == "test" and data.groups(stage) is not None else 0
        values = skill.compute()
        confusion = values.pop("confusion")
        skill.reset()
        if self.num_classes <= CONFUSION_CLASSES:
            pairs = itertools.product(range(self.num_classes), repeat=2)
            values |= {f"confusion/{true}_{said}": confusion[true, said] for true, said in pairs}
        for name, value in values.items():
            # Every rank has computed the same value.
            self.log(f"{stage}/{name}", value.float(), sync_dist=False, rank_zero_only=False)
