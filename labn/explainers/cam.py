"""Class activation maps: weighted sums of one layer's feature maps."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from labn.explainers.base import Explainer
from labn.explainers.layers import find_target_layer, named_layer
from labn.inference import logits_of


class ActivationMap(Explainer):
    """L = ReLU(sum_k w_k A^k) at a target layer; subclasses give the weights w (B, K).

    Args:
        target_layer: name of the layer; None finds the last one with spatial feature maps.
        relu: keep the ReLU of the formula; without it the map is signed.
    """

    def __init__(self, target_layer: str | None = None, relu: bool = True) -> None:
        self.target_layer = target_layer
        self.relu = relu

    @abstractmethod
    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) or (B, K, h, w) from A and dy_c/dA, both (B, K, h, w)."""

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, h, w) weighted sum at the layer's resolution."""
        activations, gradients = self.features(model, images, targets)
        maps = (self.weights(activations, gradients) * activations).sum(dim=1)
        return maps.relu() if self.relu else maps

    def features(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A and dy_c/dA of the target layer, (B, K, h, w) each; y_c is the logit.

        The graph starts at the target layer, so the backward pass runs through the tail of the network alone.
        """
        name = self.target_layer if self.target_layer is not None else find_target_layer(model, images)
        layer = named_layer(model, name)
        kept: list[Tensor] = []

        def start_graph(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            # A copy goes on: an in-place ReLU behind the layer must not overwrite the leaf.
            return kept[-1].clone()

        flags = [(p, p.requires_grad) for p in model.parameters()]
        hook = layer.register_forward_hook(start_graph)
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            logits = logits_of(model(images))
        finally:
            hook.remove()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        score = logits.gather(1, targets[:, None]).sum()
        (gradients,) = torch.autograd.grad(score, kept[-1])
        return kept[-1].detach(), gradients


class GradCAM(ActivationMap):
    """Grad-CAM (Selvaraju et al. 2017): w_k = (1/Z) sum_ij dy_c/dA^k_ij."""

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Spatial mean of the gradients."""
        return gradients.mean(dim=(2, 3), keepdim=True)
