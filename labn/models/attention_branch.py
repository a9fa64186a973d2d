"""Attention branch networks: LABN (JSAI 2022, ACCV 2022) and ABN (CVPR 2019) as two settings of one model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from labn.errors import InputError
from labn.models.backbones import backbone_of, build_network, final_linear, input_channels
from labn.models.checkpoints import load_backbone
from labn.models.lambda_networks.resnet import LambdaBottleneck, shortcut


class AttentionBranch(nn.Module):
    """Residual blocks, a narrow hidden layer z, and two heads on z (JSAI 2022, figure 2; ABN, CVPR 2019, section 3).

        g = blocks(h),   z = project(g),   logits = GAP(conv1x1(z)),   attention = sigmoid(BN(conv(...)))

    Convolutions have no bias. The logits do not depend on the attention head, nor the attention on the class head.

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
        # All layers keep PyTorch's default initialisation. Kaiming's fan_out on the wide 1 x 1 convolution would start
        # the logits with a standard deviation of 5 to 25, which can close the gate permanently.
        self.blocks = blocks
        self.project = project
        self.attention_head = attention_head
        self.class_head = class_head

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, c, h, w) to logits (B, num_classes) and attention (B, 1, h, w)."""
        hidden = self.project(self.blocks(features))
        return self.class_head(hidden), self.attention_head(hidden)


def labn_branch(
    channels: int, num_classes: int, hidden: int, block: str, like: nn.Module, depth: int, **options: Any
) -> AttentionBranch:
    """LABN's branch (JSAI 2022, figure 2): two bottlenecks c -> 4c, then

        z = relu(conv1x1(BN(g))),   attention = sigmoid(BN(conv1x1(relu(BN(conv1x1(z))))))

    Bottlenecks are used on every backbone, also on backbones with basic blocks. `like` and `depth` are arguments of
    `abn_branch` and have no effect.
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
    """ABN's branch (CVPR 2019, section 3): one more stage of the ResNet, with stride 1 (c -> 2c), then

        z = relu(BN(conv1x1(BN(g)))),   attention = sigmoid(BN(conv3x3(z)))

    The stage has `depth` blocks: bottlenecks of c / 2 planes, or basic blocks of 2c planes where `like`, a block of the
    backbone, has no third convolution.
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


@dataclass(frozen=True)
class BranchOutput:
    """The outputs of an attention branch network.

    Attributes:
        logits: (B, num_classes) logits of the perception branch, the network's prediction.
        branch_logits: (B, num_classes) logits of the attention branch.
        attention: (B, 1, h, w) in (0, 1), the sigmoid map before the threshold, which is common to all classes.
    """

    logits: Tensor
    branch_logits: Tensor
    attention: Tensor


def gate_attention(attention: Tensor, theta: float) -> Tensor:
    """Threshold the attention: alpha' = alpha where alpha > theta (strictly), else 0 (JSAI 2022, eq. 2).

    Gradients reach only the positions above the threshold. Shape and dtype are those of `attention`; NaN stays NaN.

    Example:
        >>> import torch
        >>> gate_attention(torch.tensor([0.2, 0.75, 0.8]), theta=0.75)
        tensor([0.0000, 0.0000, 0.8000])
    """
    # A product and not `torch.where`, which would turn NaN into 0 and hide it.
    return attention * (attention > theta)


def gate_health(attention: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Share of open positions, and share of images without any open position, as two scalars in [0, 1].

    Args:
        attention: (B, 1, h, w), before the threshold.
        theta: the gate's threshold.

    Example:
        >>> import torch
        >>> attention = torch.tensor([[0.9, 0.1], [0.2, 0.3]]).view(2, 1, 1, 2)
        >>> [share.item() for share in gate_health(attention, theta=0.75)]
        [0.25, 0.5]
    """
    is_open = (attention.detach() > theta).flatten(1)
    return is_open.float().mean(), (~is_open.any(dim=1)).float().mean()


def open_gate(branch: AttentionBranch, theta: float, margin: float) -> None:
    """Initialise a constant map with the gate open: sigmoid^-1(alpha) = sigmoid^-1(theta) + margin at every position.

    Args:
        branch: a branch whose attention head ends in BatchNorm and sigmoid.
        theta: threshold of the gate; for 0, a gate that never closes, the map starts around 0.5.
        margin: logits above the threshold, positive; with a small margin, the gate can close early in training.

    Raises:
        InputError: `margin` is not above 0, or `theta` is 1 or more, which no sigmoid exceeds.
    """
    # A random first map closes the gate on a random half of the positions. Where these are the evidence, the network
    # learns to recognise the shape of the hole, and the map stays inverted. With a constant map (scale 0 in the last
    # BatchNorm) nothing is hidden at first, and the first gradient of the scale decides the map's sign.
    if margin <= 0 or theta >= 1:
        raise InputError(f"gate_margin is {margin} with theta {theta}; it must be above 0, with theta below 1.")
    last = branch.attention_head[-2]
    assert isinstance(last, nn.BatchNorm2d)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, margin + (math.log(theta / (1 - theta)) if theta > 0 else 0.0))


