"""Values per sample: of one batch for a metric, and as `evaluate` returns them, printed as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from labn.io.digits import decimals


@dataclass(frozen=True)
class SampleScores:
    """Scores of one batch, the result of `SampleMetric.score_batch`.

    Attributes:
        values: name of a value -> (B,) floating; NaN where the metric leaves the sample out.
        curves: name of a line, such as `x` or `insertion` -> (S, K), for metrics that are areas under curves.
        samples: (S,) int64, positions of the samples with curves in the batch; None without curves.

    Example:
        >>> import torch
        >>> SampleScores({"sparseness": torch.tensor([0.5, 0.25])}).values["sparseness"]
        tensor([0.5000, 0.2500])
    """

    values: dict[str, Tensor]
    curves: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None


class Scores(dict[str, Tensor]):
    """Values of the metrics of one method: name -> (B,) float64, NaN where a metric leaves a sample out.

    It prints as a table of means, with the number of samples that have a value where that is not all of them.

    Example:
        >>> import torch
        >>> Scores({"id": torch.tensor([0.25, 0.75]), "pid16": torch.tensor([float("nan"), 0.5])})
        2 samples      id  pid16
        mean       0.5000  0.5000 (n 1)
    """

    def __repr__(self) -> str:
        return _table({"mean": self})


class ScoresByMethod(dict[str, Scores]):
    """Values of several methods: method -> `Scores`; it prints as a table of means.

    Example:
        >>> import torch
        >>> ScoresByMethod(gradcam=Scores(id=torch.tensor([0.25, 0.75])), random=Scores(id=torch.zeros(2)))
        2 samples      id
        gradcam    0.5000
        random     0.0000
    """

    def __repr__(self) -> str:
        return _table(self)


def _table(rows: Mapping[str, Mapping[str, Tensor]]) -> str:
    metrics = list(dict.fromkeys(name for values in rows.values() for name in values))
    samples = max((len(values) for scores in rows.values() for values in scores.values()), default=0)
    lines = [[f"{samples} samples", *metrics]]
    lines += [[name, *(_mean(scores.get(metric)) for metric in metrics)] for name, scores in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths))
    return "  ".join([first.lstrip().ljust(len(first)), *others]).rstrip()


def _mean(values: Tensor | None) -> str:
    """Mean of the values that are not NaN, and their number where some are."""
    if values is None:
        return ""
    known = values[~values.isnan()]
    if not len(known):
        return "-"
    mean = decimals(float(known.double().mean()), digits=4)
    return mean + (f" (n {len(known)})" if len(known) < len(values) else "")
