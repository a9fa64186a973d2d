"""What every classification LightningModule shares: steps, exact epoch means, checkpoint checks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, Metric

from labn.errors import InputError
from labn.metrics.forecast import ForecastSkill
from labn.models.backbones import WITHOUT_AUXILIARY
from labn.models.checkpoints import LoadReport
from labn.modules.losses import WeightedCrossEntropy
from labn.modules.ranks import synchronise_buffers

CONFUSION_CLASSES = 10  # a confusion matrix of more classes is no reading for a log
RESAMPLES = 10_000
TOP = 5
SHOWN = {f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "accuracy")}  # in progress bars
AUXILIARY = tuple(f"network.{name}." for name in WITHOUT_AUXILIARY)
NAMED = 8  # samples that a message names


def top_error(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) 1.0 where the label (B,) is not among the five largest logits of (B, K), else 0.0."""
    return (logits.topk(TOP, dim=1).indices != labels[:, None]).all(dim=1).float()


class CheckedModule(pl.LightningModule):
    """A module that remembers the epoch of a loaded checkpoint, refuses one of another architecture, refuses to
    validate or test random weights, and trains in channels_last.

    Subclasses set `network`, call `note_random_weights` then, and give the network images in `memory_format`.

    A rank may have no validation or test batch: epoch values are collectives of `log_epoch`, in the hooks at an
    epoch's end, and not of the steps.
    """

    network: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.memory_format = torch.contiguous_format
        self.loaded_epoch: int | None = None
        self.random_weights: tuple[str, ...] = ()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def setup(self, stage: str) -> None:
        """Train in channels_last, which convolutions and lambda layers run faster in; the values are the same.

        Here and not in `on_fit_start`: the first gradients that DDP reduces are laid out as the parameters were when it
        was made, and those of kernels above 1x1 come out permuted where the layout has changed since.

        Raises:
            ValueError: the data module's images have other channels than the network was built for.
        """
        self._check_channels()
        if stage == "fit":
            self.memory_format = torch.channels_last
            self.network.to(memory_format=torch.channels_last)

    def _check_channels(self) -> None:
        data = getattr(self._trainer, "datamodule", None)
        given, built = getattr(data, "channels", None), self.hparams.get("in_channels")
        if None not in (given, built) and given != built:
            raise InputError(
                f"model.init_args.in_channels is {built}, but images of {type(data).__name__} have {given} channels; "
                f"set it to {given}."
            )

    def note_random_weights(self, report: LoadReport | None) -> None:
        """Print what a file of weights gave, and remember the network's parameters that it left random (None: all)."""
        names = [name for name, _ in self.network.named_parameters()]
        if report is not None:
            print(report)
        self.random_weights = tuple(name for name in names if report is None or name in report.fresh)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module`'s; what is loaded is random no longer, and auxiliary heads, of old, are passed over."""
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(AUXILIARY)}
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.random_weights = tuple(name for name in self.random_weights if f"network.{name}" in result.missing_keys)
        return result

    def on_fit_start(self) -> None:
        """From here on every weight is a trained one."""
        self.random_weights = ()

    def on_train_start(self) -> None:
        """Let plateau schedules look at the validation loss when there is a new one, and not in the epochs between."""
        every = self.trainer.check_val_every_n_epoch or 1
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.interval == "epoch" and config.frequency == 1:
                config.frequency = every

    def on_validation_start(self) -> None:
        """Give every rank the running statistics of rank zero, a collective; refuse to validate random weights."""
        synchronise_buffers(self.trainer.strategy.model)
        self._check_trained()

    def on_test_start(self) -> None:
        """Refuse to test random weights."""
        self._check_trained()

    def _check_trained(self) -> None:
        if self.random_weights:
            network = self.hparams.get("backbone", type(self).__name__)
            raise InputError(
                f"{len(self.random_weights)} weights of {network} (first: {self.random_weights[0]}) are random: give "
                "--ckpt_path, or a file of weights in the configuration that has them all."
            )

    def log_epoch(self, name: str, metric: Metric, prog_bar: bool = False) -> None:
        """Log a metric's value over all ranks and reset it; a collective, for the hooks at an epoch's end."""
        value = metric.compute()
        metric.reset()
        self.log(name, value.float(), prog_bar=prog_bar, sync_dist=False, rank_zero_only=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture with one sentence instead of a list of every tensor."""
        self.loaded_epoch = checkpoint.get("epoch")
        mine, theirs = self.state_dict(), checkpoint["state_dict"]
        missing = [key for key in mine if key not in theirs]
        foreign = [key for key in theirs if key not in mine and not key.startswith(AUXILIARY)]
        shapes = [key for key in mine if key in theirs and mine[key].shape != theirs[key].shape]
        if missing or foreign or shapes:
            source = getattr(self._trainer, "ckpt_path", None) if self._trainer else None
            first = (missing or foreign or shapes)[0]
            raise InputError(
                f"The checkpoint {source or ''} is of another architecture than the configured {type(self).__name__}: "
                f"{len(missing)} tensors missing, {len(foreign)} unknown, {len(shapes)} of another shape "
                f"(first: {first}); use the configuration that it was trained with."
            )

    def check_not_nan(self, loss: Tensor, batch: dict[str, Any], stage: Literal["train", "val", "test"]) -> None:
        """Stop before a loss that is NaN or infinite reaches the weights, a mean or a checkpoint.

        Raises:
            ValueError: naming epoch, step and samples.
        """
        if bool(torch.isfinite(loss)):
            return
        data, indices = getattr(self._trainer, "datamodule", None), batch["index"].tolist()
        names = [str(i) if data is None else data.sample_name(stage, i) for i in indices]
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        advice = (
            "look at them and at the weights of the checkpoint"
            if stage == "test"
            else "look at them, or begin anew with lower learning rates (--ckpt_path last keeps those it has)"
        )
        raise InputError(
            f"The {stage} loss is {float(loss)} in epoch {self.current_epoch}, step {self.global_step}, "
            f"samples {shown}: {advice}."
        )


class ClassificationModule(CheckedModule):
    """Base of the classifiers: subclasses set `network` and implement `losses` and `configure_optimizers`.

    Epoch values (`<stage>/loss`, `<stage>/accuracy`, and with more than five classes `<stage>/top5_error`, the share of
    samples whose class is not among the five most probable) are means over samples, not over batches, synchronised
    across ranks by torchmetrics, so that they do not depend on batch size or world size. Validation and test
    also log the true skill statistic, the Brier skill score (each where it is defined) and the confusion matrix
    (`<stage>/confusion/<true>_<predicted>`), the test their 95 % intervals too where the data has groups.
    """

    criterion: WeightedCrossEntropy

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.epoch_loss = nn.ModuleDict({stage: MeanMetric() for stage in ("train_", "val_", "test_")})
        self.epoch_accuracy = nn.ModuleDict(
            {s: Accuracy(task="multiclass", num_classes=num_classes) for s in ("train_", "val_", "test_")}
        )
        self.epoch_top5_error = nn.ModuleDict({stage: MeanMetric() for stage in ("train_", "val_", "test_")})
        self.skill = nn.ModuleDict({stage: ForecastSkill(num_classes) for stage in ("val_", "test_")})

    def forward(self, images: Tensor) -> Any:
        """Run the network on (B, C, H, W) normalised images."""
        return self.network(images.contiguous(memory_format=self.memory_format))

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

    def epoch_metrics(self, stage: str) -> dict[str, Metric]:
        """What an epoch of `stage` logs: name -> metric, updated in the steps."""
        metrics = {"loss": self.epoch_loss, "accuracy": self.epoch_accuracy}
        if self.num_classes > TOP:
            metrics[f"top{TOP}_error"] = self.epoch_top5_error
        return {f"{stage}/{name}": kinds[f"{stage}_"] for name, kinds in metrics.items()}  # type: ignore[misc]

    def _step(self, batch: dict[str, Tensor], stage: Literal["train", "val", "test"]) -> Tensor:
        terms, logits = self.losses(batch, stage)
        self.check_not_nan(terms["loss"].detach(), batch, stage)
        self._update(terms["loss"].detach(), logits.detach(), batch, stage)
        if stage == "train":
            values: dict[str, Metric | Tensor] = {f"train/{name}": value.detach() for name, value in terms.items()}
            for name, value in {**values, **self.epoch_metrics(stage)}.items():
                shown = name in SHOWN
                self.log(name, value, on_step=False, on_epoch=True, prog_bar=shown, batch_size=len(logits))
        return terms["loss"]

    def _update(self, loss: Tensor, logits: Tensor, batch: dict[str, Tensor], stage: str) -> None:
        """Loss, accuracy, the top-5 error where there are classes enough, on held-out data the rows of the skill."""
        labels, metrics = batch["label"], self.epoch_metrics(stage)
        metrics[f"{stage}/loss"].update(loss, weight=self.criterion.normaliser(labels))
        metrics[f"{stage}/accuracy"].update(logits, labels)
        if self.num_classes > TOP:
            metrics[f"{stage}/top{TOP}_error"].update(top_error(logits, labels))
        if stage != "train":
            skill = self.skill[f"{stage}_"]
            assert isinstance(skill, ForecastSkill)
            skill.update(logits, labels, batch["index"], batch.get("group"))

    def on_validation_epoch_end(self) -> None:
        """Log the means and the skill on the validation split."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the means and the skill on the test split, with intervals where samples come in groups."""
        self._log_epoch("test")

    def _log_epoch(self, stage: Literal["val", "test"]) -> None:
        for name, metric in self.epoch_metrics(stage).items():
            self.log_epoch(name, metric, prog_bar=name in SHOWN)
        self._log_skill(stage)

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
            if value.isnan():
                continue  # undefined: all samples are of one side, as where every class is positive
            # Every rank has computed the same value.
            self.log(f"{stage}/{name}", value.float(), sync_dist=False, rank_zero_only=False)
