"""Probability of a class from logits: softmax, sigmoid, or the logit itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from labn.errors import InputError

PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "logit": lambda logits: logits,
    "identity": lambda probabilities: probabilities,
}
"""How the output of a model is read; "identity" is for models that return probabilities."""


def class_probability(logits: Tensor, classes: Tensor, probability: str = "softmax") -> Tensor:
    """The probability of one class per sample at every point of a curve.

    Args:
        logits: (S, K, num_classes), K points per sample.
        classes: (S,) int64, one class per sample.
        probability: "softmax", "sigmoid" or "logit" (the logit itself).

    Returns:
        (S, K).

    Raises:
        InputError: an unknown `probability`, logits of another shape, a class that the model does not have, or the
            softmax of a single logit.

    Example:
        >>> class_probability(torch.zeros(1, 1, 4), torch.tensor([2]))
        tensor([[0.2500]])
    """
    if probability not in PROBABILITIES:
        raise InputError(f"probability must be one of {sorted(PROBABILITIES)}, got {probability!r}.")
    if logits.ndim != 3 or classes.shape != logits.shape[:1]:
        raise InputError(
            f"logits must be (S, K, num_classes) and classes (S,); got {tuple(logits.shape)} and "
            f"{tuple(classes.shape)}."
        )
    number = logits.shape[-1]
    if number == 1 and probability == "softmax":
        raise InputError(
            "the model has one logit, whose softmax is 1 whatever the image shows; insertion-deletion and "
            "fill_probability read it with probability='sigmoid'."
        )
    # One question to the device, which has to wait for the answer.
    if bool(((classes < 0) | (classes >= number)).any()):
        raise InputError(
            f"labels and targets must be from 0 to {number - 1}, as the model has {number} classes; "
            f"got {int(classes.min())} to {int(classes.max())}."
        )
    # The softmax is over all classes, so it comes before the selection.
    chosen = classes.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return PROBABILITIES[probability](logits).gather(2, chosen).squeeze(2)
