"""The VGG-16 trunk of SSD300 at any width (Liu et al. 2016; Simonyan and Zisserman 2015)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError

# Channels of VGG-16's convolutions up to conv4_3; None is a max pool.
FRONT: tuple[int | None, ...] = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512)
# Channels inside and at the output of conv8 to conv11, and the stride of the second convolution.
EXTRAS = ((256, 512, 2), (128, 256, 2), (128, 256, 1), (128, 256, 1))


class VGGFeatures(nn.Module):
    """Computes six source maps of 300 x 300 images, with 38, 19, 10, 5, 3 and 1 cells per side.

    With width 1 and without BatchNorm, modules and parameters have the names of torchvision's `ssd300_vgg16`, so that
    its weights fit. Convolutions are initialised by He's normal initialisation (2015).

    Args:
        width: factor of the number of channels of every layer.
        batchnorm: add BatchNorm behind the VGG convolutions, which training from random weights needs.

    Attributes:
        out_channels: numbers of channels of the six source maps.
    """

    def __init__(self, width: float = 1.0, batchnorm: bool = False) -> None:
        super().__init__()
        wide = _Widths(width)
        c4, c7 = wide(512), wide(1024)
        self.scale_weight = nn.Parameter(torch.full((c4,), 20.0))
        self.features = nn.Sequential(*_front(wide, batchnorm))
        fc = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            *_convolution(c4, c7, batchnorm, padding=6, dilation=6),
            *_convolution(c7, c7, batchnorm, kernel_size=1, padding=0),
        )
        conv5 = [layer for _ in range(3) for layer in _convolution(c4, c4, batchnorm)]
        self.extra = nn.ModuleList([nn.Sequential(nn.MaxPool2d(2), *conv5, fc)])
        channels = c7
        for inner, outer, stride in EXTRAS:
            first = _convolution(channels, wide(inner), False, kernel_size=1, padding=0)
            second = _convolution(wide(inner), wide(outer), False, stride=stride, padding=stride - 1)
            self.extra.append(nn.Sequential(*first, *second))
            channels = wide(outer)
        self.out_channels = [c4, c7, *(wide(outer) for _, outer, _ in EXTRAS)]
        self.apply(_initialise)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Compute the source maps; the first is L2-normalised per position and scaled per channel (ParseNet, 2015)."""
        x = self.features(images)
        maps = [self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)]
        for block in self.extra:
            x = block(x)
            maps.append(x)
        return OrderedDict((str(number), m) for number, m in enumerate(maps))


class _Widths:
    def __init__(self, factor: float) -> None:
        if factor <= 0:
            raise InputError(f"width must be positive, and it is {factor}.")
        self.factor = factor

    def __call__(self, channels: int) -> int:
        return max(1, round(channels * self.factor))


def _front(wide: _Widths, batchnorm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels, pools = 3, 0
    for item in FRONT:
        if item is None:
            pools += 1
            layers.append(nn.MaxPool2d(2, ceil_mode=pools == 3))  # pool3 rounds up: 75 becomes 38
        else:
            layers += _convolution(channels, wide(item), batchnorm)
            channels = wide(item)
    return layers


def _convolution(
    inputs: int,
    outputs: int,
    batchnorm: bool,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, dilation)
    return [layer, *([nn.BatchNorm2d(outputs)] if batchnorm else []), nn.ReLU(inplace=True)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
