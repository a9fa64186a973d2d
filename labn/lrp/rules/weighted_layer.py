"""Products of values with weights from the same image, as linear layers whose weights differ from image to image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError
from labn.lrp.tracing.graph import Node
from labn.lrp.tracing.recorder import Ref, substitute
from labn.lrp.weight_transforms import Flat, WeightTransform
from labn.lrp.weighted_product import Weights


@dataclass(frozen=True)
class WeightedLayer:
    """The weights of one call of `labn.lrp.weighted_product.weighted` on some images, used like a `Layer`.

    Attributes:
        weights: A and b of these images.
        label: label of the layer, for messages.
        scale, shift: g and c of the BatchNorm g y + c that follows, in shapes that broadcast over y; None without one.
            Folded, the weights are g A and the offset is g b + c.
    """

    weights: Weights
    label: str
    scale: Tensor | None = None
    shift: Tensor | None = None

    def run(self, a: Tensor, folded: bool) -> tuple[Tensor, Tensor]:
        """The output z that the rules divide by (before the BatchNorm unless folded), and the next layer's input."""
        # `addcmul` is what the recorded network's BatchNorm amounts to in one pass.
        z = self.weights(a)
        after = z if self.scale is None or self.shift is None else torch.addcmul(self.shift, z, self.scale)
        return (after if folded else z), after

    def offset(self, folded: bool) -> Tensor | None:
        """The offset of the output, in a shape that broadcasts over it; None for a map without one."""
        offset = self.weights.offset()
        if not folded or self.scale is None or self.shift is None:
            return offset
        return self.shift if offset is None else offset * self.scale + self.shift

    def per_channel(self, vector: Tensor) -> Tensor:
        """The offset unchanged: it has the output's axes already."""
        return vector

    def apply(self, a: Tensor, transform: WeightTransform, folded: bool = False, bias: Tensor | None = None) -> Tensor:
        """rho(A) a + b, or rho(g A) a + b.

        Raises:
            InputError: the weights do not support the transform.
        """
        terms = self._terms(transform, folded)
        z = torch.stack([_times(self._supporting(rho).apply(a, rho), g) for rho, g in terms]).sum(0)
        return z if bias is None else z + bias

    def adjoint(self, s: Tensor, transform: WeightTransform, folded: bool, a: Tensor) -> Tensor:
        """rho(A)^T s, or rho(g A)^T s, summed over the axes along which the value a (B, ...) is broadcast."""
        terms = self._terms(transform, folded)
        r = torch.stack([self._supporting(rho).adjoint(_times(s, g), rho) for rho, g in terms]).sum(0)
        return r if r.shape[1:] == a.shape[1:] else r.sum_to_size(len(r), *a.shape[1:])

    def _terms(self, transform: WeightTransform, folded: bool) -> list[tuple[WeightTransform, Tensor | None]]:
        """rho(g A) as a sum of terms g' rho'(A): one for the channels with g >= 0, one for those with g < 0."""
        # Flat weights are ones whatever the scale is.
        if not folded or self.scale is None or isinstance(transform, Flat):
            return [(transform, None)]
        if transform.mirrored == transform or bool((self.scale >= 0).all()):
            return [(transform, self.scale)]
        return [(transform, self.scale.clamp(min=0)), (transform.mirrored, self.scale.clamp(max=0))]

    def _supporting(self, transform: WeightTransform) -> Weights:
        supported = self.weights.transforms
        if supported is not None and not isinstance(transform, supported):
            raise InputError(
                f"{type(self.weights).__name__} of {self.label} does not support the weight transform {transform}, "
                f"which the rule needs; it supports {', '.join(kind.__name__ for kind in supported)} (the rules lrp0 "
                "and epsilon need Identity only)."
            )
        return self.weights


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def weighted_layer_of(node: Node, values: dict[int, Tensor]) -> WeightedLayer:
    """The weights of a node of kind `weighted`, made from the constants among `values`, which receive no gradient."""
    make, *constants = substitute(
        node.call.args[1:], lambda leaf: values[leaf.index].detach() if isinstance(leaf, Ref) else leaf
    )
    if node.norm is None:
        return WeightedLayer(make(*constants), node.label)
    axes = (-1, *[1] * (len(node.call.shape) - 2))
    return WeightedLayer(make(*constants), node.label, node.norm.scale.view(axes), node.norm.shift.view(axes))
