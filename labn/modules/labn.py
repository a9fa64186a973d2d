"""LightningModule of attention branch networks: LABN (JSAI 2022, ACCV 2022) and ABN (CVPR 2019)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from labn.errors import InputError
from labn.models.attention_branch import AttentionBranchNetwork, BranchOutput, gate_health
from labn.models.checkpoints import load_backbone
from labn.modules.base import ClassificationModule
from labn.modules.guidance import SaliencyGuidance, attention_maps, frozen_batchnorm, input_gradient, masked_images
from labn.modules.losses import make_loss
from labn.modules.map_teacher import MapTeacher
from labn.modules.optim import on_cosine, on_plateau, parameter_groups
from labn.modules.weighted_mean import WeightedMean
from labn.perturbation.fills import make_fill

GATE = ("open", "empty")
SCHEDULES = ("plateau", "cosine")
NETWORK_ARGUMENTS = ("num_classes", "in_channels", "split", "theta", "gate", "branch", "lab_block", "gate_margin")
"""Arguments of `LABN` that are arguments of its network."""


@dataclass
class GateSchedule:
    """Share of each map's positions that the gate leaves open, as a function of the epoch.

    The share decreases linearly from 1 in epoch `begin` to `share` in epoch `end`. At first nothing is hidden, while
    the sign of the map is undetermined; later the prediction depends on the map. Because the share is a function of
    the epoch alone, a resumed training continues the schedule.

    Attributes:
        share: share of the open positions from epoch `end` on, in (0, 1].
        begin: last epoch (from 0) with all positions open.
        end: first epoch with `share` of them open, above `begin`.

    Raises:
        InputError: a share or an epoch is out of range.

    Example:
        >>> [round(GateSchedule(share=0.2, begin=0, end=2).at(epoch), 1) for epoch in range(4)]
        [1.0, 0.6, 0.2, 0.2]
    """

    share: float = 0.2
    begin: int = 1
    end: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"gate_schedule.share is {self.share}; it must be in (0, 1].")
        if not 0 <= self.begin < self.end:
            raise InputError(f"gate_schedule goes from epoch {self.begin} to {self.end}; give 0 <= begin < end.")

    def at(self, epoch: int) -> float:
        """The share of open positions in an epoch."""
        done = min(max((epoch - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return 1 + done * (self.share - 1)


class LABN(ClassificationModule):
    """Trains an attention branch network with the loss

        L = CE(y_LPB, y) + branch_weight * CE(y_LAB, y) [+ kl_weight * D_KL(p(.|x) || p(.|x~))] [+ weight * L_map]

    (JSAI 2022, eq. 6; the KL term is the saliency-guided training of ACCV 2022, see `labn.modules.guidance`; L_map is
    of this project, see `labn.modules.map_teacher`).

    Args:
        backbone: name of the network that gets the branch: of this project, torchvision or timm.
        num_classes: number of classes; the command line takes it from the data module.
        in_channels: channels of the images.
        split: number of blocks before the branch (B of the paper), or name of the module behind which it stands.
        theta: threshold of the gate; attention must be strictly above it.
        gate: `mul` (LABN) or `residual` (ABN).
        branch: `labn` or `abn`, the layout of the attention branch.
        lab_block: blocks of the branch: `plain` convolutions, as in the released code; `lambda` layers, as in the
            bottlenecks of the JSAI 2022 paper (`configs/idrid/idrid_labn_lambda_block.yaml`); or `own`, blocks of the
            backbone's kind.
        gate_margin: start with a constant map and the gate open, which determines the map's sign; None starts with a
            random map, as published. See `labn.models.attention_branch.open_gate`.
        gate_schedule: share of each map's positions that the gate leaves open, which decreases over the epochs and
            replaces `theta`; None uses `theta`, as published.
        network_options: further arguments of `AttentionBranchNetwork`.
        loss: `ce` (cross entropy) or `bce_onehot` (binary cross entropy on one-hot labels).
        class_weights: one weight per class, negative class first.
        branch_weight: weight of the branch's loss.
        guidance: options of saliency-guided training; None trains without it.
        map_teacher: options of training the map by the maps of an explainer; None trains without it.
        backbone_ckpt: file of weights to start from (`$VARIABLES` are expanded); tensors that fit are loaded, and a
            report is printed.
        train_lfe: train the feature extractor too, as in the paper; False freezes it, as in the released code.
        train_bn: normalise with the statistics of the batch while training; False keeps the running statistics that the
            backbone starts with. Small batches estimate statistics badly. And where whole and masked images are
            normalised differently, a network can tell them apart by it, and in eval mode treat whole images as masked.
        bn_epochs: number of epochs, at least 1, after which every BatchNorm keeps its running statistics, so that the
            rest of the training is in the state of eval mode; None never does.
        lr: learning rate of the feature extractor and the perception branch.
        head_lr: learning rate of the attention branch and of the last linear layer.
        weight_decay: weight decay of AdamW.
        lr_schedule: `plateau` on the validation loss, or `cosine` down to `min_lr` at the end of the training.
        lr_factor: factor that the plateau schedule multiplies the learning rate with.
        lr_patience: validations without improvement before the learning rate is reduced.
        min_lr: smallest learning rate of the schedule.

    Raises:
        InputError: `lr_schedule` is unknown, or `bn_epochs` is below 1.

    Example:
        >>> module = LABN("resnet18", num_classes=2, split=6)
        >>> batch = {"image": torch.zeros(2, 3, 32, 32), "label": torch.tensor([0, 1])}
        >>> terms, logits = module.losses(batch, "val")
        >>> sorted(terms), logits.shape
        (['branch_loss', 'loss', 'main_loss'], torch.Size([2, 2]))
    """

    network: AttentionBranchNetwork

    def __init__(
        self,
        backbone: str = "lambda_resnet50",
        num_classes: int = 2,
        in_channels: int = 3,
        split: int | str = 7,
        theta: float = 0.75,
        gate: str = "mul",
        branch: str = "labn",
        lab_block: str = "plain",
        gate_margin: float | None = None,
        gate_schedule: GateSchedule | None = None,
        network_options: dict[str, Any] | None = None,
        loss: str = "ce",
        class_weights: list[float] | None = None,
        branch_weight: float = 3.0,
        guidance: SaliencyGuidance | None = None,
        map_teacher: MapTeacher | None = None,
        backbone_ckpt: str | None = None,
        train_lfe: bool = True,
        train_bn: bool = True,
        bn_epochs: int | None = None,
        lr: float = 1e-4,
        head_lr: float = 1e-3,
        weight_decay: float = 0.09,
        lr_schedule: str = "plateau",
        lr_factor: float = 0.333,
        lr_patience: int = 2,
        min_lr: float = 1e-6,
    ) -> None:
        super().__init__(num_classes)
        self.save_hyperparameters()
        if lr_schedule not in SCHEDULES:
            raise InputError(f"lr_schedule is {lr_schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        if bn_epochs is not None and bn_epochs < 1:
            raise InputError(f"bn_epochs is {bn_epochs}; it must be at least 1, which estimates the statistics.")
        if isinstance(gate_schedule, dict):  # as the command line saves it in checkpoints
            gate_schedule = GateSchedule(**gate_schedule)
        own = {name: self.hparams[name] for name in NETWORK_ARGUMENTS}
        own["open_share"] = gate_schedule.at(0) if gate_schedule else None
        if twice := sorted(own.keys() & (network_options or {}).keys()):
            raise InputError(f"network_options has {', '.join(twice)}, given by the module's own arguments; remove it.")
        self.network = AttentionBranchNetwork(backbone, **own, **(network_options or {}))
        report = load_backbone(self.network, os.path.expandvars(backbone_ckpt)) if backbone_ckpt else None
        self.note_random_weights(report)
        for parameter in self.network.extractor_parameters():
            parameter.requires_grad_(train_lfe)
        self.criterion = make_loss(loss, class_weights, num_classes)
        self.branch_weight = branch_weight
        self.guidance, self.gate_schedule, self.map_teacher = guidance, gate_schedule, map_teacher
        self.bias_image: Tensor | None = None
        self.gate = nn.ModuleDict({f"{s}_{v}": WeightedMean() for s in ("train", "val") for v in GATE})
        self.train()  # the trainer does not call it, and keeps the modes that it finds

    def train(self, mode: bool = True) -> LABN:
        """Switch between training and eval mode; frozen parts and frozen BatchNorm layers stay in eval mode."""
        super().train(mode)
        if not self.hparams["train_lfe"]:
            for module in self.network.extractor_modules():
                module.training = False
        if not self.hparams["train_bn"]:
            _keep_statistics(self.network.backbone_modules())
        epochs = self.hparams["bn_epochs"]
        if epochs is not None and self.current_epoch >= epochs:
            _keep_statistics(self.network.modules())
        return self

    def setup(self, stage: str) -> None:
        """Set up as `CheckedModule`, and compute the bias image where guidance fills with it."""
        super().setup(stage)
        if stage == "fit" and self.guidance is not None and self.guidance.fill == "bias" and self.bias_image is None:
            self.bias_image = self.trainer.datamodule.bias_image()  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """Update the gate's share of open positions and the BatchNorm layers for the epoch."""
        self.train()
        if self.gate_schedule is not None:
            self.network.set_open_share(self.gate_schedule.at(self.current_epoch))

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """Compute both classification losses and, in guided training, the KL term; see `ClassificationModule`."""
        images, labels = batch["image"], batch["label"]
        guided = self.guidance is not None and stage == "train"
        if guided and self.guidance.source == "gradient":  # type: ignore[union-attr]
            images = images.detach().requires_grad_()
        output: BranchOutput = self(images)
        terms = {"main_loss": self.criterion(output.logits, labels)}
        branch_logits = output.branch_logits
        if guided:
            guidance_terms, masked = self._guide(images, labels, output, batch["index"])
            terms |= guidance_terms
            if self.guidance.branch_loss_on == "masked":  # type: ignore[union-attr]
                branch_logits = masked.branch_logits
        terms["branch_loss"] = self.criterion(branch_logits, labels)
        terms["loss"] = terms["main_loss"] + self.branch_weight * terms["branch_loss"]
        if guided:
            terms["loss"] = terms["loss"] + self.guidance.kl_weight * terms["kl"]  # type: ignore[union-attr]
            terms["loss"] = terms["loss"] + self.guidance.map_weight * terms["map_mean"]  # type: ignore[union-attr]
        if self.map_teacher is not None and stage == "train":
            terms["map_distance"] = self.map_teacher.loss(
                self.network, output.attention, images, labels, batch["index"]
            )
            terms["loss"] = terms["loss"] + self.map_teacher.weight * terms["map_distance"]
        self._update_gate(output.attention, stage)
        return terms, output.logits

    def _guide(
        self, images: Tensor, labels: Tensor, output: BranchOutput, indices: Tensor
    ) -> tuple[dict[str, Tensor], BranchOutput]:
        """Terms `kl` and `map_mean` of a guided step, and the network's output for the masked images."""
        guidance = self.guidance
        assert guidance is not None
        size = (images.shape[-2], images.shape[-1])
        maps = (
            attention_maps(output.attention, size)
            if guidance.source == "attention"
            else input_gradient(images, output.logits, labels)
        )
        data = getattr(self._trainer, "datamodule", None)
        step = self.global_step if self._trainer else 0
        fill = make_fill(
            guidance.fill,
            images.detach(),
            mean=getattr(data, "mean", None),
            std=getattr(data, "std", None),
            bias=self.bias_image,
            indices=indices,
            seed=guidance.seed + step,
        )
        mask, deletes = guidance.mask(maps, step), guidance.deletes(step, len(images)).to(images.device)
        shown = torch.where(deletes[:, None, None], 1 - mask, mask)
        inputs = masked_images(images.detach(), shown, fill)
        needs_fill = guidance.deletion_class is None and bool(deletes.any())
        if needs_fill:
            # p(b) needs the fill as a further input; a fill that is common to all images (length 1) is added once.
            inputs = torch.cat([inputs, fill.expand(len(fill), *images.shape[1:])])
        with frozen_batchnorm(self.network, guidance.masked_bn == "frozen"):
            masked: BranchOutput = self(inputs)
        count = len(images)
        bare = masked.logits[count:].detach().expand_as(output.logits) if needs_fill else None
        kl = guidance.loss(output.logits, masked.logits[:count], deletes, bare, labels)
        terms = {"kl": kl, "map_mean": output.attention.mean()}
        # The branch must not learn the class from an image whose evidence was deleted.
        branch_logits = torch.where(deletes[:, None], output.branch_logits, masked.branch_logits[:count])
        return terms, replace(masked, branch_logits=branch_logits)

    def epoch_metrics(self, stage: str) -> dict[str, Metric]:
        """The metrics of `ClassificationModule` and, in training and validation, the state of the gate."""
        gates = {} if stage == "test" else {f"gate/{stage}_{v}": self.gate[f"{stage}_{v}"] for v in GATE}
        return {**super().epoch_metrics(stage), **gates}  # type: ignore[dict-item]

    def _update_gate(self, attention: Tensor, stage: str) -> None:
        if stage == "test":
            return
        for name, value in zip(GATE, gate_health(attention, self.network.threshold(attention))):
            metric = self.gate[f"{stage}_{name}"]
            assert isinstance(metric, WeightedMean)
            metric.update(value, weight=len(attention))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with the learning rates of JSAI 2022, table 1, and the schedule `lr_schedule`."""
        hp = self.hparams
        fast = [self.network.attention_branch, self.network.head]
        groups = parameter_groups(self.network, fast, hp["lr"], hp["head_lr"])
        optimizer = torch.optim.AdamW(groups, weight_decay=hp["weight_decay"])
        if hp["lr_schedule"] == "cosine":
            return on_cosine(optimizer, self.trainer.max_epochs or 1, hp["min_lr"])
        return on_plateau(optimizer, hp["lr_factor"], hp["lr_patience"], hp["min_lr"])


def _keep_statistics(modules: Iterable[nn.Module]) -> None:
    """Let BatchNorm layers normalise with their running statistics, and not update them."""
    for layer in modules:
        if isinstance(layer, _BatchNorm):
            layer.eval()
