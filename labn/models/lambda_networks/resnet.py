"""Lambda ResNets: torchvision's ResNet topology (v1.5) with a lambda layer in place of every 3 x 3 convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from labn.models.lambda_networks.layer import LambdaLayer


class LambdaBottleneck(nn.Module):
    """relu(shortcut(x) + BN(conv1x1(relu(BN(lambda(relu(BN(conv1x1(x)))))))).

    Submodules have the names of torchvision's `Bottleneck`, so that weights of plain ResNets fit by name.

    Args:
        in_channels: number of channels of x.
        planes: number of channels of the lambda layer; the block returns 4 * planes channels.
        stride: 1 or 2, of the lambda layer (as average pooling) and of the shortcut's convolution.
        options: further arguments of `LambdaLayer`.

    Shapes:
        (B, in_channels, H, W) -> (B, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Example:
        >>> import torch
        >>> LambdaBottleneck(in_channels=6, planes=4, stride=2, r=3)(torch.zeros(2, 6, 5, 8)).shape
        torch.Size([2, 16, 3, 4])
    """

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int = 1, **options: Any) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = LambdaLayer(planes, stride=stride, **options)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out, stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's equation."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """1 x 1 convolution and BatchNorm for a block that changes the shape of its input; None for any other block."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class LambdaResNet(nn.Module):
    """A residual network of lambda bottlenecks, whose children have the names and order of torchvision's ResNet.

    Args:
        layers: number of bottlenecks of each stage, (3, 4, 6, 3) for the 50-layer network.
        num_classes: number of classes.
        in_channels: channels of the images.
        width: planes of the first stage, which double from stage to stage; 64 in the papers.
        stem_width: channels of the 7 x 7 stem; None takes `width`.
        options: further arguments of `LambdaLayer`, such as `r` or `heads`.

    Shapes:
        (B, in_channels, H, W) -> logits (B, num_classes).

    Example:
        >>> import torch
        >>> network = LambdaResNet((1, 1), num_classes=3, width=8, r=3)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        stem_width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        channels = stem_width or width
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, depth in enumerate(layers):
            planes = width * 2**i
            self.add_module(f"layer{i + 1}", _stage(channels, planes, depth, 1 if i == 0 else 2, options))
            channels = planes * LambdaBottleneck.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, num_classes) by running the children in order."""
        for child in self.children():
            x = child(x)
        return x


def _stage(in_channels: int, planes: int, depth: int, stride: int, options: dict[str, Any]) -> nn.Sequential:
    first = LambdaBottleneck(in_channels, planes, stride, **options)
    wide = planes * LambdaBottleneck.expansion
    return nn.Sequential(first, *(LambdaBottleneck(wide, planes, **options) for _ in range(depth - 1)))


def _initialise(network: nn.Module) -> None:
    """Initialise convolutions by Kaiming's fan_out, and the last BatchNorm of every block with scale 0."""
    # With scale 0, a block starts as its shortcut, which makes deep networks easier to train (Goyal et al., 2017).
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, LambdaBottleneck):
            nn.init.zeros_(module.bn3.weight)


def lambda_resnet26(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> LambdaResNet:
    """Lambda ResNet-26 with stages (2, 2, 2, 2); `options` are arguments of `LambdaResNet`.

    Example:
        >>> sum(p.numel() for p in lambda_resnet26(num_classes=2).parameters()) < 9_500_000
        True
    """
    return LambdaResNet((2, 2, 2, 2), num_classes, in_channels, **options)


def lambda_resnet38(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> LambdaResNet:
    """Lambda ResNet-38 with stages (2, 3, 5, 2); `options` are arguments of `LambdaResNet`.

    Example:
        >>> [len(stage) for name, stage in lambda_resnet38().named_children() if name.startswith("layer")]
        [2, 3, 5, 2]
    """
    return LambdaResNet((2, 3, 5, 2), num_classes, in_channels, **options)


def lambda_resnet50(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> LambdaResNet:
    """Lambda ResNet-50 with stages (3, 4, 6, 3); `options` are arguments of `LambdaResNet`.

    Example:
        >>> sum(p.numel() for p in lambda_resnet50().parameters())
        14995848
    """
    return LambdaResNet((3, 4, 6, 3), num_classes, in_channels, **options)


def magnetogram_net(num_classes: int = 2, in_channels: int = 1, **options: Any) -> LambdaResNet:
    """The magnetogram network: 7 x 7 stem of 16 channels, one lambda bottleneck, pooling and a linear layer.

    The lambda layer has 8 channels and 4 heads, so 2 values per head; its map is 128 x 128 for 512 x 512 images.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images; 1 for magnetograms.
        options: further arguments of `LambdaResNet`.

    Returns:
        A network (B, in_channels, H, W) -> logits (B, num_classes).

    Example:
        >>> magnetogram_net().fc.in_features
        32
    """
    return LambdaResNet(
        **{"layers": (1,), "width": 8, "stem_width": 16, **options}, num_classes=num_classes, in_channels=in_channels
    )
