"""Skill of a classifier's forecasts, with bootstrap intervals that resample whole groups (days)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from labn.metrics.base import SampleRows
from labn.metrics.functional.forecast import (
    brier_skill_score,
    brier_terms,
    confusion_matrix,
    contingency,
    true_skill_statistic,
)
from labn.metrics.statistics import bootstrap_sums

# Functions of sums (R, 5 + K): hits, misses, false alarms, rejections, Brier terms, and samples of each of K classes.
# A bootstrap resample changes only the sums, so that the statistics need no second look at the samples.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "tss": lambda sums: true_skill_statistic(*sums[:, :4].unbind(1)),
    "brier_skill": lambda sums: brier_skill_score(sums[:, 4], sums[:, 5:]),
}


class ForecastSkill(SampleRows):
    """True skill statistic, Brier skill score and confusion matrix; each sample counts once, on any number of ranks.

    Args:
        num_classes: K.
        positive: classes that count as an event for the true skill statistic; None: all but the first.
        n_resamples: of the bootstrap; 0 for no intervals.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ForecastSkill(num_classes=2)
        >>> logits, labels = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]]), torch.tensor([0, 1, 0])
        >>> metric.update(logits, labels, indices=torch.arange(3))
        >>> skill = metric.compute()
        >>> skill["tss"], skill["confusion"]
        (tensor(0.5000, dtype=torch.float64), tensor([[1, 1],
                [0, 1]]))
    """

    def __init__(
        self, num_classes: int, positive: Sequence[int] | None = None, n_resamples: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(["label", "prediction", "brier", "group"], **kwargs)
        self.num_classes, self.n_resamples = num_classes, n_resamples
        self.positive = tuple(range(1, num_classes) if positive is None else positive)

    def update(self, logits: Tensor, labels: Tensor, indices: Tensor, groups: Tensor | None = None) -> None:
        """Keep a batch.

        Args:
            logits: (B, K).
            labels: (B,) int64.
            indices: (B,) int64, positions in the data set.
            groups: (B,) int64, equal for samples that belong together; None: every sample is its own group.
        """
        # The Brier term is kept per sample, so that the bootstrap never needs the probabilities again.
        probabilities = logits.detach().double().softmax(1)
        columns = {
            "label": labels,
            "prediction": logits.argmax(1),
            "brier": brier_terms(probabilities, labels),
            "group": indices if groups is None else groups,
        }
        self.append(indices, columns)

    def compute(self) -> dict[str, Tensor]:
        """`tss` and `brier_skill`, float64 (NaN where all labels are of one side), `confusion` (K, K) int64.

        With `n_resamples` also `tss_low`, `tss_high`, `brier_skill_low` and `brier_skill_high`: 95 % intervals by block
        bootstrap over the groups.
        """
        _, rows = self.per_sample()
        confusion = confusion_matrix(rows["label"], rows["prediction"], self.num_classes)
        # Row sums of the confusion matrix are the class frequencies, the reference forecast of the Brier skill score.
        event = contingency(rows["label"], rows["prediction"], self.positive).sum(0)
        sums = torch.cat([event, rows["brier"].sum()[None], confusion.sum(1).double()])[None]
        values = {name: statistic(sums)[0] for name, statistic in STATISTICS.items()} | {"confusion": confusion}
        if self.n_resamples and len(rows["label"]):
            values |= self._bounds(rows)
        return values

    def _bounds(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = rows["label"].long()
        table = contingency(labels, rows["prediction"], self.positive)
        columns = torch.cat([table, rows["brier"][:, None], one_hot(labels, self.num_classes).double()], dim=1)
        bounds: dict[str, Tensor] = {}
        for name, statistic in STATISTICS.items():
            found = bootstrap_sums(columns, statistic, groups=rows["group"].long(), n_resamples=self.n_resamples)
            bounds |= {f"{name}_low": torch.tensor(found.low), f"{name}_high": torch.tensor(found.high)}
        return bounds
