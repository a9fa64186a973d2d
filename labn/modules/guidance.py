"""Saliency-guided training: the most salient pixels alone must carry the prediction.

    x~ = M * x + (1 - M) * b,      L_KL = D_KL( p(.|x) || p(.|x~) )          (ACCV 2022, slide 6)

M is 1 on the patches with the highest values of the model's own map and 0 elsewhere, and b is a fill. If no gradient
reaches the map through M, the loss determines the sign of the attention only indirectly, and training often ends with
low attention on the evidence. A mask that passes the gradient on to the map determines the sign directly (`mask_grad`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from labn.errors import InputError
from labn.explainers.base import resize_maps
from labn.modules.losses import kl_divergence
from labn.perturbation.fills import FILLS
from labn.perturbation.patches import patch_pool, patches_to_pixels, top_patches


def hard_mask(maps: Tensor, patch_size: int, keep_ratio: float) -> Tensor:
    """Boolean mask (B, H, W): True on the `round(keep_ratio * N)` of N patches (at least one) with the highest mean.

    These are the first patches in the order of the insertion metric, so that training and metric agree.

    Example:
        >>> maps = torch.tensor([[[0.0, 0.9], [0.1, 0.2]]])
        >>> hard_mask(maps, patch_size=1, keep_ratio=0.5).tolist()
        [[[False, True], [False, True]]]
    """
    values = patch_pool(maps, patch_size)
    count = max(1, round(keep_ratio * values[0].numel()))
    return patches_to_pixels(top_patches(values, count), patch_size, (maps.shape[-2], maps.shape[-1]))


def detached_mask(maps: Tensor, mask: Tensor) -> Tensor:
    """The hard mask without any gradient to the map, as in the unreleased code of ACCV 2022."""
    return mask.to(maps.dtype)


def straight_through_mask(maps: Tensor, mask: Tensor) -> Tensor:
    """The hard mask in the forward pass, and the identity to the map in the backward pass (straight-through)."""
    # The second term is 0 and has the gradient of `maps`.
    return mask.to(maps.dtype) + (maps - maps.detach())


def soft_mask(maps: Tensor, mask: Tensor) -> Tensor:
    """The map a itself as the weight, x~ = a x + (1 - a) b; the hard mask and its keep ratio have no effect."""
    return maps


MASK_GRADIENTS = {"detached": detached_mask, "straight_through": straight_through_mask, "soft": soft_mask}


@contextmanager
def frozen_batchnorm(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Put all BatchNorm layers into eval mode if `frozen`, and restore their modes afterwards."""
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
    """Options of saliency-guided training; the defaults are the preset `accv22` of this project.

    Attributes:
        kl_weight: weight of the KL term (0.5 in the branch code of the ACCV paper).
        keep_ratio: share of the patches that are kept; from a list, a value is drawn for every batch.
        keep_probabilities: probability of each keep ratio; None draws uniformly.
        patch_size: side of a patch in pixels; from a list, a value is drawn for every batch.
        patch_probabilities: probability of each patch size; None draws uniformly.
        fill: name in `FILLS` of the values that replace the other pixels: bias, black, mean, blur, uniform, ...
        source: `attention` (the model's map) or `gradient` (absolute input gradient, Ismail et al. 2021).
        mask_grad: gradient from the mask to the map: `straight_through`, `detached` or `soft`.
        deletion_share: share of the training steps that delete the salient pixels instead. The prediction on the
            remaining pixels is then trained towards the prediction on the fill alone, D_KL(p(b) || p((1 - M) x + M b)).
            With insertion alone, a network can encode the class in the shape of the kept region, and the evidence may
            lie outside; with both directions it cannot.
        deletion_by: `step` deletes in the whole batch or nowhere; `image` deletes in `round(deletion_share * B)` images
            of every batch, which are drawn, so that every step trains both directions.
        deletion_class: class that images without their salient pixels are trained towards, for data in which the
            absence of evidence is a class (no lesion is class 0); None uses the prediction on the fill alone.
        target: what the prediction on the kept pixels is trained towards: the `prediction` on the whole image, or its
            `label`.
        map_weight: weight of mean(attention), a penalty that keeps a soft mask from becoming 1 everywhere.
        direction: `original_masked` is D_KL(p(x) || p(x~)), `masked_original` is D_KL(p(x~) || p(x)).
        detach_target: stop the gradient through p(x) in the KL term.
        branch_loss_on: images of the attention branch's loss: `original`, or `masked` as in the branch code, where it
            is a side effect. Steps that delete the salient pixels always use the original images.
        masked_bn: BatchNorm statistics for masked images: `train` uses those of the batch, `frozen` the running ones.
        seed: seed of the drawn keep ratios, patch sizes and the uniform fill.

    Raises:
        InputError: a field has an unknown choice, a number out of range, or a list of wrong length.

    Example:
        >>> guidance = SaliencyGuidance(keep_ratio=0.25, mask_grad="detached")
        >>> guidance.mask(torch.tensor([[[0.1, 0.2], [0.9, 0.3]]]), step=0).tolist()
        [[[0.0, 0.0], [1.0, 0.0]]]
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
    deletion_by: str = "step"
    deletion_class: int | None = None
    target: str = "prediction"
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
            "deletion_by": ("step", "image"),
            "target": ("prediction", "label"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"guidance.{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}.")
        if self.source == "gradient" and self.mask_grad != "detached":
            raise InputError("guidance.source 'gradient' gives no gradient; set guidance.mask_grad to 'detached'.")
        self._ratios, self._sizes = _as_list(self.keep_ratio), _as_list(self.patch_size)
        if not self._ratios or not all(0 < ratio <= 1 for ratio in self._ratios):
            raise InputError(f"guidance.keep_ratio is {self.keep_ratio}; every share must be in (0, 1].")
        if not self._sizes or not all(1 <= size < math.inf and size == int(size) for size in self._sizes):
            raise InputError(
                f"guidance.patch_size is {self.patch_size}; every side must be an integer number of pixels, at least 1."
            )
        if not 0 <= self.deletion_share <= 1:
            raise InputError(f"guidance.deletion_share is {self.deletion_share}; it must be in [0, 1].")
        if self.deletion_class is not None and self.deletion_class < 0:
            raise InputError(f"guidance.deletion_class is {self.deletion_class}; it must be at least 0.")
        for name in ("kl_weight", "map_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"guidance.{name} is {getattr(self, name)}; it must be finite and at least 0.")
        _check_probabilities("keep", self.keep_probabilities, "keep_ratio", self._ratios)
        _check_probabilities("patch", self.patch_probabilities, "patch_size", self._sizes)

    def mask(self, maps: Tensor, step: int) -> Tensor:
        """Weights (B, H, W) of the original pixels for maps (B, H, W); `step` seeds keep ratio and patch size."""
        # A generator per step, on the CPU: all ranks draw the same, and so does a resumed run.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        ratio = draw(self._ratios, self.keep_probabilities, generator)
        size = int(draw(self._sizes, self.patch_probabilities, generator))
        mask = hard_mask(maps.detach(), size, ratio)
        return MASK_GRADIENTS[self.mask_grad](maps, mask)

    def deletes(self, step: int, count: int) -> Tensor:
        """Which of the `count` images of this training step lose their salient pixels, (count,) bool."""
        # Another offset than in `mask`: the two draws of a step must be independent.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 500_009)
        if self.deletion_by == "image":
            return torch.randperm(count, generator=generator) < round(self.deletion_share * count)
        return (torch.rand(1, generator=generator) < self.deletion_share).expand(count)

    def divergence(self, logits: Tensor, masked_logits: Tensor) -> Tensor:
        """The KL term between predictions on the original and on the masked images, from their logits (B, K)."""
        original = logits.detach() if self.detach_target else logits
        p, q = original.log_softmax(dim=1), masked_logits.log_softmax(dim=1)
        return kl_divergence(p, q) if self.direction == "original_masked" else kl_divergence(q, p)

    def loss(
        self, logits: Tensor, masked_logits: Tensor, deletes: Tensor, bare: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Mean guidance loss of a batch: `divergence` from a prediction, or cross entropy with a class.

        Args:
            logits: (B, K) of the whole images.
            masked_logits: (B, K) of the masked images.
            deletes: (B,) bool, see `deletes`.
            bare: (B, K) of the fill alone; needed where an image loses its salient pixels and `deletion_class` is None.
            labels: (B,) int64.
        """
        halves = []
        for chosen, target, classes in (
            (~deletes, logits, labels if self.target == "label" else None),
            (deletes, bare, None if self.deletion_class is None else torch.full_like(labels, self.deletion_class)),
        ):
            if not bool(chosen.any()):
                continue
            shown = masked_logits[chosen]
            if classes is not None:
                part = F.cross_entropy(shown, classes[chosen])
            else:
                assert target is not None
                part = self.divergence(target[chosen], shown)
            halves.append(part * len(shown))
        return torch.stack(halves).sum() / len(masked_logits)


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _check_probabilities(kind: str, weights: Sequence[float] | None, of: str, values: Sequence[float]) -> None:
    if weights is None:
        return
    if len(weights) != len(values):
        raise InputError(
            f"guidance.{kind}_probabilities has {len(weights)} and guidance.{of} {len(values)} values; give one "
            "probability for each value, or none."
        )
    if not (all(0 <= value < math.inf for value in weights) and sum(weights) > 0):
        raise InputError(
            f"guidance.{kind}_probabilities is {weights}; every number must be at least 0, and one above 0."
        )