def gate_multiply(features: Tensor, attention: Tensor) -> Tensor:
    """LABN's gate alpha' * h (JSAI 2022, eq. 2)."""
    return attention * features


def gate_residual(features: Tensor, attention: Tensor) -> Tensor:
    """ABN's gate (1 + alpha') * h (CVPR 2019, eq. 2)."""
    return (1 + attention) * features


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mul": gate_multiply, "residual": gate_residual}


class AttentionBranchNetwork(nn.Module):
    """A ResNet in two halves, with an attention branch that gates the features between them.

        h = LFE(x),   (branch_logits, alpha) = branch(h),   logits = LPB(gate(h, alpha'))

    The defaults are LABN; ABN is `gate="residual", branch="abn", theta=0`, a threshold that every sigmoid exceeds. The
    submodules are `feature_extractor` (LFE), `attention_branch` (LAB) and `perception_branch` (LPB); tensors of the
    first and the last keep the names that they have in the backbone.

    Args:
        backbone: name of a network or a ResNet, see `labn.models.backbones.build_network`; the blocks of a ResNet are
            used themselves and not copied.
        num_classes: number of classes.
        in_channels: channels of the images.
        split: number of residual blocks in the feature extractor (B of the paper); 0 splits after the stem.
        theta: threshold of the gate, for the sigmoid map.
        gate: `mul` (LABN) or `residual` (ABN).
        branch: `labn` or `abn`, the layout of the branch.
        lab_block: blocks of the branch: `plain` convolutions, as in the released code, or `lambda` layers, as in the
            bottlenecks of the JSAI 2022 paper.
        lab_hidden: channels of the branch's hidden layer; None takes 10 for LABN and num_classes for ABN.
        gate_margin: start with a constant map this far above the threshold, in logits; None starts with a random map,
            as published. See `open_gate`.
        weights: local file of weights for the backbone, see `labn.models.checkpoints.load_backbone`.
        backbone_options: further arguments of the backbone.
        branch_options: further arguments of the branch's lambda layers.

    Shapes:
        images (B, in_channels, H, W) -> `BranchOutput`.

    Raises:
        InputError: a name is unknown, or the backbone has fewer blocks than `split`.

    Example:
        >>> import torch
        >>> network = AttentionBranchNetwork("resnet18", num_classes=2, split=6).eval()
        >>> output = network(torch.zeros(1, 3, 32, 32))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([1, 2]), torch.Size([1, 1, 2, 2]))
    """

    def __init__(
        self,
        backbone: str | nn.Module = "lambda_resnet50",
        num_classes: int = 2,
        in_channels: int = 3,
        split: int = 7,
        theta: float = 0.75,
        gate: str = "mul",
        branch: str = "labn",
        lab_block: str = "plain",
        lab_hidden: int | None = None,
        gate_margin: float | None = None,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        branch_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("gate", gate, GATES),
            ("branch", branch, BRANCHES),
            ("lab_block", lab_block, BLOCKS),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        network = build_network(backbone, num_classes, in_channels, **(backbone_options or {}))
        chain = backbone_of(network)
        self.theta, self.gate = theta, gate
        self.feature_extractor, self.perception_branch = chain.split(split)
        self.attention_branch = BRANCHES[branch](
            channels=input_channels(self.perception_branch),
            num_classes=num_classes,
            hidden=lab_hidden or {"labn": 10, "abn": num_classes}[branch],
            block=lab_block,
            like=chain.blocks[-1][2],
            depth=chain.last_stage_depth,
            **(branch_options or {}),
        )
        if gate_margin is not None:
            open_gate(self.attention_branch, theta, gate_margin)
        if weights is not None:
            load_backbone(self, weights)

    @property
    def head(self) -> nn.Linear:
        """The last linear layer of the perception branch, which has the branch's learning rate (JSAI 2022, table 1)."""
        return final_linear(self.perception_branch)

    def forward(self, images: Tensor) -> BranchOutput:
        """Compute logits and attention of images (B, in_channels, H, W)."""
        features = self.feature_extractor(images)
        branch_logits, attention = self.attention_branch(features)
        gated = GATES[self.gate](features, gate_attention(attention, self.theta))
        return BranchOutput(self.perception_branch(gated), branch_logits, attention)
