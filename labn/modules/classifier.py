"""LightningModule of a classifier without attention branch."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from labn.errors import MissingFileError
from labn.inference.modes import logits_of
from labn.models.backbones import build_network
from labn.models.cbam import CBAM
from labn.models.checkpoints import load_backbone
from labn.modules.base import ClassificationModule
from labn.modules.losses import make_loss
from labn.modules.optim import on_plateau, parameter_groups


def weights_file(backbone: str, file: str) -> str:
    """The path `file` with its `$VARIABLES` expanded; checked before a network is built.

    Raises:
        MissingFileError: the file does not exist.
    """
    path = os.path.expandvars(file)
    if not os.path.isfile(path):
        raise MissingFileError(
            f"backbone_ckpt: {path} does not exist; nothing is downloaded, give a local file with the weights of "
            f"{backbone} (.safetensors, .pt, .pth or .ckpt)."
        )
    return path


class Classifier(ClassificationModule):
    """Trains or tests a classifier: of this project (`lambda_resnet50`), torchvision (`resnet50`), timm
    (`timm/resnet50d`) or your own (`my_net.SmallNet`), each also with a CBAM block (`cbam/resnet50`).

    If `backbone_ckpt` contains all weights of the network, the network can be tested without `--ckpt_path`.

    Args:
        backbone: name of the network.
        num_classes: number of classes; the command line takes it from the data module.
        in_channels: channels of the images.
        backbone_ckpt: file of weights to start from (`$VARIABLES` are expanded); tensors that fit are loaded, and a
            report is printed.
        backbone_options: further arguments of the backbone's constructor, such as GoogLeNet's `transform_input`.
        loss: `ce` (cross entropy) or `bce_onehot` (binary cross entropy on one-hot labels).
        class_weights: one weight per class, negative class first.
        lr: learning rate of the backbone.
        head_lr: learning rate of the last linear layer and of CBAM blocks.
        weight_decay: weight decay of AdamW.
        lr_factor: factor that the plateau schedule multiplies the learning rate with.
        lr_patience: validations without improvement before the learning rate is reduced.
        min_lr: smallest learning rate of the plateau schedule.

    Raises:
        MissingFileError: the file `backbone_ckpt` does not exist.
        InputError: the file is of another architecture; or a test or validation begins with weights that were neither
            trained nor loaded.

    Example:
        >>> module = Classifier("resnet18", num_classes=3)
        >>> module(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 2,
        in_channels: int = 3,
        backbone_ckpt: str | None = None,
        backbone_options: dict[str, Any] | None = None,
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
        weights = backbone_ckpt and weights_file(backbone, backbone_ckpt)
        self.network = build_network(
            backbone, num_classes=num_classes, in_channels=in_channels, **(backbone_options or {})
        )
        report = load_backbone(self.network, weights) if weights else None
        self.note_random_weights(report)
        self.criterion = make_loss(loss, class_weights, num_classes)

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the loss of the logits; see `ClassificationModule.losses`."""
        logits = logits_of(self(batch["image"]))
        return {"loss": self.criterion(logits, batch["label"])}, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with the plateau schedule, and a larger learning rate for the new layers (classifier, CBAM)."""
        hp = self.hparams
        fast: list[nn.Module] = [m for m in self.network.modules() if isinstance(m, CBAM)]
        fast += [m for m in self.network.modules() if isinstance(m, nn.Linear)][-1:]
        groups = parameter_groups(self.network, fast, hp["lr"], hp["head_lr"])
        optimizer = torch.optim.AdamW(groups, weight_decay=hp["weight_decay"])
        return on_plateau(optimizer, hp["lr_factor"], hp["lr_patience"], hp["min_lr"])
