"""Scores of forecasts: confusion matrix, true skill statistic, Brier skill score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix (K, K) int64: rows are true classes, columns predicted classes.

    Args:
        labels: (n,) int64.
        predictions: (n,) int64.
        num_classes: K.

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), num_classes=2)
        tensor([[1, 1],
                [0, 1]])
    """
    # Cell (i, j) of the flattened matrix has the number i K + j.
    pairs = labels.long() * num_classes + predictions.long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def true_skill_statistic(hits: Tensor, misses: Tensor, false_alarms: Tensor, rejections: Tensor) -> Tensor:
    """TSS = TP / (TP + FN) - FP / (FP + TN) (Hanssen and Kuipers 1965), in [-1, 1].

    Unlike accuracy, TSS does not depend on how common events are: constant and random forecasts get 0. It is NaN where
    no sample is an event, or every sample is one.

    Args:
        hits: TP, counts of any shape.
        misses: FN, the same shape.
        false_alarms: FP, the same shape.
        rejections: TN, the same shape.

    Example:
        >>> true_skill_statistic(*(torch.tensor(count) for count in (8, 2, 10, 90)))
        tensor(0.7000, dtype=torch.float64)
    """
    hits, misses, false_alarms, rejections = (x.double() for x in (hits, misses, false_alarms, rejections))
    return hits / (hits + misses) - false_alarms / (false_alarms + rejections)


def brier_terms(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Brier score of each sample, sum_k (p_k - o_k)^2 with o the one-hot label (Brier 1950); (n,) float64.

    For two classes this is twice the one-class form (p_1 - o_1)^2, and the skill score is the same.

    Args:
        probabilities: (n, K), rows summing to 1.
        labels: (n,) int64.

    Example:
        >>> brier_terms(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor([0.1250], dtype=torch.float64)
    """
    target = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return (probabilities.double() - target).square().sum(1)


def brier_skill_score(term_sum: Tensor, class_counts: Tensor) -> Tensor:
    """Brier skill score BSS = 1 - BS / BS_climate; the reference forecast is the class frequencies f of the samples.

        BS_climate = mean_i sum_k (f_k - o_ik)^2 = 1 - sum_k f_k^2

    1 is a perfect forecast, 0 is as good as always forecasting the class frequencies. NaN where all samples belong to
    one class.

    Args:
        term_sum: (...,) sum of `brier_terms`.
        class_counts: (..., K) samples per class.

    Example:
        >>> brier_skill_score(torch.tensor(1.0), torch.tensor([2, 2]))
        tensor(0.5000, dtype=torch.float64)
    """
    counts = class_counts.double()
    total = counts.sum(-1)
    climate = 1.0 - (counts / total[..., None]).square().sum(-1)
    # With a single class BS_climate is 0 up to rounding, and the ratio below has no meaning.
    score = 1.0 - term_sum.double() / total / climate
    return torch.where(climate > 1e-12, score, torch.nan)


def contingency(labels: Tensor, predictions: Tensor, positive: Sequence[int]) -> Tensor:
    """Cell of the 2 x 2 contingency table of each sample, one-hot (n, 4) float64 in the order TP, FN, FP, TN.

    Args:
        labels: (n,) int64.
        predictions: (n,) int64.
        positive: classes that count as an event.

    Example:
        >>> contingency(torch.tensor([0, 2]), torch.tensor([1, 2]), positive=[1, 2])
        tensor([[0., 0., 1., 0.],
                [1., 0., 0., 0.]], dtype=torch.float64)
    """
    events = torch.as_tensor(list(positive), device=labels.device)
    observed, forecast = torch.isin(labels.long(), events), torch.isin(predictions.long(), events)
    cells = [observed & forecast, observed & ~forecast, ~observed & forecast, ~observed & ~forecast]
    return torch.stack(cells, dim=1).double()
