"""The report of a detector's explanations: one card per detection, one map per explained output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from labn.report.best import with_best
from labn.report.cards import Picture, make_card
from labn.report.glossary import glossary
from labn.report.page import Report, Table, thin
from labn.report.run_report import cell_of, differences_of, paired_of
from labn.results.reader import Card

JUDGED = ("prediction", "target", "confidence")
"""Fields of a card that say whether a prediction is correct; cards of detections do not have them."""


def detection_card(
    image: np.ndarray, row: Mapping[str, Any], label: int, maps: Mapping[str, np.ndarray], side: int = 160
) -> Card:
    """The gallery's record of one detection.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        row: a row of `detections.csv`.
        label: class channel, 0 for the background.
        maps: explained output -> (H, W) signed relevance.
        side: longer side of picture and maps in pixels.
    """
    picture = Picture(
        index=row["index"],
        name=f"{row['name']} #{row['detection']}",
        label=label,
        prediction=label,
        target=label,
        probability=row["score"],
        confidence=row["score"],
        image=image,
        boxes=np.array([[row[edge] for edge in ("x1", "y1", "x2", "y2")]]),
    )
    card = make_card(picture, maps, picture_side=side, map_side=side)
    return {name: value for name, value in card.items() if name not in JUDGED}


def detection_report(
    title: str,
    cards: list[Card],
    summary: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    class_names: Sequence[str],
    facts: Mapping[str, float] | None = None,
    max_bytes: int = 36_000_000,
    paired: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """The page of one stage.

    Args:
        title: title of the page.
        cards: one per detection; evenly spaced ones are kept so that they take at most `max_bytes`.
        summary: rows of `detection_summary.csv`; empty without scores.
        tasks: names of the explained outputs, in order.
        class_names: names of all channels, the background first.
        facts: logged metrics, such as the average precision.
        max_bytes: maximum size of the gallery in bytes.
        paired: rows of `detection_paired.csv`.
    """
    caption = "Mean over detections; 95 % interval from resampled images"
    cells = {(row["explainer"], row["metric"]): cell_of(row, "mean") for row in summary}
    columns = tuple(dict.fromkeys(metric for _, metric in cells))
    rows = {e: [cells.get((e, column)) for column in columns] for e in dict.fromkeys(e for e, _ in cells)}
    differences = differences_of(paired)
    report = Report(
        title=title,
        facts=[(name, f"{value:.4g}") for name, value in (facts or {}).items()],
        summary=with_best(Table(caption, columns, rows), differences, "probability") if cells else None,
        paired=paired_of(list(rows), differences, columns),
        cards=thin(cards, max_bytes),
        columns=list(tasks),
        class_names=list(class_names),
    )
    return replace(report, glossary=glossary(report, {}))
