"""CBAM, the convolutional block attention module, and networks that carry one behind their last feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import evaluating

PROBE_SIZE = 96  # enough for every torchvision CNN; only the number of channels is read off


class CBAM(nn.Module):
    """CBAM (Woo et al., ECCV 2018, eq. 1-3): a channel gate, then a spatial gate, both multiplied onto the maps F.

        M_c(F) = sigmoid(MLP(mean_ij F) + MLP(max_ij F)),            F'  = M_c(F) * F
        M_s(F') = sigmoid(BN(conv([max_k F'; mean_k F']))),          F'' = M_s(F') * F'

    Args:
        channels: K.
        reduction: the shared MLP is K -> max(1, K / reduction) -> K with a ReLU.
        kernel_size: of the spatial convolution, odd.

    Shapes:
        (B, K, h, w) -> (B, K, h, w).
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.features = nn.Identity()  # a named place at which explanations read the maps before the gates
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """F'' (B, K, h, w)."""
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
    """Put a CBAM block in front of a network's last pooling, in place; the names of all its own weights stay.

    Args:
        network: a torchvision or timm CNN, or any other with a pooling layer of a known name.
        before: name of the layer that the block goes in front of; None takes the last pooling of a torchvision
            ResNet, GoogLeNet, VGG or a timm CNN.
        reduction: of the channel gate.
        kernel_size: of the spatial gate.

    Returns:
        The network.

    Raises:
        ValueError: there is no such layer, or it does not see feature maps.
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
    """`features.<last>` where that is a max pooling (VGG), else the global pooling."""
    features = getattr(network, "features", None)
    if isinstance(features, nn.Sequential) and isinstance(features[-1], nn.MaxPool2d):
        return f"features.{len(features) - 1}"
    for name in ("avgpool", "global_pool"):
        if isinstance(getattr(network, name, None), nn.Module):
            return name
    raise InputError(f"{type(network).__name__} has no pooling layer of a known name; say which one with before.")


@torch.no_grad()
def _channels_into(network: nn.Module, layer: nn.Module) -> int:
    """Channels of the feature maps that reach `layer`, from one forward on an image of zeros."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    shapes: list[torch.Size] = []

    def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
        shapes.append(args[0].shape)

    with temporary_hooks(before={layer: see}), evaluating(network, first.weight.device.type):
        network(first.weight.new_zeros(1, first.in_channels, PROBE_SIZE, PROBE_SIZE))
    if not shapes or len(shapes[0]) != 4:
        raise InputError(f"before names a layer of {type(network).__name__} that sees no feature maps (B, K, h, w).")
    return shapes[0][1]
