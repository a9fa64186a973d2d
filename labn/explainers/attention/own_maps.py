"""Maps that a network computes itself: the attention of its branch, and the content path of its lambda layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import run_model
from labn.models.attention_branch import gate_attention
from labn.models.lambda_networks.layer import LambdaLayer


class BranchAttention(Explainer):
    """The attention map of LABN or ABN (JSAI 2022, eq. 1): one map for all classes, in [0, 1] before resizing.

    Args:
        explain_map: `raw`, the sigmoid map, or `thresholded`, in which values that the gate stops are 0 (eq. 2).

    Raises:
        InputError: an unknown `explain_map`; on call, a network without attention branch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from types import SimpleNamespace
        >>> from labn.explainers import BranchAttention
        >>> class Network(nn.Module):
        ...     def forward(self, x):
        ...         attention = torch.sigmoid(x.mean(1, keepdim=True))
        ...         return SimpleNamespace(logits=x.mean((2, 3)), attention=attention)
        >>> BranchAttention()(Network(), torch.zeros(1, 3, 2, 2), torch.tensor([0]))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    def __init__(self, explain_map: str = "raw") -> None:
        if explain_map not in ("raw", "thresholded"):
            raise InputError(f"explain_map is {explain_map!r}; it must be raw or thresholded.")
        self.explain_map = explain_map

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Attention (B, h, w)."""
        with torch.no_grad():
            attention = getattr(model(images), "attention", None)
        if attention is None:
            raise InputError(f"{type(model).__name__} has no attention branch; choose a method that needs none.")
        if self.explain_map == "thresholded":
            threshold = getattr(model, "threshold", None)
            attention = gate_attention(attention, threshold(attention) if threshold else getattr(model, "theta", 0.0))
        return attention.squeeze(1)


class LambdaAttention(Explainer):
    """The content path of a lambda layer, lambda_c^T Q, averaged over its channels (JSAI 2022, section 4.2).

    Args:
        layer: number of the lambda layer in the order of registration, from 0; None: the second one, or the only one.

    Raises:
        InputError: on call, a network without lambda layer, or without one of this number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import LambdaAttention
        >>> from labn.models.lambda_networks.layer import LambdaLayer
        >>> model = nn.Sequential(LambdaLayer(4, dim_k=2, heads=2, r=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> LambdaAttention()(model, torch.rand(2, 4, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Mean (B, h, w) of the content path over the channels."""
        layers = [module for module in model.modules() if isinstance(module, LambdaLayer)]
        if not layers:
            raise InputError(f"{type(model).__name__} has no lambda layer; choose another method than lambda.")
        chosen = min(1, len(layers) - 1) if self.layer is None else self.layer
        if not 0 <= chosen < len(layers):
            raise InputError(f"layer is {chosen}, but the network has {len(layers)} lambda layers, numbered from 0.")
        # One image at a time: these maps are nearly flat, and convolutions of other batch sizes round differently, so
        # that an insertion curve would see another order of nearly equal pixels.
        return torch.cat([self._content(model, layers[chosen], image) for image in images.split(1)])

    def _content(self, model: nn.Module, layer: LambdaLayer, image: Tensor) -> Tensor:
        """Mean (1, h, w) of the content path for one image (1, C, H, W)."""
        inputs: list[Tensor] = []
        with torch.no_grad(), temporary_hooks(before={layer: lambda _, args: inputs.append(args[0])}):
            run_model(model, image)
            return layer.content(inputs[0]).mean(dim=1)
