"""Training curves from the CSV logs of a run folder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from labn.report.charts import Panel, Series
from labn.results.training_logs import ELSEWHERE, STAGES


def training_panels(values: Mapping[str, Mapping[int, float]]) -> list[Panel]:
    """One panel per quantity; a line (`train`, `val`, `val/<explainer>`) has the same colour in all panels.

    Values of another group, such as `gate/train_open`, share the panel of that group.

    Args:
        values: logged name -> epoch -> value.
    """
    panels: dict[str, list[Series]] = {}
    places: dict[str, int] = {}
    # Sorted by the components of the names, so that colours do not depend on the order of logging.
    for name, epochs in sorted(values.items(), key=lambda item: item[0].split("/")):
        group, *middle, quantity = name.split("/")
        if group in ELSEWHERE:
            continue
        panel, line = (quantity, "/".join([group, *middle])) if group in STAGES else (group, quantity)
        x, y = np.array(list(epochs), dtype=float), np.array(list(epochs.values()))
        panels.setdefault(panel, []).append(Series(line, places.setdefault(line, len(places)), x, y))
    return [Panel(n, "epoch", n, tuple(lines), whole=True) for n, lines in sorted(panels.items(), key=_importance)]


def _importance(item: tuple[str, list[Series]]) -> tuple[int, str]:
    first = ("loss", "accuracy")
    return (first.index(item[0]) if item[0] in first else len(first), item[0])
