"""LightningModule for a plain classifier without attention branch."""

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


def weights_file(backbone: str, given: str) -> str:
    """Path of the file `given`, `$VARIABLES` expanded, before a network is built for it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = os.path.expandvars(given)
    if not os.path.isfile(path):
        raise MissingFileError(
            f"backbone_ckpt: {path} does not exist; nothing is downloaded, give a local file with the weights of "
            f"{backbone} (.safetensors, .pt, .pth or .ckpt)."
        )
    return path


class Classifier(ClassificationModule):
    """Train, or only test, any backbone: own (`lambda_resnet50`), torchvision (`resnet50`), timm (`timm/resnet50d`),
    each also with a CBAM block (`cbam/resnet50`).

    With a `backbone_ckpt` that fills the whole network it is tested as it is, without `--ckpt_path`.

    Args:
        backbone: name of the network.
        num_classes: number of classes; taken from the data module on the command line.
        in_channels: channels of the images.
        backbone_ckpt: file of weights to start from (`$VARIABLES` are expanded); what fits is taken and printed.
        backbone_options: further arguments of the backbone's own constructor, such as GoogLeNet's `transform_input`.
        loss: `ce` or `bce_onehot`.
        class_weights: one weight per class, negative class first.
        lr: learning rate of the backbone.
        head_lr: learning rate of the final linear layer and of CBAM blocks.
        weight_decay: of AdamW.
        lr_factor: the plateau schedule multiplies the learning rate by it.
        lr_patience: epochs without improvement before it does.
        min_lr: and its floor.

    Raises:
        FileNotFoundError: there is no file `backbone_ckpt`.
        ValueError: the file is of another architecture; or, when a test or validation begins, the network has weights
            that come from neither training, nor a checkpoint, nor `backbone_ckpt`.
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
        """Cross entropy (or its one-hot form) of the logits."""
        logits = logits_of(self(batch["image"]))
        return {"loss": self.criterion(logits, batch["label"])}, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, faster for what is new to a given backbone (head, CBAM), with the plateau schedule."""
        hp = self.hparams
        fast: list[nn.Module] = [m for m in self.network.modules() if isinstance(m, CBAM)]
        fast += [m for m in self.network.modules() if isinstance(m, nn.Linear)][-1:]
        groups = parameter_groups(self.network, fast, hp["lr"], hp["head_lr"])
        optimizer = torch.optim.AdamW(groups, weight_decay=hp["weight_decay"])
        return on_plateau(optimizer, hp["lr_factor"], hp["lr_patience"], hp["min_lr"])
