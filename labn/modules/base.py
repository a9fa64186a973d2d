"""Base LightningModules: steps, exact epoch means, and checks of checkpoints, channels and losses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, Metric

from labn.errors import InputError, printable
from labn.inference.modes import to_channels_last
from labn.metrics.forecast import ForecastSkill
from labn.models.backbones import AUXILIARY_HEADS
from labn.models.checkpoints import LoadReport, misfit
from labn.modules.checked_states import check_states
from labn.modules.losses import WeightedCrossEntropy
from labn.modules.provenance import check_trained_on
from labn.modules.ranks import synchronise_buffers
from labn.modules.weighted_mean import WeightedMean

MAX_CONFUSION_CLASSES = 10
"""Largest number of classes whose confusion matrix is logged: it has a value for every pair of classes."""
BOOTSTRAP_RESAMPLES = 10_000
"""Number of bootstrap resamples of the confidence intervals at the end of a test."""
TOP = 5
"""The k of the logged top-k error."""
IN_PROGRESS_BAR = {f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "accuracy")}
AUXILIARY_PREFIXES = tuple(f"network.{name}." for name in AUXILIARY_HEADS)
"""Tensor names of auxiliary classifiers, which checkpoints of earlier versions contain."""
MAX_NAMES = 8
"""Largest number of samples that an error message names."""


def top_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Error (B,) of each sample: 1.0 where the label (B,) is not among the five largest of the logits (B, K), else 0.0.

    Example:
        >>> top_error(torch.tensor([[9.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 2), torch.tensor([4, 5])).tolist()
        [0.0, 1.0]
    """
    return (logits.topk(TOP, dim=1).indices != labels[:, None]).all(dim=1).float()


