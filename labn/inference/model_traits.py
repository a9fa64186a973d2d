"""Properties of a model that a method must know and that only running the model shows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labn.inference.fingerprint import ModelCache, note_written, version_key
from labn.inference.modes import evaluating, matching, run_model

REPEATS = 1e-4  # largest relative difference of two equal calls; atomics on a GPU give about 1e-6
SUMS_TO_ONE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class ModelTraits:
    """What two equal calls of a model show.

    Attributes:
        repeats: both calls gave the same logits; a model with random operations does not repeat.
        probabilities: every row is non-negative and sums to one, as after a softmax.
        decided: the answers hold for other images and weights, too; logits that are all equal, the same for different
            images, or not finite, show nothing.
    """

    repeats: bool = True
    probabilities: bool = False
    decided: bool = True


# Traits follow from the operations, except for weights of zero, which decide nothing. Reading all weights at each call,
# as a copy needs, would cost more than a Grad-CAM may.
_traits: ModelCache[ModelTraits] = ModelCache(version_key)


def traits_of(model: nn.Module, images: Tensor) -> ModelTraits:
    """The traits of `model`, seen on the first two images (B, C, H, W).

    The model is run once per state and dtype, and again on the next images where these decide nothing.
    """
    # The dtype matters: rounding hides from half precision that rows sum to one.
    name = images.dtype, images.device
    return _traits.get(model, name, lambda: _seen(model, images[:2]), keep=lambda traits: traits.decided)


def _seen(model: nn.Module, images: Tensor) -> ModelTraits:
    matched = matching(model, images)
    with torch.inference_mode(False), torch.no_grad(), evaluating(matched, images.device.type):
        first = run_model(matched, images)
        note_written(matched)
        second = run_model(matched, images)
    if first.ndim != 2 or first.shape != second.shape:
        return ModelTraits()
    repeats, probabilities = repeat_each_other(first, second), are_probabilities(first)
    constant = len(first) == 2 and torch.equal(*first) and not torch.equal(*images)
    return ModelTraits(repeats, probabilities, not repeats or probabilities or not (constant or _is_silent(first)))


def repeat_each_other(first: Tensor, second: Tensor) -> bool:
    """Whether two logits (B, K) of the same images are equal up to rounding; NaN equals NaN."""
    finite = first.isfinite() & second.isfinite()
    scale = first[finite].abs().max().clamp(min=1e-6) if finite.any() else 1.0
    return bool(((first - second)[finite].abs() <= REPEATS * scale).all())


def are_probabilities(logits: Tensor) -> bool:
    """Whether the rows of (B, K) are distributions: at least two classes, non-negative, summing to one.

    A uniform row says nothing, because a network with zero weights gives one too.
    """
    if logits.shape[1] < 2 or logits.dtype not in SUMS_TO_ONE:
        return False
    limit = SUMS_TO_ONE[logits.dtype]
    return not _is_uniform(logits) and bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() <= limit).all())


def _is_uniform(logits: Tensor) -> bool:
    """Whether the logits of every row of (B, K) are equal up to rounding."""
    limit = SUMS_TO_ONE.get(logits.dtype, torch.finfo(logits.dtype).eps)
    return bool(((logits - logits[:, :1]).abs() <= limit).all())


def _is_silent(logits: Tensor) -> bool:
    """Whether (B, K) tell nothing about the model: rows of two or more equal logits, or a logit that is not finite."""
    return not bool(logits.isfinite().all()) or (logits.shape[1] > 1 and _is_uniform(logits))


def warn_unless_repeating(model: nn.Module, images: Tensor) -> ModelTraits:
    """The traits of `model`, after a warning if two equal calls differ."""
    traits = traits_of(model, images)
    if not traits.repeats:
        warnings.warn(f"{random_sentence(model)} Maps and scores vary from call to call.", stacklevel=4)
    return traits


def random_sentence(model: nn.Module) -> str:
    """The sentence that names a model whose equal calls differ."""
    return (
        f"{type(model).__name__} gives other logits at every call for the same images in eval mode: its forward pass "
        "has a random operation, such as F.dropout without training=self.training."
    )


def probabilities_sentence(model: nn.Module) -> str:
    """The sentence that names a model which ends in a softmax."""
    return (
        f"{type(model).__name__} returns probabilities (its rows sum to one) in place of logits; pass the model "
        "without its softmax."
    )
