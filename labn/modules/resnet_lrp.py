"""LightningModule for fine-tuning the ResNet that C3-LRP (JSAI 2024) explains."""

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
    """The classifier of C3-LRP, a fine-tuned ResNet; its explainers are `labn.explainers.LRP` and `C3LRP`.

        L = CE(f(x), y),   SGD with momentum, the plateau schedule on the validation loss

    All layers are trained, as in the paper's experiment on CUB-200-2011. The paper does not name the optimiser; the
    defaults are those of its released code. Explainers work on the network alone and need nothing else of this module.

    Args:
        backbone: name of the network: torchvision (`resnet50`), timm (`timm/resnet50d`) or of this project.
        num_classes: number of classes; the command line takes it from the data module.
        in_channels: channels of the images.
        backbone_ckpt: file of weights to start from (`$VARIABLES` are expanded), such as ImageNet's; all tensors but
            those of the last linear layer must fit. None starts from random weights.
        lr: learning rate of all layers.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        lr_factor: factor that the plateau schedule multiplies the learning rate with.
        lr_patience: validations without improvement before the learning rate is reduced.
        min_lr: smallest learning rate of the plateau schedule.

    Raises:
        InputError: the backbone is unknown, or the weights are of another width or depth; the message names the first
            tensor that does not fit.

    Example:
        >>> module = ResNetLRP("resnet18", num_classes=10)
        >>> module(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
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
        """Compute the cross entropy of the logits; see `ClassificationModule.losses`."""
        logits = logits_of(self(batch["image"]))
        return {"loss": self.criterion(logits, batch["label"])}, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD over all parameters and the plateau schedule on the validation loss."""
        hp = self.hparams
        optimizer = torch.optim.SGD(
            self.network.parameters(), lr=hp["lr"], momentum=hp["momentum"], weight_decay=hp["weight_decay"]
        )
        return on_plateau(optimizer, hp["lr_factor"], hp["lr_patience"], hp["min_lr"])
