"""AMG: Grad-CAM with channel and spatial attention on its weighted feature maps (An and Joe 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.cam.features import gradient_features, wide
from labn.explainers.cam.gradcam import GradCAM
from labn.explainers.cam.target_layer import TargetLayer
from labn.inference.modes import evaluating, matching
from labn.models.cbam import CBAM


class Gates(Protocol):
    """The two attention gates of CBAM for feature maps F (B, K, h, w)."""

    def channel_gate(self, x: Tensor) -> Tensor:
        """(B, K, 1, 1)."""

    def spatial_gate(self, x: Tensor) -> Tensor:
        """(B, 1, h, w)."""


class ParameterFreeGates:
    """CBAM's gates without weights: c = sigmoid(mean_ij F + max_ij F), s = sigmoid((mean_k F + max_k F) / 2).

    CBAM adds its two channel vectors after a shared MLP, which is the identity here, and combines its two spatial maps
    by a convolution, which is their mean here.

    Args:
        box: odd side of a box filter on the mean of the two spatial maps, in place of CBAM's window; 1: no filter.
    """

    def __init__(self, box: int = 1) -> None:
        if box < 1 or box % 2 == 0:
            raise InputError(f"box must be odd and at least 1, got {box}.")
        self.box = box

    def channel_gate(self, x: Tensor) -> Tensor:
        """(B, K, 1, 1) in (0, 1)."""
        return torch.sigmoid(x.mean(dim=(2, 3), keepdim=True) + x.amax(dim=(2, 3), keepdim=True))

    def spatial_gate(self, x: Tensor) -> Tensor:
        """(B, 1, h, w) in (0, 1)."""
        pooled = (x.mean(dim=1, keepdim=True) + x.amax(dim=1, keepdim=True)) / 2
        return torch.sigmoid(F.avg_pool2d(pooled, self.box, stride=1, padding=self.box // 2, count_include_pad=False))


def unit_scale(maps: Tensor) -> Tensor:
    """F^ = F / max|F| per image, which makes the sigmoids independent of the scale of the network's gradients."""
    largest = maps.abs().amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0)


def _same(maps: Tensor) -> Tensor:
    return maps


Scaling = Callable[[Tensor], Tensor]


# The first gate reads `read`, the second one reads `read` after the first gate, as in CBAM.
def _channel_spatial(gates: Gates, maps: Tensor, read: Tensor, scaled: Scaling) -> Tensor:
    channels = gates.channel_gate(scaled(read))
    return gates.spatial_gate(scaled(channels * read)) * (channels * maps)


def _spatial_channel(gates: Gates, maps: Tensor, read: Tensor, scaled: Scaling) -> Tensor:
    positions = gates.spatial_gate(scaled(read))
    return gates.channel_gate(scaled(positions * read)) * (positions * maps)


def _parallel(gates: Gates, maps: Tensor, read: Tensor, scaled: Scaling) -> Tensor:
    return gates.channel_gate(scaled(read)) * gates.spatial_gate(scaled(read)) * maps


ORDERS = {"channel-spatial": _channel_spatial, "spatial-channel": _spatial_channel, "parallel": _parallel}


