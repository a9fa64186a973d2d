"""Convolutions on the CPU with their weights reordered once into oneDNN's blocked layout, instead of at every call.

The stock layer reorders its weights in every forward, and on one thread it takes a slower path for 1x1 kernels in
batches below 16. The operators are those that `torch.compile` emits when it freezes a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labn.inference.folding import plain_convolution, replace_modules


def can_pack(probe: Tensor, dtype: torch.dtype) -> bool:
    """Whether this machine and build pack convolutions of `dtype` for images like the probe."""
    operators = torch.ops.mkldnn
    if probe.device.type != "cpu" or probe.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(operators, "_convolution_pointwise") and hasattr(operators, "_reorder_convolution_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported())


class PackedKernel:
    """A convolution's weights in the blocked layout, ready to be applied; inference only.

    Args:
        weight: (C_out, C_in / groups, kH, kW), float32 or bfloat16.
        geometry: padding, stride, dilation and groups.
        input_size: (N, C, H, W) that the layout is chosen for; other sizes work.
    """

    def __init__(self, weight: Tensor, geometry: tuple[Any, ...], input_size: Sequence[int]) -> None:
        self.geometry = geometry
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(input_size))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H_out, W_out), in the weights' dtype."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self.packed, bias, *self.geometry, "none", [], "")


class PackedConv2d(nn.Module):
    """A `Conv2d` with fixed, packed weights, for inference.

    Args:
        conv: zero-padded convolution; not changed.
        input_size: (N, C, H, W) that the layout is chosen for; other sizes work.
        dtype: float32, or bfloat16 in which inputs are then converted.
    """

    def __init__(self, conv: nn.Conv2d, input_size: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        # Plain attributes: the packed layout supports none of what is done with parameters.
        self.kernel = PackedKernel(conv.weight.detach().to(dtype), geometry, input_size)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H_out, W_out) in the layer's dtype."""
        return self.kernel(x.to(self.dtype), self.bias)


def pack_convolutions(model: nn.Module, probe: Tensor, batch: int, dtype: torch.dtype) -> None:
    """Replace the plain `Conv2d`s of `model` by packed ones, in place.

    Args:
        model: a copy that may be changed.
        probe: (1, C, H, W), run once to see each convolution's input size.
        batch: batch size that layouts are chosen for.
        dtype: see `PackedConv2d`.
    """
    sizes: dict[nn.Conv2d, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        sizes[module] = (batch, *inputs[0].shape[1:])

    handles = [
        module.register_forward_pre_hook(note)
        for module in list(model.modules())
        if isinstance(module, nn.Conv2d)
        and plain_convolution(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    try:
        model(probe)
    finally:
        for handle in handles:
            handle.remove()
    replace_modules(model, {conv: PackedConv2d(conv, size, dtype) for conv, size in sizes.items()})
