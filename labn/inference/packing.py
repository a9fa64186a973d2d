"""Convolutions on the CPU whose weights are reordered into oneDNN's blocked layout once, not at every call.

The stock layer reorders its weights in every forward, and on one thread it takes a slower path for 1x1 kernels in
batches below 16. The operators used here are those that `torch.compile` emits when it freezes a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labn.inference.folding import plain_convolution, replace_modules
from labn.inference.hooks import temporary_hooks


def can_pack(probe: Tensor, dtype: torch.dtype) -> bool:
    """Whether this machine and this build of torch pack convolutions of `dtype` for images like the probe."""
    operators = torch.ops.mkldnn
    if probe.device.type != "cpu" or probe.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    # Both operators are private and may be missing in another release; convolutions then stay as they are.
    if not (hasattr(operators, "_convolution_pointwise") and hasattr(operators, "_reorder_convolution_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported())


class PackedKernel:
    """The weights of a convolution in the blocked layout, for inference only.

    Args:
        weight: (C_out, C_in / groups, kH, kW), float32 or bfloat16.
        geometry: padding, stride, dilation and groups.
        input_size: (N, C, H, W) for which the layout is chosen; inputs of other sizes give the same values.
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
        conv: a convolution with zero padding; not changed.
        input_size: (N, C, H, W) for which the layout is chosen; inputs of other sizes give the same values.
        dtype: float32 or bfloat16; inputs are converted to it.
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


def _is_packable(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and plain_convolution(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def pack_convolutions(model: nn.Module, probe: Tensor, batch: int, dtype: torch.dtype) -> None:
    """Replace the plain `Conv2d` layers of `model` by packed ones, in place.

    Args:
        model: a copy that may be changed.
        probe: (1, C, H, W), run once to record the input size of every convolution.
        batch: batch size for which the layouts are chosen.
        dtype: see `PackedConv2d`. A layer that the model runs outside of autocast, to keep its precision, is packed in
            the dtype of its input.
    """
    sizes: dict[nn.Conv2d, tuple[int, ...]] = {}
    exact: set[nn.Conv2d] = set()
    device, reduced = probe.device.type, dtype != probe.dtype

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        sizes[module] = (batch, *inputs[0].shape[1:])
        if reduced and not torch.is_autocast_enabled(device):
            exact.add(module)

    packable = [module for module in model.modules() if _is_packable(module)]
    with temporary_hooks(before=dict.fromkeys(packable, record)), torch.autocast(device, dtype, enabled=reduced):
        model(probe)
    replace_modules(
        model,
        {conv: PackedConv2d(conv, size, probe.dtype if conv in exact else dtype) for conv, size in sizes.items()},
    )
