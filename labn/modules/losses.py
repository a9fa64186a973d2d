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
        weights: one positive number per class, negative class first; None gives all classes the same weight.

    Example:
        >>> loss = WeightedCrossEntropy([1.0, 3.0])
        >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> round(loss(logits, labels).item(), 4), loss.normaliser(labels)
        (0.2685, 4.0)
    """

    weights: Tensor | None

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)

    def normaliser(self, labels: Tensor) -> float:
        """The denominator of a batch's mean: the sum of its samples' weights.

        Batch means, weighted by their normalisers, average to the mean over all samples.
        """
        return float(len(labels) if self.weights is None else self.weights.to(labels.device)[labels].sum())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean over the batch: logits (B, K), labels (B,) int64 -> scalar."""
        weights = self.weights
        return F.cross_entropy(logits, labels, weight=None if weights is None else weights.to(logits.dtype))


class OneHotBCE(WeightedCrossEntropy):
    """Binary cross entropy on one-hot labels, as in the released LABN code.

    `weights` multiply the positive terms of each output (`pos_weight` of `BCEWithLogits`). In evaluation, probabilities
    are still the softmax of the logits.
    """

    def normaliser(self, labels: Tensor) -> float:
        """The batch size; `pos_weight` does not change the denominator."""
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
    """Make the loss called `name` for `num_classes` classes.

    Raises:
        InputError: the name is unknown, or the number of weights is not that of the classes.
    """
    if name not in LOSSES:
        raise InputError(f"loss is {name!r}; it must be one of {', '.join(LOSSES)}.")
    if weights is not None and len(weights) != num_classes:
        raise InputError(f"class_weights has {len(weights)} numbers for {num_classes} classes; give one per class.")
    return LOSSES[name](weights)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over the batch of D_KL(p || q) = sum_k p_k (log p_k - log q_k), from log-probabilities (B, K).

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(kl_divergence(p, q).item(), 4)
        0.1438
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
