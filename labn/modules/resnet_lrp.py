"""LightningModule for fine-tuning a ResNet that relevance propagation will explain (C3-LRP, JSAI 2024)."""

from __future__ import annotations

import os

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from labn.inference.modes import logits_of
from labn.models.backbones import build_network
from labn.models.checkpoints import load_classifier
from labn.modules.base import ClassificationModule
from labn.modules.losses import make_loss
from labn.modules.optim import on_plateau


class ResNetLRP(ClassificationModule):
    """Fine-tune all layers of a ResNet from given weights, as the experiment of C3-LRP does on CUB-200-2011.

        L = CE(f(x), y),   SGD with momentum, the plateau schedule on the validation loss

    The paper gives no optimiser; the defaults are those of the code that was released after it. The maps come from the
    explainers `lrp` and `c3lrp`, which need nothing from this module.

    Args:
        backbone: name of the network: torchvision (`resnet50`), timm (`timm/resnet50d`) or own.
        num_classes: number of classes; taken from the data module on the command line.
        in_channels: channels of the images.
        backbone_ckpt: file of weights to start from (`$VARIABLES` are expanded), for instance ImageNet's; all but the
            classifier must fit. None starts from random weights.
        lr: learning rate of all layers.
        momentum: of SGD.
        weight_decay: of SGD.
        lr_factor: the plateau schedule multiplies the learning rate by it.
        lr_patience: epochs without improvement before it does.
        min_lr: and its floor.

    Raises:
        ValueError: unknown backbone, or weights of another width or depth; the message names the first tensor.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 200,
        in_channels: int = 3,
        backbone_ckpt: str | None = None,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        lr_factor: float = 0.333,
        lr_patience: int = 1,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        self.save_hyperparameters()
        self.network = build_network(backbone, num_classes=num_classes, in_channels=in_channels)
        report = load_classifier(self.network, os.path.expandvars(backbone_ckpt)) if backbone_ckpt else None
        self.note_random_weights(report)
        self.criterion = make_loss("ce", None, num_classes)

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """Cross entropy of the logits."""
        logits = logits_of(self(batch["image"]))
        return {"loss": self.criterion(logits, batch["label"])}, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD over all parameters and the plateau schedule on the validation loss."""
        hp = self.hparams
        optimizer = torch.optim.SGD(
            self.network.parameters(), lr=hp["lr"], momentum=hp["momentum"], weight_decay=hp["weight_decay"]
        )
        return on_plateau(optimizer, hp["lr_factor"], hp["lr_patience"], hp["min_lr"])
