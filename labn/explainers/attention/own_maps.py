"""Maps that a network computes for itself: the attention branch's, and the lambda layers' content path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import logits_of
from labn.models.attention_branch import gate_attention
from labn.models.lambda_networks.layer import LambdaLayer


class BranchAttention(Explainer):
    """The attention map of LABN or ABN (JSAI 2022, eq. 1): one map for all classes, in [0, 1] before resizing.

    Args:
        explain_map: `raw`, the sigmoid map, or `thresholded`, with the values at or below theta set to 0 (eq. 2).
    """

    def __init__(self, explain_map: str = "raw") -> None:
        if explain_map not in ("raw", "thresholded"):
            raise InputError(f"explain_map is {explain_map!r}; it must be raw or thresholded.")
        self.explain_map = explain_map

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, h, w) attention."""
        with torch.no_grad():
            attention = getattr(model(images), "attention", None)
        theta = getattr(model, "theta", 0.0)
        if attention is None:
            raise InputError(f"{type(model).__name__} has no attention branch; choose a method that needs none.")
        if self.explain_map == "thresholded":
            attention = gate_attention(attention, float(theta))
        return attention.squeeze(1)


class LambdaAttention(Explainer):
    """The content path of a lambda layer, lambda_c^T Q, averaged over its channels (JSAI 2022, section 4.2).

    Args:
        layer: which lambda layer in order of the forward pass; None is the second, or the only one.
    """

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, h, w) mean of the content path."""
        layers = [module for module in model.modules() if isinstance(module, LambdaLayer)]
        if not layers:
            raise InputError(f"{type(model).__name__} has no lambda layer; choose another method than lambda.")
        chosen = min(1, len(layers) - 1) if self.layer is None else self.layer
        if not 0 <= chosen < len(layers):
            raise InputError(f"layer is {chosen}, but the network has {len(layers)} lambda layers, numbered from 0.")
        inputs: list[Tensor] = []
        with torch.no_grad(), temporary_hooks(before={layers[chosen]: lambda _, args: inputs.append(args[0])}):
            logits_of(model(images))
            return layers[chosen].content(inputs[0]).mean(dim=1)
