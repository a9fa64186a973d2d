"""Classification losses of the LABN papers and their released code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError


class WeightedCrossEntropy(nn.Module):
    """Softmax cross entropy with one weight per class (JSAI 2022, eq. 6 and table 1).

    Args:
        weights: one positive number per class, negative class first; None weighs all classes alike.
    """

    weights: Tensor | None

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)

    def normaliser(self, labels: Tensor) -> float:
        """What the mean over a batch divides by: batch means weighted with it give the mean over all samples."""
        return float(len(labels) if self.weights is None else self.weights.to(labels.device)[labels].sum())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean over the batch: logits (B, K), labels (B,) int64 -> scalar."""
        weights = self.weights
        return F.cross_entropy(logits, labels, weight=None if weights is None else weights.to(logits.dtype))


class OneHotBCE(WeightedCrossEntropy):
    """Binary cross entropy on the one-hot label vector, as the released LABN code trains.

    `weights` multiply the positive ("one") terms of each output: `pos_weight` of `BCEWithLogits`. Probabilities at
    evaluation are a softmax over the logits nevertheless.
    """

    def normaliser(self, labels: Tensor) -> float:
        """The batch size: the weights multiply terms and do not enter the mean's denominator."""
        return float(len(labels))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch and the K outputs: logits (B, K), labels (B,) int64 -> scalar."""
        one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        weights = self.weights
        return F.binary_cross_entropy_with_logits(
            logits, one_hot, pos_weight=None if weights is None else weights.to(logits.dtype)
        )


LOSSES: dict[str, type[WeightedCrossEntropy]] = {"ce": WeightedCrossEntropy, "bce_onehot": OneHotBCE}


def make_loss(name: str, weights: Sequence[float] | None, num_classes: int) -> WeightedCrossEntropy:
    """The loss called `name` for `num_classes` classes.

    Raises:
        ValueError: no such loss, or another number of weights than classes.
    """
    if name not in LOSSES:
        raise InputError(f"loss is {name!r}; it must be one of {', '.join(LOSSES)}.")
    if weights is not None and len(weights) != num_classes:
        raise InputError(f"class_weights has {len(weights)} numbers for {num_classes} classes; give one per class.")
    return LOSSES[name](weights)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over the batch of D_KL(p || q) from log-probabilities (B, K); zero iff p == q."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
