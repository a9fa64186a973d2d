"""The attention branch: from features to class logits and a class-independent attention map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from labn.models.lambda_resnet import LambdaBottleneck, shortcut


class AttentionBranch(nn.Module):
    """Residual blocks, a narrow hidden layer z, and two heads on z (JSAI 2022, figure 2; ABN, CVPR 2019, section 3).

        g = blocks(h),   logits = GAP(conv1x1(z)),   attention = sigmoid(BN(conv(...)))

    Convolutions have no bias; the logits do not depend on the attention head nor the map on the class head. All
    layers keep PyTorch's default initialisation: kaiming fan_out on the wide 1 x 1 convolution would start the logits
    at a standard deviation of 5 to 25 and can close the gate for good.

    Args:
        blocks: (B, c, h, w) -> (B, c', h, w).
        project: (B, c', h, w) -> z (B, hidden, h, w).
        attention_head: z -> (B, 1, h, w) in (0, 1).
        class_head: z -> logits (B, num_classes).
    """

    def __init__(
        self, blocks: nn.Sequential, project: nn.Sequential, attention_head: nn.Sequential, class_head: nn.Sequential
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.project = project
        self.attention_head = attention_head
        self.class_head = class_head

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, c, h, w) -> logits (B, num_classes) and attention (B, 1, h, w)."""
        hidden = self.project(self.blocks(features))
        return self.class_head(hidden), self.attention_head(hidden)


def labn_branch(
    channels: int, num_classes: int, hidden: int, block: str, like: nn.Module, depth: int, **options: Any
) -> AttentionBranch:
    """LABN's branch (JSAI 2022, figure 2): two bottlenecks c -> 4c, then

        z = relu(conv1x1(BN(g))),   attention = sigmoid(BN(conv1x1(relu(BN(conv1x1(z))))))

    Bottlenecks are used on every backbone, also on one of basic blocks. `like` and `depth` are ABN's business.
    """
    wide = 4 * channels
    first, second = (BLOCKS[block](c, channels, **options) for c in (channels, wide))
    attention = [_conv(hidden, hidden), nn.BatchNorm2d(hidden), nn.ReLU(), _conv(hidden, 1)]
    return AttentionBranch(
        nn.Sequential(first, second),
        nn.Sequential(nn.BatchNorm2d(wide), _conv(wide, hidden), nn.ReLU()),
        nn.Sequential(*attention, nn.BatchNorm2d(1), nn.Sigmoid()),
        _class_head(hidden, num_classes),
    )


def abn_branch(
    channels: int, num_classes: int, hidden: int, block: str, like: nn.Module, depth: int, **options: Any
) -> AttentionBranch:
    """ABN's branch (CVPR 2019, section 3): the stage that would come next, with stride 1 (c -> 2c), then

        z = relu(BN(conv1x1(BN(g)))),   attention = sigmoid(BN(conv3x3(z)))

    `depth` blocks, bottlenecks of c / 2 planes, or basic blocks of 2c planes where `like`, a block of the backbone,
    has no third convolution.
    """
    wide = 2 * channels
    basic = block == "plain" and not hasattr(like, "conv3")
    make = _basic if basic else BLOCKS[block]
    planes = wide if basic else max(1, channels // 2)
    blocks = [make(channels if i == 0 else wide, planes, **options) for i in range(depth)]
    return AttentionBranch(
        nn.Sequential(*blocks),
        nn.Sequential(nn.BatchNorm2d(wide), _conv(wide, hidden), nn.BatchNorm2d(hidden), nn.ReLU()),
        nn.Sequential(_conv(hidden, 1, kernel=3), nn.BatchNorm2d(1), nn.Sigmoid()),
        _class_head(hidden, num_classes),
    )


def _plain(in_channels: int, planes: int) -> nn.Module:
    return Bottleneck(in_channels, planes, downsample=shortcut(in_channels, planes * Bottleneck.expansion, 1))


def _basic(in_channels: int, planes: int) -> nn.Module:
    return BasicBlock(in_channels, planes, downsample=shortcut(in_channels, planes, 1))


def _conv(channels: int, out: int, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


def _class_head(hidden: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(_conv(hidden, num_classes), nn.AdaptiveAvgPool2d(1), nn.Flatten())


BLOCKS: dict[str, Callable[..., nn.Module]] = {"plain": _plain, "lambda": LambdaBottleneck}
BRANCHES: dict[str, Callable[..., AttentionBranch]] = {"labn": labn_branch, "abn": abn_branch}
