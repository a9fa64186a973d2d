"""The tail of a network: the layers after one layer, run on other feature maps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from labn.explainers.cam.features import replacing_call, replacing_output
from labn.explainers.cam.target_layer import TargetLayer
from labn.inference.deep_copy import deep_copy
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import fast_logits, run_model


class _Recorded(nn.Module):
    """A replacement for a module that has run already; it returns the recorded output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """The recorded output."""
        return self.output


class _Trunk:
    """Records one forward: the outputs of all modules that returned before the target layer did."""

    def __init__(self, model: nn.Module, layer: TargetLayer, image: Tensor) -> None:
        self.layer = layer
        self.outputs: dict[nn.Module, Any] = {}
        self.output = torch.empty(0)
        self.calls: Counter[nn.Module] = Counter()
        self._open = True
        with temporary_hooks(after=dict.fromkeys(model.modules(), self._see)):
            self.logits = fast_logits(model, image)

    def _see(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.calls[module] += 1
        if module is self.layer.module and self.calls[module] == self.layer.call + 1:
            self._open, self.output = False, output
        elif self._open:
            self.outputs[module] = output

    def versions(self) -> list[int]:
        """Version counters of the recorded tensors, which an in-place operation on a record would raise."""
        return [output._version for output in self.outputs.values() if isinstance(output, Tensor)]

    def replaceable(self, module: nn.Module) -> bool:
        """Whether the recorded output can replace the module: it returned before the target layer and ran once."""
        return module in self.outputs and self.calls[module] == 1


class _Cut:
    """A copy of the network with the trunk replaced by recorded outputs; it shares the original's weights."""

    def __init__(self, model: nn.Module, layer: TargetLayer, trunk: _Trunk, image: Tensor) -> None:
        self.image, self.layer, self.stub = image, layer.module, _Recorded(None)
        # As a memo of `deepcopy`, the tensors stand for their own copies: modules are copied, weights are shared.
        shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.model = deep_copy(model, shared)
        self._replace(model, trunk, dict(zip(model.modules(), self.model.modules())))

    def _replace(self, module: nn.Module, trunk: _Trunk, twins: dict[nn.Module, nn.Module]) -> None:
        for name, child in module._modules.items():
            if child is self.layer:
                setattr(twins[module], name, self.stub)
            elif child is not None and trunk.replaceable(child):
                setattr(twins[module], name, _Recorded(trunk.outputs[child]))
            elif child is not None:
                self._replace(child, trunk, twins)

    def __call__(self, activations: Tensor) -> Tensor:
        """Logits (n, num_classes) for the layer's output (n, ...); the remaining layers see one image for all n."""
        self.stub.output = activations
        return run_model(self.model, self.image)


class _Whole:
    """The whole network on the repeated image, with the layer's output replaced: always correct, but slow."""

    def __init__(self, model: nn.Module, layer: TargetLayer, trunk: _Trunk, image: Tensor) -> None:
        self.model, self.layer, self.image = model, layer, image

    def __call__(self, activations: Tensor) -> Tensor:
        """Logits (n, num_classes) for the layer's output (n, ...)."""
        # The tail's own feature maps are in the layout of the layer's output already.
        with replacing_call(self.model, self.layer, activations):
            return run_model(self.model, self.image.expand(len(activations), -1, -1, -1), torch.contiguous_format)


class Tail:
    """The tail of a network after one layer, for one image: feature maps in, logits out.

    The trunk, all layers up to this one, runs once. A copy of the network replays its recorded outputs; the copy is
    used only if it reproduces the network's logits, otherwise the whole network runs every time.

    Args:
        model: the network, not changed.
        layer: a submodule of the network that returns feature maps and runs once per forward.
        image: (1, C, H, W).

    Attributes:
        activations: A (1, K, h, w), the output of the layer.
        logits: (1, num_classes) of the image.
        cut: whether the trunk is replayed from records.
    """

    def __init__(self, model: nn.Module, layer: TargetLayer | nn.Module, image: Tensor) -> None:
        layer = layer if isinstance(layer, TargetLayer) else TargetLayer(layer)
        maps: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            maps[:] = [output.clone()]
            return output

        with torch.no_grad(), replacing_output(model, layer, image.shape[-2:], keep):
            trunk = _Trunk(model, layer, image)
        self.activations, self.logits = maps[0], trunk.logits
        self._layer, self._output, self._size = layer, trunk.output, image.shape[-2:]
        self._run: _Cut | _Whole = _Whole(model, layer, trunk, image)
        self.cut = trunk.calls[layer.module] == 1 and self._try_cut(model, layer, trunk, image)

    def __call__(self, activations: Tensor) -> Tensor:
        """Logits (n, num_classes) with the feature maps (n, K, h, w) in place of the layer's own."""
        return self._run(self._layer.output_of(activations, self._output, self._size))

    def _try_cut(self, model: nn.Module, layer: TargetLayer, trunk: _Trunk, image: Tensor) -> bool:
        """Use the replayed trunk if it reproduces the logits, for two images at once, without changing its records."""
        whole, versions = self._run, trunk.versions()
        try:
            self._run = _Cut(model, layer, trunk, image)
            with torch.no_grad():
                logits = self(self.activations.repeat(2, 1, 1, 1))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            logits = self.logits[:0]  # a layer between the records needs the batch size of the feature maps
        limit = 1e-4 * self.logits.abs().max().clamp(min=1)
        same = len(logits) == 2 and bool(((logits - self.logits).abs() <= limit).all())
        if not same or versions != trunk.versions():
            self._run = whole
        return self._run is not whole
