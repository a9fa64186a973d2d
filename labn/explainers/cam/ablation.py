"""Ablation-CAM: weights from the drop of the score without each feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.explainers.base import check_targets
from labn.explainers.cam.features import Features, layer_features, wide
from labn.explainers.cam.gradcam import ActivationMap
from labn.explainers.cam.linear import linear_tail
from labn.explainers.cam.network_tail import Tail
from labn.explainers.cam.target_layer import TargetLayer
from labn.perturbation.engine import PerturbationEngine

CHUNK_NUMBERS = 1 << 22  # feature-map values per batch of tail forwards: 16 MiB in float32


class AblationCAM(ActivationMap):
    """Ablation-CAM (Desai and Ramaswamy, WACV 2020, eq. 3): w_k = (y_c - y_c with A^k = 0) / y_c.

    The network runs once up to the target layer, and the rest of it K times in batches. In a network that ends in
    global average pooling and one linear layer the difference is W[c,k] mean_ij(A^k), which needs no forward.

    Args:
        target_layer: name of the layer; None: the last one with spatial feature maps.
        relu: apply the ReLU to the map; without it the map is signed.
        chunk_size: forwards of the tail per batch; None: 16 MiB of feature maps. The map does not depend on it.
        closed_form: use the closed form in a network with that ending.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import AblationCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> AblationCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        target_layer: str | None = None,
        relu: bool = True,
        chunk_size: int | None = None,
        closed_form: bool = True,
    ) -> None:
        super().__init__(target_layer, relu)
        self.chunk_size, self.closed_form = chunk_size, closed_form

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) from the drops of y_c followed by y_c itself (B, K + 1), passed as `gradients`."""
        lost, score = gradients[:, :-1], gradients[:, -1:]
        return torch.where(score != 0, lost / score, 0)[:, :, None, None]

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w): weighted sums at the layer's resolution."""
        layer = self.layer(model, images)
        closed = self._in_closed_form(model, layer, images, targets) if self.closed_form else None
        features, lost = closed or self._by_tails(model, layer, images, targets)
        scores = features.logits.gather(1, targets[:, None])
        return self.weigh(self.weights(features.activations, torch.cat([lost, scores], dim=1)), features.activations)

    def _in_closed_form(
        self, model: nn.Module, layer: TargetLayer, images: Tensor, targets: Tensor
    ) -> tuple[Features, Tensor] | None:
        """Features and drops (B, K) of y_c; None, after one forward, for a network without that ending."""
        features = layer_features(model, layer, images[:1])  # one image is enough to see whether the form applies
        check_targets(targets, features.logits.shape[1])
        tail = linear_tail(model, features)
        if tail is not None and len(images) > 1:
            rest = layer_features(model, layer, images[1:])
            features = Features(*(torch.cat(pair) for pair in zip(_fields(features), _fields(rest))))
            tail = linear_tail(model, features)
        return None if tail is None else (features, tail.weight[targets] * tail.activations.mean(dim=(2, 3)))

    def _by_tails(
        self, model: nn.Module, layer: TargetLayer, images: Tensor, targets: Tensor
    ) -> tuple[Features, Tensor]:
        """Features and drops (B, K) from one forward per image and K forwards of the tail."""
        features, lost = [], []
        for image, target in zip(images, targets):
            tail = Tail(model, layer, image[None])
            check_targets(target[None], tail.logits.shape[1])
            features.append((wide(tail.activations), wide(tail.logits)))
            lost.append(self._lost(tail, image[None], target))
        return Features(*(torch.cat(column) for column in zip(*features))), torch.stack(lost)

    def _lost(self, tail: Tail, image: Tensor, target: Tensor) -> Tensor:
        """Drop (K,) of y_c without each feature map."""
        chunk = self.chunk_size or max(1, CHUNK_NUMBERS // tail.activations.numel())

        def ablated(channels: Tensor) -> Tensor:
            maps = tail.activations.repeat(len(channels), 1, 1, 1)
            maps[torch.arange(len(channels), device=maps.device), channels] = 0
            return maps

        engine = PerturbationEngine(tail, image, chunk_size=chunk)
        without = engine.run(ablated, tail.activations.shape[1])
        return wide(tail.logits)[0, target] - without[:, target]


def _fields(features: Features) -> tuple[Tensor, Tensor]:
    return features.activations, features.logits