class CheckedModule(pl.LightningModule):
    """Base of all modules: checks checkpoints, weights, channels and losses, and trains in channels_last.

    It raises for checkpoints of another architecture, and for validating or testing random weights. Subclasses set
    `network`, then call `note_random_weights`, and pass images to the network in `memory_format`.

    A rank may have no validation or test batch. Values are therefore synchronised in the hooks at the end of an epoch,
    with `log_epoch`, and not in the steps, where such a rank would be missing.
    """

    network: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.memory_format = torch.contiguous_format
        self.loaded_epoch: int | None = None
        self.random_weights: tuple[str, ...] = ()
        # Lightning's flag for ranks without a batch.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def setup(self, stage: str) -> None:
        """Switch the network to channels_last for training, which is faster and gives the same values.

        Raises:
            InputError: images of the data module have another number of channels than the network's input.
        """
        self._check_channels()
        # In `setup` and not in `on_fit_start`: DDP lays out its gradient buckets as the parameters are when it wraps
        # the network, and a later change would permute the first gradients of kernels above 1x1.
        if stage == "fit":
            self.memory_format = torch.channels_last
            to_channels_last(self.network)

    def _check_channels(self) -> None:
        data = getattr(self._trainer, "datamodule", None)
        images, network = getattr(data, "channels", None), self.hparams.get("in_channels")
        if None not in (images, network) and images != network:
            raise InputError(
                f"model.init_args.in_channels is {network}, but images of {type(data).__name__} have {images} "
                f"channels; set it to {images}."
            )

    def note_random_weights(self, report: LoadReport | None) -> None:
        """Print the report about loaded weights, and remember the names of parameters that are still random.

        Args:
            report: result of loading weights; None means that all parameters are random.
        """
        names = [name for name, _ in self.network.named_parameters()]
        if report is not None:
            print(printable(str(report), keep="\n"))
        self.random_weights = tuple(name for name in names if report is None or name in report.fresh)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state dict; loaded parameters count as trained, and tensors of auxiliary classifiers are ignored.

        Raises:
            InputError: the tensors are those of another network; the message names the first difference.
        """
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(AUXILIARY_PREFIXES)}
        try:
            result = super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            reason = misfit(self.state_dict(), state_dict)
            raise InputError(
                f"The weights are not those of this {type(self).__name__}: {reason}; use the configuration and the "
                "checkpoint of one run."
            ) from error
        self.random_weights = tuple(name for name in self.random_weights if f"network.{name}" in result.missing_keys)
        return result

    def on_fit_start(self) -> None:
        """Count all weights as trained from now on."""
        self.random_weights = ()

    def on_train_start(self) -> None:
        """Step plateau schedules only in epochs with a validation, whose loss they monitor."""
        every = self.trainer.check_val_every_n_epoch or 1
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.interval == "epoch" and config.frequency == 1:
                config.frequency = every

    def on_validation_start(self) -> None:
        """Copy the running statistics of rank zero to all ranks (a collective), and raise for random weights."""
        synchronise_buffers(self.trainer.strategy.model)
        self._check_trained()

    def on_test_start(self) -> None:
        """Raise for random weights."""
        self._check_trained()

    def _check_trained(self) -> None:
        if self.random_weights:
            network = self.hparams.get("backbone", type(self).__name__)
            raise InputError(
                f"{len(self.random_weights)} weights of {network} (first: {self.random_weights[0]}) are random: give "
                "--ckpt_path, or name a file with all weights in the configuration."
            )

    def log_epoch(self, name: str, metric: Metric, prog_bar: bool = False) -> None:
        """Log a metric's value over all ranks and reset it; a collective, to be called at the end of an epoch."""
        value = metric.compute()
        metric.reset()
        self.log(name, value.float(), prog_bar=prog_bar, sync_dist=False, rank_zero_only=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint's tensors with the module's, and remember its epoch.

        Raises:
            InputError: a name or shape differs. Lightning's own error would list every tensor.
        """
        self.loaded_epoch = checkpoint.get("epoch")
        own, loaded = self.state_dict(), checkpoint["state_dict"]
        source = getattr(self._trainer, "ckpt_path", None) if self._trainer else None
        _check_tensors(source, loaded)
        missing = [key for key in own if key not in loaded]
        unknown = [key for key in loaded if key not in own and not key.startswith(AUXILIARY_PREFIXES)]
        shapes = [key for key in own if key in loaded and own[key].shape != loaded[key].shape]
        if missing or unknown or shapes:
            raise InputError(
                f"The checkpoint {source or ''} is of another architecture than the configured {type(self).__name__}: "
                f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(shapes)} of another shape "
                f"(first: {_first_difference(missing or unknown, shapes, own, loaded)}); use the configuration and "
                "the data, with as many classes, that it was trained with."
            )
        data = getattr(self._trainer, "datamodule", None) if self._trainer else None
        if data is not None:
            check_trained_on(checkpoint, data, source)
        if self._trainer is not None:
            check_states(source, checkpoint, self)

    def check_not_nan(self, loss: Tensor, batch: dict[str, Any], stage: Literal["train", "val", "test"]) -> None:
        """Raise for a loss that is NaN or infinite, before it reaches the weights, a mean or a checkpoint.

        Raises:
            InputError: the loss is not finite; the message names epoch, step and samples.
        """
        if bool(torch.isfinite(loss)):
            return
        data, indices = getattr(self._trainer, "datamodule", None), batch["index"].tolist()
        names = [str(i) if data is None else data.sample_name(stage, i) for i in indices]
        shown = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
        advice = (
            "look at them and at the weights of the checkpoint"
            if stage == "test"
            else "look at them, or start again with lower learning rates (--ckpt_path last keeps the current ones)"
        )
        raise InputError(
            f"The {stage} loss is {float(loss)} in epoch {self.current_epoch}, step {self.global_step}, "
            f"samples {shown}: {advice}."
        )


def _first_difference(
    names: Sequence[str], shapes: Sequence[str], own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> str:
    """The first of the names that only one side has, or else the first tensor of another shape with both shapes."""
    if names:
        return names[0]
    stored, wanted = (tuple(tensors[shapes[0]].shape) for tensors in (loaded, own))
    return f"{shapes[0]} is {stored} and must be {wanted}"


def _check_tensors(path: Any, state_dict: Mapping[Any, Any]) -> None:
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path} cannot be restored: {str(name)[:60]!r} in its state_dict is no tensor.")


class ClassificationModule(CheckedModule):
    """Base of the classifiers: subclasses set `network` and implement `losses` and `configure_optimizers`.

    Epoch values are `<stage>/loss`, `<stage>/accuracy` and, with more than five classes, `<stage>/top5_error`: the
    share of samples whose class is not among the five most probable. They are means over samples, synchronised over the
    ranks by torchmetrics, and depend neither on the batch size nor on the number of ranks. Validation and test also log
    the true skill statistic and the Brier skill score, where these are defined, and the confusion matrix
    (`<stage>/confusion/<true>_<predicted>`). The test logs 95 % intervals of the skills where the data has groups.
    """

    criterion: WeightedCrossEntropy

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # The underscores avoid `train`, which is a method of every module and no valid key of a ModuleDict.
        self.epoch_loss = nn.ModuleDict({stage: WeightedMean() for stage in ("train_", "val_", "test_")})
        self.epoch_accuracy = nn.ModuleDict(
            {s: Accuracy(task="multiclass", num_classes=num_classes) for s in ("train_", "val_", "test_")}
        )
        self.epoch_top5_error = nn.ModuleDict({stage: WeightedMean() for stage in ("train_", "val_", "test_")})
        self.skill = nn.ModuleDict({stage: ForecastSkill(num_classes) for stage in ("val_", "test_")})

    def forward(self, images: Tensor) -> Any:
        """Run the network on normalised images (B, C, H, W)."""
        return self.network(images.contiguous(memory_format=self.memory_format))

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the loss terms of a batch, of which `loss` is minimised, and the logits (B, K)."""
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
        """Name -> metric, for the values that an epoch of `stage` logs; the steps update the metrics."""
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
                prog_bar = name in IN_PROGRESS_BAR
                self.log(name, value, on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=len(logits))
        return terms["loss"]

    def _update(self, loss: Tensor, logits: Tensor, batch: dict[str, Tensor], stage: str) -> None:
        """Update loss, accuracy and top-5 error; in validation and test also the forecast skill."""
        labels, metrics = batch["label"], self.epoch_metrics(stage)
        # Batch means, weighted by what each was divided by, give the mean over all samples.
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
            self.log_epoch(name, metric, prog_bar=name in IN_PROGRESS_BAR)
        self._log_skill(stage)

    def _log_skill(self, stage: Literal["val", "test"]) -> None:
        skill, data = self.skill[f"{stage}_"], getattr(self._trainer, "datamodule", None)
        assert isinstance(skill, ForecastSkill)
        if data is not None:
            # Data sets whose classes define no event (birds, one's own folders) have no true skill statistic.
            skill.positive = tuple(getattr(data, "event_classes", data.positive_classes))
            skill.n_resamples = BOOTSTRAP_RESAMPLES if stage == "test" and data.groups(stage) is not None else 0
        values = skill.compute()
        confusion = values.pop("confusion")
        skill.reset()
        if self.num_classes <= MAX_CONFUSION_CLASSES:
            pairs = itertools.product(range(self.num_classes), repeat=2)
            values |= {f"confusion/{true}_{predicted}": confusion[true, predicted] for true, predicted in pairs}
        for name, value in values.items():
            if value.isnan():
                continue  # undefined where all samples are positive, or all negative
            # `compute` has synchronised the metric: every rank has the same value.
            self.log(f"{stage}/{name}", value.float(), sync_dist=False, rank_zero_only=False)
