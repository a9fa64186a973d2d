"""CBAM, the convolutional block attention module, and networks with a CBAM block behind their last feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import evaluating

PROBE_SIZE = 96
"""Side in pixels of the image that the number of channels is found with; large enough for every torchvision CNN."""


class CBAM(nn.Module):
    """CBAM (Woo et al., ECCV 2018, eq. 1-3): a channel gate, then a spatial gate, both multiplied onto the maps F.

        M_c(F) = sigmoid(MLP(mean_ij F) + MLP(max_ij F)),            F'  = M_c(F) * F
        M_s(F') = sigmoid(BN(conv([max_k F'; mean_k F']))),          F'' = M_s(F') * F'

    Args:
        channels: number of channels K.
        reduction: the hidden layer of the shared MLP has max(1, K / reduction) channels.
        kernel_size: side of the spatial convolution's kernel, odd.

    Shapes:
        (B, K, h, w) -> (B, K, h, w).

    Example:
        >>> CBAM(channels=32)(torch.ones(1, 32, 7, 7)).shape
        torch.Size([1, 32, 7, 7])
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.features = nn.Identity()  # a module whose output explainers can read: the maps before the gates
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both gates to maps (B, K, h, w)."""
        x = self.features(x)
        x = self.channel_gate(x) * x
        return self.spatial_gate(x) * x

    def channel_gate(self, x: Tensor) -> Tensor:
        """M_c (B, K, 1, 1) in (0, 1)."""
        mean, largest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return torch.sigmoid(self.mlp(mean) + self.mlp(largest))

    def spatial_gate(self, x: Tensor) -> Tensor:
        """M_s (B, 1, h, w) in (0, 1)."""
        pooled = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return torch.sigmoid(self.norm(self.conv(pooled)))


def with_cbam(network: nn.Module, before: str | None = None, reduction: int = 16, kernel_size: int = 7) -> nn.Module:
    """Insert a CBAM block before a network's last pooling layer, in place; the network's weights keep their names.

    Args:
        network: a torchvision or timm CNN, or another network with a layer `before`.
        before: name of the layer that the block is inserted before; None takes the last pooling layer of a torchvision
            ResNet, GoogLeNet or VGG, or of a timm CNN.
        reduction: reduction of the channel gate.
        kernel_size: side of the spatial gate's kernel.

    Returns:
        The network.

    Raises:
        InputError: the layer does not exist, or its input is not feature maps (B, K, h, w).
    """
    name = _last_pooling(network) if before is None else before
    if name not in dict(network.named_modules()) or not name:
        raise InputError(f"before is {name!r}, which is not a layer of {type(network).__name__}.")
    pooling = network.get_submodule(name)
    block = CBAM(_channels_into(network, pooling), reduction, kernel_size)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Sequential(block, pooling))
    return network


def _last_pooling(network: nn.Module) -> str:
    """Name of the last pooling layer: the last of `features` where that is a max pooling (VGG), else the global one."""
    features = getattr(network, "features", None)
    if isinstance(features, nn.Sequential) and isinstance(features[-1], nn.MaxPool2d):
        return f"features.{len(features) - 1}"
    for name in ("avgpool", "global_pool"):
        if isinstance(getattr(network, name, None), nn.Module):
            return name
    raise InputError(
        f"{type(network).__name__} has no pooling layer of a known name; set before to the name of its last pooling."
    )


@torch.no_grad()
def _channels_into(network: nn.Module, layer: nn.Module) -> int:
    """Number of channels of the feature maps that `layer` receives, found with an image of zeros."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    shapes: list[torch.Size] = []

    def record_shape(_module: nn.Module, args: tuple[Any, ...]) -> None:
        shapes.append(args[0].shape)

    with temporary_hooks(before={layer: record_shape}), evaluating(network, first.weight.device.type):
        network(first.weight.new_zeros(1, first.in_channels, PROBE_SIZE, PROBE_SIZE))
    if not shapes or len(shapes[0]) != 4:
        raise InputError(f"before is a layer of {type(network).__name__} whose input is not feature maps (B, K, h, w).")
    return shapes[0][1]