class AttentionMapGuided(GradCAM):
    """AMG (An and Joe 2022): attention on Grad-CAM's weighted feature maps before they are summed.

        F_k = w_k A^k,   F' = channel_gate(F^) F,   F'' = spatial_gate(F'^) F',   L = ReLU(sum_k F''_k)
        with F^ = F / max|F|

    w are Grad-CAM's weights. The paper leaves open whether the attention is trained and where it is applied; both are
    options, and the default needs no training. Trained gates read the activations A that they were trained on in place
    of F^: F is smaller by orders of magnitude, so that their output would be the same for every image.

    Args:
        target_layer: name of the layer; None: the last one with spatial feature maps, or with attention="cbam" the
            input of the network's CBAM block.
        relu: apply the ReLU to the map; without it the map is signed.
        attention: "parameter_free"; "cbam", the trained CBAM block in the explained network itself
            (`labn.models.cbam.with_cbam`); or any module with CBAM's `channel_gate` and `spatial_gate`.
        order: "channel-spatial", "spatial-channel" or "parallel".
        apply_to: "weighted": attention on the maps F; "activation": attention on A inside the network, followed by
            Grad-CAM there, which equals Grad-CAM of a network with the attention after the layer.
        residual: add the maps without attention.
        normalise: the gates read F^ (True) or F (False), or with apply_to="activation" A likewise; None: F^ for the
            parameter-free gates, unscaled A for trained ones.
        box: side of the box filter of the parameter-free spatial gate; 1: no filter.

    Raises:
        InputError: an argument has another value; on call, no CBAM block in the network for attention="cbam".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import AttentionMapGuided
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> explainer = AttentionMapGuided(order="spatial-channel")
        >>> explainer(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        target_layer: str | None = None,
        relu: bool = True,
        attention: str | nn.Module = "parameter_free",
        order: str = "channel-spatial",
        apply_to: str = "weighted",
        residual: bool = False,
        normalise: bool | None = None,
        box: int = 1,
    ) -> None:
        super().__init__(target_layer, relu)
        if isinstance(attention, str) and attention not in ("parameter_free", "cbam"):
            raise InputError(f"attention must be parameter_free, cbam or a module with two gates, got {attention!r}.")
        if order not in ORDERS:
            raise InputError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
        if apply_to not in ("weighted", "activation"):
            raise InputError(f"apply_to must be weighted or activation, got {apply_to!r}.")
        ParameterFreeGates(box)  # checks the side
        self.attention, self.order, self.apply_to = attention, order, apply_to
        self.residual, self.normalise, self.box = residual, normalise, box

    @property
    def revision(self) -> int:
        """1 with trained gates that read the activations, which earlier versions did not do."""
        return int(self.attention != "parameter_free" and self.normalise is None)

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w): sums of the attended feature maps at the layer's resolution."""
        gates, layer = self._gates(model), self.layer(model, images)
        if not isinstance(gates, nn.Module):
            return self._attended_sum(gates, layer, model, images, targets)
        # Inside a half-precision network the gates read its own maps; behind it they read float32 (`wide`).
        own = matching(gates, images if self.apply_to == "activation" else wide(images))
        with evaluating(own, images.device.type):
            return self._attended_sum(own, layer, model, images, targets)  # type: ignore[arg-type]

    def _attended_sum(
        self, gates: Gates, layer: TargetLayer, model: nn.Module, images: Tensor, targets: Tensor
    ) -> Tensor:
        if self.apply_to == "activation":
            features = gradient_features(model, layer, images, targets, lambda maps: self._attend(gates, maps, maps))
            return self.weigh(self.weights(features.activations, features.slopes), features.activations)
        features = gradient_features(model, layer, images, targets)
        # The attention acts on the finished weights: no gradient passes it here.
        with torch.no_grad():
            weighted = self.weights(features.activations, features.slopes) * features.activations
            attended = self._attend(gates, weighted, features.activations)
        return self.weigh(torch.ones_like(attended[:, :, :1, :1]), attended)

    def layer(self, model: nn.Module, images: Tensor) -> TargetLayer:
        """The target layer of `model`."""
        if self.attention == "cbam" and self.target_layer is None:
            return TargetLayer(_cbam_of(model).features, channels_last=False)
        return super().layer(model, images)

    def _gates(self, model: nn.Module) -> Gates:
        if self.attention == "parameter_free":
            return ParameterFreeGates(self.box)
        return _cbam_of(model) if isinstance(self.attention, str) else self.attention  # type: ignore[return-value]

    def _attend(self, gates: Gates, maps: Tensor, activations: Tensor) -> Tensor:
        trained = self.attention != "parameter_free"
        read = activations if trained and self.normalise is None else maps
        normalise = not trained if self.normalise is None else self.normalise
        attended = ORDERS[self.order](gates, maps, read, unit_scale if normalise else _same)
        return attended + maps if self.residual else attended


def _cbam_of(model: nn.Module) -> CBAM:
    """The last CBAM block of a network."""
    blocks = [module for module in model.modules() if isinstance(module, CBAM)]
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no CBAM block, which attention='cbam' needs; take parameter_free, "
            "or a network made by labn.models.cbam.with_cbam."
        )
    return blocks[-1]
