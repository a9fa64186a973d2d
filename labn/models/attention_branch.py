"""Attention branch networks: LABN (JSAI 2022, ACCV 2022) and ABN (CVPR 2019) as two settings of one model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.models.backbones import build_network, chain_of, final_linear, input_channels
from labn.models.checkpoints import load_backbone
from labn.models.cut import Cut, find_cut, last_stage_depth, own_blocks
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
        return self.class_head(hidden), self._attention(hidden)

    def _attention(self, hidden: Tensor) -> Tensor:
        """Compute the map in float32 under autocast too; early maps are so flat that bfloat16 would tie most values."""
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            return self.attention_head(hidden)
        with torch.autocast(device, enabled=False):
            return self.attention_head(hidden.float())


class SharpSigmoid(nn.Sigmoid):
    """Compute sigmoid(sharpness * x).

    An optimiser such as Adam changes the scale before the sigmoid by at most its learning rate in a step. After
    `open_gate`, where this scale starts at 0, the map is therefore nearly constant after a short training; a sharper
    sigmoid changes it more in the same number of steps.

    Args:
        sharpness: factor of the logits, positive.

    Raises:
        InputError: `sharpness` is not a positive number.

    Example:
        >>> SharpSigmoid(2.0)(torch.tensor([0.0, 0.5])).tolist()
        [0.5, 0.7310585975646973]
    """

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        if not 0 < sharpness < math.inf:
            raise InputError(f"sharpness is {sharpness}; it must be above 0.")
        self.sharpness = sharpness

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits of any shape to values in (0, 1)."""
        return super().forward(self.sharpness * logits)


@dataclass(frozen=True)
class BranchPlace:
    """What a branch must know of the backbone at its place.

    Attributes:
        channels: c, of the features there.
        own: makes a number of new blocks of the backbone's kind, which keep the shape of these features.
        depth: number of blocks in the backbone's last stage.
        basic: the backbone is a ResNet of basic blocks.
    """

    channels: int
    own: Callable[[int], nn.Sequential]
    depth: int = 3
    basic: bool = False


def labn_branch(
    num_classes: int,
    hidden: int,
    place: BranchPlace,
    block: str = "plain",
    planes: int | None = None,
    sharpness: float = 1.0,
    **options: Any,
) -> AttentionBranch:
    """LABN's branch (JSAI 2022, figure 2): two bottlenecks c -> 4 planes, then

        z = relu(conv1x1(BN(g))),   attention = sigmoid(BN(conv1x1(relu(BN(conv1x1(z))))))

    The bottlenecks have `planes` channels; None is c, as in the paper. In a ResNet-50 with B = 7, such a branch needs
    more multiplications than the rest of the network, and one with c / 4 planes a sixteenth of them. `sharpness` is
    that of `SharpSigmoid`. Bottlenecks are used on every backbone, also on backbones with basic blocks. With the block
    `own`, two blocks of the backbone's kind take their place, which keep the c channels.
    """
    channels = place.channels
    planes = planes or channels
    wide = channels if block == "own" else 4 * planes
    if block == "own":
        blocks = place.own(2)
    else:
        blocks = nn.Sequential(*(BLOCKS[block](c, planes, **options) for c in (channels, wide)))
    attention = [_conv(hidden, hidden), nn.BatchNorm2d(hidden), nn.ReLU(), _conv(hidden, 1)]
    return AttentionBranch(
        blocks,
        nn.Sequential(nn.BatchNorm2d(wide), _conv(wide, hidden), nn.ReLU()),
        nn.Sequential(*attention, nn.BatchNorm2d(1), nn.Sigmoid() if sharpness == 1 else SharpSigmoid(sharpness)),
        _class_head(hidden, num_classes),
    )


