"""Saliency-guided training: the most salient pixels alone must carry the prediction.

    x~ = M * x + (1 - M) * b,      L_KL = D_KL( p(.|x) || p(.|x~) )          (ACCV 2022, slide 6)

M keeps the patches that the model's own map ranks highest, b is a fill. With the map detached the loss ties the sign
of the attention only indirectly, and training often ends with LOW attention on the evidence; a mask through which the
gradient reaches the map ties it directly (`mask_grad`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from labn.errors import InputError
from labn.explainers.base import resize_maps
from labn.modules.losses import kl_divergence
from labn.perturbation.fills import FILLS
from labn.perturbation.patches import patch_pool, patches_to_pixels, top_patches


def hard_mask(maps: Tensor, patch_size: int, keep_ratio: float) -> Tensor:
    """Boolean (B, H, W): True on the `round(keep_ratio * N)` patches (at least one) of the highest pooled value.

    The first patches in the insertion metric's order, so that training and scoring mean the same patches.
    """
    values = patch_pool(maps, patch_size)
    count = max(1, round(keep_ratio * values[0].numel()))
    return patches_to_pixels(top_patches(values, count), patch_size, (maps.shape[-2], maps.shape[-1]))


def detached(maps: Tensor, mask: Tensor) -> Tensor:
    """The hard mask alone: no gradient reaches the map (as in the unreleased ACCV code)."""
    return mask.to(maps.dtype)


def straight_through(maps: Tensor, mask: Tensor) -> Tensor:
    """The hard mask in the forward pass, the identity on the map in the backward pass."""
    return mask.to(maps.dtype) + (maps - maps.detach())


def soft(maps: Tensor, mask: Tensor) -> Tensor:
    """The map itself as a blending weight: x~ = a x + (1 - a) b; the keep ratio plays no part."""
    return maps


MASK_GRADIENTS = {"detached": detached, "straight_through": straight_through, "soft": soft}


@contextmanager
def frozen_batchnorm(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Normalise by the running statistics, and leave them alone, while `frozen`; the flags come back afterwards."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training] if frozen else []
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


@dataclass
class SaliencyGuidance:
    """Options of saliency-guided training; the defaults are the project's `accv22` preset.

    Attributes:
        kl_weight: weight of the KL term (0.5 in the branch code of the ACCV paper).
        keep_ratio: share of the patches kept; several values are drawn from, per batch, with `keep_probabilities`.
        keep_probabilities: one probability per keep ratio; None draws uniformly.
        patch_size: side of a patch in pixels; several are drawn from, per batch, with `patch_probabilities`.
        patch_probabilities: one probability per patch size; None draws uniformly.
        fill: what replaces the other pixels, by a name of `FILLS`: bias, black, mean, blur, uniform, ...
        source: `attention` (the model's map) or `gradient` (absolute input gradient, Ismail et al. 2021).
        mask_grad: `straight_through`, `detached` or `soft`.
        deletion_share: share of the steps that show the complement instead: what is left without the salient pixels
            must predict what the bare fill predicts, D_KL(p(b) || p((1 - M) x + M b)). A network can read a class off
            the SHAPE of the kept region, with the evidence outside; it cannot do so in both directions.
        map_weight: weight of mean(attention), which keeps a soft mask from opening everywhere.
        direction: `original_masked` is D_KL(p(x) || p(x~)), `masked_original` the reverse.
        detach_target: no gradient through p(x) in the KL term.
        branch_loss_on: `original` image, or `masked` as the branch code (by a side effect) does; steps that delete the
            salient pixels take the original's, whose evidence is there.
        masked_bn: `train` normalises masked images by their batch, `frozen` by the running statistics.
        seed: of the drawn keep ratios, patch sizes and of the uniform fill.

    Raises:
        ValueError: a choice, number or list that no training can follow; the message names the field.
    """

    kl_weight: float = 0.5
    keep_ratio: float | list[float] = 0.1
    keep_probabilities: list[float] | None = None
    patch_size: int | list[int] = 1
    patch_probabilities: list[float] | None = None
    fill: str = "bias"
    source: str = "attention"
    mask_grad: str = "straight_through"
    deletion_share: float = 0.0
    map_weight: float = 0.0
    direction: str = "original_masked"
    detach_target: bool = False
    branch_loss_on: str = "original"
    masked_bn: str = "train"
    seed: int = 0
    _ratios: list[float] = field(init=False, repr=False)
    _sizes: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        allowed = {
            "fill": tuple(FILLS),
            "source": ("attention", "gradient"),
            "mask_grad": tuple(MASK_GRADIENTS),
            "direction": ("original_masked", "masked_original"),
            "branch_loss_on": ("original", "masked"),
            "masked_bn": ("train", "frozen"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"guidance.{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}.")
        if self.source == "gradient" and self.mask_grad != "detached":
            raise InputError("guidance.source 'gradient' gives a constant map; set guidance.mask_grad to 'detached'.")
        self._ratios, self._sizes = _listed(self.keep_ratio), _listed(self.patch_size)
        if not self._ratios or not all(0 < ratio <= 1 for ratio in self._ratios):
            raise InputError(f"guidance.keep_ratio is {self.keep_ratio}; shares lie in (0, 1].")
        if not self._sizes or not all(1 <= size < math.inf and size == int(size) for size in self._sizes):
            raise InputError(
                f"guidance.patch_size is {self.patch_size}; sides are whole numbers of pixels, at least 1."
            )
        if not 0 <= self.deletion_share <= 1:
            raise InputError(f"guidance.deletion_share is {self.deletion_share}; a share lies in [0, 1].")
        for name in ("kl_weight", "map_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"guidance.{name} is {getattr(self, name)}; a weight is not negative.")
        _check_probabilities("keep", self.keep_probabilities, "keep_ratio", self._ratios)
        _check_probabilities("patch", self.patch_probabilities, "patch_size", self._sizes)

    def mask(self, maps: Tensor, step: int) -> Tensor:
        """Weights (B, H, W) of the original pixels for maps (B, H, W); `step` seeds what is drawn."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        ratio = draw(self._ratios, self.keep_probabilities, generator)
        size = int(draw(self._sizes, self.patch_probabilities, generator))
        mask = hard_mask(maps.detach(), size, ratio)
        return MASK_GRADIENTS[self.mask_grad](maps, mask)

    def deletes(self, step: int) -> bool:
        """Whether this step shows the complement of the salient pixels."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 500_009)
        return float(torch.rand(1, generator=generator)) < self.deletion_share

    def divergence(self, logits: Tensor, masked_logits: Tensor) -> Tensor:
        """The KL term between the predictions (B, K) on the original and on the masked images."""
        original = logits.detach() if self.detach_target else logits
        p, q = original.log_softmax(dim=1), masked_logits.log_softmax(dim=1)
        return kl_divergence(p, q) if self.direction == "original_masked" else kl_divergence(q, p)


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _check_probabilities(kind: str, given: Sequence[float] | None, of: str, values: Sequence[float]) -> None:
    if given is None:
        return
    if len(given) != len(values):
        raise InputError(
            f"guidance.{kind}_probabilities has {len(given)} and guidance.{of} {len(values)} values; give one "
            "probability for each value, or none."
        )
    if not (all(0 <= value < math.inf for value in given) and sum(given) > 0):
        raise InputError(f"guidance.{kind}_probabilities is {given}; give numbers that are not negative, nor all 0.")


def draw(values: Sequence[float], probabilities: Sequence[float] | None, generator: torch.Generator) -> float:
    """One of `values`, drawn with `probabilities` (uniformly without)."""
    if len(values) == 1:
        return values[0]
    weights = torch.tensor(probabilities if probabilities is not None else [1.0] * len(values))
    if len(weights) != len(values):
        raise InputError(f"{len(weights)} probabilities for {len(values)} values; give one each.")
    return values[int(torch.multinomial(weights, 1, generator=generator))]


def masked_images(images: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """x~ = M x + (1 - M) b for images (B, C, H, W), mask (B, H, W) and a fill that broadcasts to the images."""
    weight = mask.unsqueeze(1)
    return weight * images + (1 - weight) * fill


def attention_maps(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention (B, 1, h, w) enlarged bilinearly to (B, H, W), gradient kept."""
    return resize_maps(attention.squeeze(1), size)


def input_gradient(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Absolute gradient of the label's logit, averaged over channels, (B, H, W); `images` must require grad."""
    score = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, images, retain_graph=True)
    return gradient.abs().mean(dim=1)
