"""The scores of forecasts: confusion, true skill statistic, Brier skill score. No state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts (K, K) int64: row the true class, column the predicted one.

    Args:
        labels: (n,) int64.
        predictions: (n,) int64.
        num_classes: K.
    """
    pairs = labels.long() * num_classes + predictions.long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def true_skill_statistic(hits: Tensor, misses: Tensor, false_alarms: Tensor, rejections: Tensor) -> Tensor:
    """TSS = TP / (TP + FN) - FP / (FP + TN) (Hanssen and Kuipers 1965), in [-1, 1]; NaN where a side has no sample.

    Unlike accuracy it does not depend on how common flares are: 0 for any constant or random forecast.

    Args:
        hits: TP, counts of any shape, as all others.
        misses: FN.
        false_alarms: FP.
        rejections: TN.
    """
    hits, misses, false_alarms, rejections = (x.double() for x in (hits, misses, false_alarms, rejections))
    return hits / (hits + misses) - false_alarms / (false_alarms + rejections)


def brier_terms(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Each sample's part of the Brier score, sum_k (p_k - o_k)^2 with o the one-hot label (Brier 1950); (n,) float64.

    With two classes this is twice the one-class form; the skill score is the same.

    Args:
        probabilities: (n, K), rows summing to 1.
        labels: (n,) int64.
    """
    target = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return (probabilities.double() - target).square().sum(1)


def brier_skill_score(term_sum: Tensor, class_counts: Tensor) -> Tensor:
    """BSS = 1 - BS / BS_climate, the reference being the class frequencies f of the samples themselves.

        BS_climate = mean_i sum_k (f_k - o_ik)^2 = 1 - sum_k f_k^2

    1 is perfect, 0 no better than always saying how common each class is; NaN where all samples are of one class.

    Args:
        term_sum: (...,) sum of `brier_terms`.
        class_counts: (..., K) samples per class.
    """
    counts = class_counts.double()
    total = counts.sum(-1)
    climate = 1.0 - (counts / total[..., None]).square().sum(-1)
    score = 1.0 - term_sum.double() / total / climate
    return torch.where(climate > 1e-12, score, torch.nan)


def contingency(labels: Tensor, predictions: Tensor, positive: Sequence[int]) -> Tensor:
    """Per sample the one of (TP, FN, FP, TN) that it is, one-hot (n, 4) float64, for a set of positive classes."""
    chosen = torch.as_tensor(list(positive), device=labels.device)
    true, said = torch.isin(labels.long(), chosen), torch.isin(predictions.long(), chosen)
    return torch.stack([true & said, true & ~said, ~true & said, ~true & ~said], dim=1).double()
