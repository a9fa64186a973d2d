"""LightningModule for a plain classifier without attention branch."""

from __future__ import annotations

import os

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from labn.inference import logits_of
from labn.models.backbones import build_network
from labn.models.checkpoints import load_backbone
from labn.modules.base import ClassificationModule
from labn.modules.losses import make_loss
from labn.modules.optim import on_plateau, parameter_groups


class Classifier(ClassificationModule):
    """Train any backbone: own (`lambda_resnet50`), torchvision (`resnet50`) or timm (`timm/resnet50d`).

    Args:
        backbone: name of the network.
        num_classes: number of classes; taken from the data module on the command line.
        in_channels: channels of the images.
        backbone_ckpt: file of weights to start from (`$VARIABLES` are expanded); what fits is taken and printed.
        loss: `ce` or `bce_onehot`.
        class_weights: one weight per class, negative class first.
        lr: learning rate of the backbone.
        head_lr: learning rate of the final linear layer.
        weight_decay: of AdamW.
        lr_factor: the plateau schedule multiplies the learning rate by it.
        lr_patience: epochs without improvement before it does.
        min_lr: and its floor.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 2,
        in_channels: int = 3,
        backbone_ckpt: str | None = None,
        loss: str = "ce",
        class_weights: list[float] | None = None,
        lr: float = 1e-4,
        head_lr: float = 1e-3,
        weight_decay: float = 0.09,
        lr_factor: float = 0.333,
        lr_patience: int = 2,
        min_lr: float = 1e-6,
    ) -> None:
        super().__init__(num_classes)
        self.save_hyperparameters()
        self.network = build_network(backbone, num_classes=num_classes, in_channels=in_channels)
        if backbone_ckpt is not None:
            print(load_backbone(self.network, os.path.expandvars(backbone_ckpt)))
        self.criterion = make_loss(loss, class_weights, num_classes)

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """Cross entropy (or its one-hot form) of the logits."""
        logits = logits_of(self(batch["image"]))
        return {"loss": self.criterion(logits, batch["label"])}, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a faster head and the plateau schedule on the validation loss."""
        hp = self.hparams
        head = [m for m in self.network.modules() if isinstance(m, torch.nn.Linear)][-1:]
        groups = parameter_groups(self.network, head, hp["lr"], hp["head_lr"])
        optimizer = torch.optim.AdamW(groups, weight_decay=hp["weight_decay"])
        return on_plateau(optimizer, hp["lr_factor"], hp["lr_patience"], hp["min_lr"])