def draw(values: Sequence[float], probabilities: Sequence[float] | None, generator: torch.Generator) -> float:
    """Draw one of `values` with `probabilities`, or uniformly where these are None."""
    if len(values) == 1:
        return values[0]
    weights = torch.tensor(probabilities if probabilities is not None else [1.0] * len(values))
    if len(weights) != len(values):
        raise InputError(f"{len(weights)} probabilities for {len(values)} values; give one each.")
    return values[int(torch.multinomial(weights, 1, generator=generator))]


def masked_images(images: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Masked images M x + (1 - M) b, from images (B, C, H, W), mask (B, H, W) and a fill that broadcasts to the images.

    Example:
        >>> masked_images(torch.full((1, 1, 1, 2), 3.0), torch.tensor([[[1.0, 0.0]]]), torch.zeros(1)).tolist()
        [[[[3.0, 0.0]]]]
    """
    weight = mask.unsqueeze(1)
    return weight * images + (1 - weight) * fill


def attention_maps(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize attention (B, 1, h, w) bilinearly to maps (B, H, W); gradients are kept."""
    return resize_maps(attention.squeeze(1), size)


def input_gradient(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Absolute gradient (B, H, W) of the label's logit, averaged over channels; `images` must require a gradient."""
    score = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, images, retain_graph=True)
    return gradient.abs().mean(dim=1)
