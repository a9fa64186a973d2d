"""CAM, and the test whether a network ends in global average pooling and one linear layer, as CAM requires."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import check_targets
from labn.explainers.cam.features import Features, layer_features
from labn.explainers.cam.gradcam import ActivationMap

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}  # of recomputed logits, relative to the largest logit


@dataclass(frozen=True)
class LinearTail:
    """The tail y = W mean_ij(A) + b of a network.

    Attributes:
        weight: W (num_classes, K).
        activations: A (B, K, h, w), after the ReLU that some networks have between the layer and the pooling.
    """

    weight: Tensor
    activations: Tensor


def _linear_layers(model: nn.Module, classes: int, channels: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight (classes, channels) and bias of every linear layer or 1 x 1 convolution of that size."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.numel() == classes * channels:
            weight = module.weight.detach().flatten(1)
            if weight.shape == (classes, channels):
                yield weight, module.bias


def linear_tail(model: nn.Module, features: Features) -> LinearTail | None:
    """The linear layer behind a global average pooling of the features; None if it does not reproduce the logits.

    Args:
        model: searched for linear layers of the right size.
        features: feature maps of the layer, and the logits that the candidate has to reproduce.
    """
    expected = features.logits
    limit = TOLERANCES.get(expected.dtype, 1e-2) * expected.abs().max()
    for weight, bias in _linear_layers(model, expected.shape[1], features.activations.shape[1]):
        # Some networks, such as DenseNet, have a ReLU between the layer and the pooling.
        for activations in (features.activations, features.activations.relu()):
            # The layer runs in its own dtype, as in the network; the features of a half-precision one are float32.
            logits = nn.functional.linear(activations.mean(dim=(2, 3)).to(weight.dtype), weight, bias)
            if (logits - expected).abs().max() <= limit:
                return LinearTail(weight.to(activations.dtype), activations)
    return None


class CAM(ActivationMap):
    """CAM (Zhou et al., CVPR 2016, eq. 2): w_k = W[c, k], the weights of the linear layer behind the pooling.

    Args:
        target_layer: name of the layer; None: the last one with spatial feature maps.
        relu: apply the ReLU to the map; without it the map is signed.

    Raises:
        InputError: on call, if the network does not end in global average pooling and one linear layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import CAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> CAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) from the targets' rows (B, K) of W, which are passed as `gradients`."""
        return gradients[:, :, None, None]

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w): weighted sums at the layer's resolution."""
        features = layer_features(model, self.layer(model, images), images)
        check_targets(targets, features.logits.shape[1])
        tail = linear_tail(model, features)
        if tail is None:
            raise InputError(
                f"{type(model).__name__} does not end in global average pooling and one linear layer "
                "after target_layer, which CAM needs; take gradcam."
            )
        return self.weigh(self.weights(tail.activations, tail.weight[targets]), tail.activations)