def abn_branch(
    num_classes: int, hidden: int, place: BranchPlace, block: str = "plain", **options: Any
) -> AttentionBranch:
    """ABN's branch (CVPR 2019, section 3): one more stage of the ResNet, with stride 1 (c -> 2c), then

        z = relu(BN(conv1x1(BN(g)))),   attention = sigmoid(BN(conv3x3(z)))

    The stage has as many blocks as the backbone's last one: bottlenecks of c / 2 planes, or basic blocks of 2c planes
    in a ResNet of basic blocks, or, with the block `own`, blocks of the backbone's kind, which keep the c channels.
    """
    channels = place.channels
    wide = channels if block == "own" else 2 * channels
    basic = block == "plain" and place.basic
    if block == "own":
        blocks = place.own(place.depth)
    else:
        make, planes = _basic if basic else BLOCKS[block], wide if basic else max(1, channels // 2)
        sides = [channels] + [wide] * (place.depth - 1)
        blocks = nn.Sequential(*(make(inputs, planes, **options) for inputs in sides))
    return AttentionBranch(
        blocks,
        nn.Sequential(nn.BatchNorm2d(wide), _conv(wide, hidden), nn.BatchNorm2d(hidden), nn.ReLU()),
        nn.Sequential(_conv(hidden, 1, kernel=3), nn.BatchNorm2d(1), nn.Sigmoid()),
        _class_head(hidden, num_classes),
    )


def _plain(in_channels: int, planes: int) -> nn.Module:
    from torchvision.models.resnet import Bottleneck  # a second, which `import labn` need not cost

    return Bottleneck(in_channels, planes, downsample=shortcut(in_channels, planes * Bottleneck.expansion, 1))


def _basic(in_channels: int, planes: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock

    return BasicBlock(in_channels, planes, downsample=shortcut(in_channels, planes, 1))


def _conv(channels: int, out: int, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


def _class_head(hidden: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(_conv(hidden, num_classes), nn.AdaptiveAvgPool2d(1), nn.Flatten())


BLOCKS: dict[str, Callable[..., nn.Module]] = {"plain": _plain, "lambda": LambdaBottleneck}
LAB_BLOCKS = (*BLOCKS, "own")

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


def gate_attention(attention: Tensor, theta: float | Tensor) -> Tensor:
    """Threshold the attention: alpha' = alpha where alpha > theta (strictly), else 0 (JSAI 2022, eq. 2).

    Gradients reach only the positions above the threshold. Shape and dtype are those of `attention`; NaN stays NaN.

    Example:
        >>> import torch
        >>> gate_attention(torch.tensor([0.2, 0.75, 0.8]), theta=0.75)
        tensor([0.0000, 0.0000, 0.8000])
    """
    # A product and not `torch.where`, which would turn NaN into 0 and hide it.
    return attention * (attention > theta)


def share_threshold(attention: Tensor, share: float | Tensor) -> Tensor:
    """Find the threshold of each image that leaves `round(share * h * w)` positions open, at least one.

    Positions with the same value as the lowest open one are open too, so that all of a constant map is open. The
    threshold carries no gradient.

    Args:
        attention: (B, 1, h, w).
        share: share of the positions, in (0, 1].

    Returns:
        (B, 1, 1, 1) in the dtype of the map, just below the lowest value that stays open.

    Example:
        >>> attention = torch.tensor([0.1, 0.9, 0.3, 0.7]).view(1, 1, 2, 2)
        >>> gate_attention(attention, share_threshold(attention, 0.5)).flatten()
        tensor([0.0000, 0.9000, 0.0000, 0.7000])
    """
    ordered = attention.detach().flatten(1).sort(dim=1, descending=True).values
    count = (torch.as_tensor(share, device=attention.device) * ordered.shape[1]).round().long()
    lowest = ordered.index_select(1, count.clamp(1, ordered.shape[1]).view(1) - 1)
    return _next_below(lowest)[:, :, None, None]


def _next_below(values: Tensor) -> Tensor:
    """The next smaller floating-point number of values in [0, 1]."""
    if not torch.compiler.is_exporting():
        return torch.nextafter(values, torch.full_like(values, -1.0))
    # ONNX has no such operation. x - x eps / 2 is x minus half to one unit in the last place, which is rounded to the
    # next smaller number, or exactly that number where x is a power of two. It needs normal numbers. As a product,
    # x (1 - eps / 2), the exporter would take the factor for 1 and leave it out.
    info = torch.finfo(values.dtype)
    return torch.where(values > 2 * info.tiny, values - values * (info.eps / 2), -info.tiny)


def gate_health(attention: Tensor, theta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Share of open positions, and share of images without any open position, as two scalars in [0, 1].

    Args:
        attention: (B, 1, h, w), before the threshold.
        theta: the gate's threshold, one for all images or (B, 1, 1, 1).

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
    last, sigmoid = branch.attention_head[-2:]
    assert isinstance(last, nn.BatchNorm2d)
    nn.init.zeros_(last.weight)
    logit = margin + (math.log(theta / (1 - theta)) if theta > 0 else 0.0)
    nn.init.constant_(last.bias, logit / getattr(sigmoid, "sharpness", 1.0))


def checked_share(share: float) -> float:
    """Return the share; raise InputError outside (0, 1]."""
    if not 0 < share <= 1:
        raise InputError(f"open_share is {share}; it must be in (0, 1].")
    return float(share)


def gate_multiply(features: Tensor, attention: Tensor) -> Tensor:
    """LABN's gate alpha' * h (JSAI 2022, eq. 2)."""
    return attention * features


def gate_residual(features: Tensor, attention: Tensor) -> Tensor:
    """ABN's gate (1 + alpha') * h (CVPR 2019, eq. 2)."""
    return (1 + attention) * features


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mul": gate_multiply, "residual": gate_residual}


class AttentionBranchNetwork(nn.Module):
    """A network in two halves, with an attention branch that gates the features between them.

        h = LFE(x),   (branch_logits, alpha) = branch(h),   logits = LPB(gate(h, alpha'))

    The defaults are LABN; ABN is `gate="residual", branch="abn", theta=0`, a threshold that every sigmoid exceeds. The
    submodules of a ResNet are `feature_extractor` (LFE), `attention_branch` (LAB) and `perception_branch` (LPB);
    tensors of the first and the last keep the names that they have in the backbone.

    Any other network stays whole, as `network`, and is cut behind the module `split` (see `labn.models.cut`). Its
    features may have the channels last, as in Swin, or be tokens, as in ViT. A class token has no place on the map: it
    is 0 behind the gate `mul` and unchanged behind `residual`.

    Args:
        backbone: name of a network or a network, see `labn.models.backbones.build_network`; its modules are used
            themselves and not copied.
        num_classes: number of classes.
        in_channels: channels of the images.
        split: number of blocks in the feature extractor (B of the paper); 0 splits a ResNet after the stem. The blocks
            of other networks are counted in timm's feature stages (`labn.models.cut.block_names`). Or the name of the
            last module of the feature extractor, such as `stages.2.blocks.4`.
        theta: threshold of the gate, for the sigmoid map.
        gate: `mul` (LABN) or `residual` (ABN).
        branch: `labn` or `abn`, the layout of the branch.
        lab_block: blocks of the branch: `plain` convolutions, as in the released code, `lambda` layers, as in the
            bottlenecks of the JSAI 2022 paper, or `own`, blocks of the backbone's kind.
        lab_hidden: channels of the branch's hidden layer; None takes 10 for LABN and num_classes for ABN.
        gate_margin: start with a constant map this far above the threshold, in logits; None starts with a random map,
            as published. See `open_gate`.
        open_share: share of each image's positions that the gate leaves open, in (0, 1]. The threshold is then a
            quantile of the map (see `share_threshold`) instead of `theta`. The share is a buffer, which
            `set_open_share` changes and checkpoints contain. None uses `theta`, as published.
        weights: local file of weights for the backbone, see `labn.models.checkpoints.load_backbone`.
        backbone_options: further arguments of the backbone.
        branch_options: further arguments of the branch: `planes` and `sharpness` (LABN), and those of lambda layers.

    Shapes:
        images (B, in_channels, H, W) -> `BranchOutput`.

    Raises:
        InputError: a name is unknown, the backbone has fewer blocks than `split` or cannot be cut there, or
            `open_share` is not in (0, 1].

    Example:
        >>> import torch
        >>> network = AttentionBranchNetwork("resnet18", num_classes=2, split=6).eval()
        >>> output = network(torch.zeros(1, 3, 32, 32))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([1, 2]), torch.Size([1, 1, 2, 2]))
    """

    open_share: Tensor | None

    def __init__(
        self,
        backbone: str | nn.Module = "lambda_resnet50",
        num_classes: int = 2,
        in_channels: int = 3,
        split: int | str = 7,
        theta: float = 0.75,
        gate: str = "mul",
        branch: str = "labn",
        lab_block: str = "plain",
        lab_hidden: int | None = None,
        gate_margin: float | None = None,
        open_share: float | None = None,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        branch_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("gate", gate, GATES),
            ("branch", branch, BRANCHES),
            ("lab_block", lab_block, LAB_BLOCKS),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        network = build_network(backbone, num_classes, in_channels, **(backbone_options or {}))
        self.theta, self.gate = theta, gate
        self.attention_branch = BRANCHES[branch](
            num_classes=num_classes,
            hidden=lab_hidden or {"labn": 10, "abn": num_classes}[branch],
            place=self._divide(network, split),
            block=lab_block,
            **(branch_options or {}),
        )
        if gate_margin is not None:
            open_gate(self.attention_branch, theta, gate_margin)
        self.register_buffer("open_share", None if open_share is None else torch.tensor(checked_share(open_share)))
        if weights is not None:
            load_backbone(self, weights)

    def _divide(self, network: nn.Module, split: int | str) -> BranchPlace:
        """Split a ResNet in two halves, or cut any other network behind a module."""
        self._cut: Cut | None = None
        chain = None if isinstance(split, str) else chain_of(network)
        if chain is not None and not isinstance(split, str):
            self.feature_extractor, self.perception_branch = chain.split(split)
            return BranchPlace(
                channels=input_channels(self.perception_branch),
                own=lambda count: own_blocks(network, find_cut(network, chain.name_of(split)), count),
                depth=chain.last_stage_depth,
                basic=not hasattr(chain.blocks[-1][2], "conv3"),
            )
        # The name is public, so that it counts as a setting under which results are filed.
        self.network, self._cut = network, (cut := find_cut(network, split))
        self.split = cut.name
        depth = last_stage_depth(network) if getattr(network, "feature_info", None) else BranchPlace.depth
        return BranchPlace(cut.features.channels, lambda count: own_blocks(network, cut, count), depth)

    def extractor_parameters(self) -> list[nn.Parameter]:
        """The parameters of the feature extractor."""
        if self._cut is None:
            return list(self.feature_extractor.parameters())
        return [self.network.get_parameter(name) for name in self._cut.before]

    def extractor_modules(self) -> list[nn.Module]:
        """The modules of the feature extractor."""
        if self._cut is None:
            return list(self.feature_extractor.modules())
        return [self.network.get_submodule(name) for name in self._cut.modules_before]

    def backbone_modules(self) -> list[nn.Module]:
        """The modules of the feature extractor and the perception branch."""
        branch = set(self.attention_branch.modules())
        return [module for module in self.modules() if module not in branch and module is not self]

    def set_open_share(self, share: float) -> None:
        """Change the share of open positions of a network that was built with `open_share`.

        Raises:
            InputError: the network was built without, or the share is not in (0, 1].
        """
        if self.open_share is None:
            raise InputError("The network has a fixed threshold, theta; build it with open_share.")
        self.open_share.fill_(checked_share(share))

    def threshold(self, attention: Tensor) -> float | Tensor:
        """Return what attention (B, 1, h, w) must exceed: theta, or (B, 1, 1, 1) that follow from `open_share`."""
        return self.theta if self.open_share is None else share_threshold(attention, self.open_share)

    @property
    def head(self) -> nn.Linear:
        """The last linear layer of the perception branch, which has the branch's learning rate (JSAI 2022, table 1)."""
        return final_linear(self.perception_branch if self._cut is None else self.network)

    def forward(self, images: Tensor) -> BranchOutput:
        """Compute logits and attention of images (B, in_channels, H, W)."""
        if self._cut is not None:
            return self._forward_cut(self._cut, images)
        features = self.feature_extractor(images)
        branch_logits, attention = self.attention_branch(features)
        gated = GATES[self.gate](features, self._open(attention).to(features.dtype))
        return BranchOutput(self.perception_branch(gated), branch_logits, attention)

    def _open(self, attention: Tensor) -> Tensor:
        return gate_attention(attention, self.threshold(attention))

    def _forward_cut(self, cut: Cut, images: Tensor) -> BranchOutput:
        side, outputs = (images.shape[-2], images.shape[-1]), []

        def gate(features: Tensor) -> Tensor:
            branch_logits, attention = self.attention_branch(cut.features.maps(features, side))
            outputs.append((branch_logits, attention))
            opened = cut.features.features(self._open(attention), features, side)
            return GATES[self.gate](features, opened.to(features.dtype))

        logits = cut.run(self.network, images, gate)
        return BranchOutput(logits, *outputs[0])
