"""Definitions of the terms, methods and values that a page shows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from labn.explainers.registry import EXPLAINERS
from labn.metrics.registry import describe_value
from labn.report.page import Report

Entries = list[tuple[str, str]]

TERMS = {
    "map": "One number per pixel: how much the pixel speaks for the explained class, according to a method.",
    "target": "The class that a map explains: the true class (label), unless a caveat says otherwise.",
    "insertion, deletion": "The picture is shown on the fill, or removed, patch by patch, highest of the map first, "
    "while the network's output for the class is recorded; the score is the area under that curve.",
    "fill": "What removed pixels show: a colour, a blurred picture or another picture without the object.",
    "[low, high]": "95 % interval of a mean by the bootstrap over samples, or over whole groups of them: of "
    "intervals made in this way from other samples of the same kind, about 95 of 100 contain the true mean.",
    "n": "Number of samples, or of detections on their page, that have a value.",
    "●": "The best of its column, or not distinguishable from the best on these samples.",
    "*": "The difference stands when all pairs of its table are taken together: about 5 % of such tables at most have "
    "a mark where there is no difference; of few samples this is approximate.",
    "rank": "Place of a method by its mean, 1 for the best; best: share of the resamples in which it is the first.",
    "±": "Standard deviation over seeds, that is over networks trained from other random numbers.",
    "random, constant": "Maps that know nothing of the picture. A method that is not better than these has "
    "found nothing that the value can see.",
}


def glossary(report: Report, explainers: Mapping[str, Any]) -> list[tuple[str, Entries]]:
    """Groups (title, (name, definition) pairs) for a page; groups without entries are left out.

    Args:
        report: the page without its glossary.
        explainers: name of a method -> its entry in the manifest, with the key `class`.
    """
    methods = [(name, text) for name, entry in explainers.items() if (text := method_description(entry))]
    groups = [("Terms", _terms(report)), ("Methods", methods), ("Values", _values(report))]
    return [(title, entries) for title, entries in groups if entries]


def method_description(entry: Any) -> str:
    """The first line of a method's class, from its entry in a manifest; empty for a method of the user."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
        return ""
    module, _, name = entry["class"].rpartition(".")
    if name == "Negated":
        inner = method_description(entry.get("explainer"))
        return f"The negative of: {inner}" if inner else ""
    known = {build.__name__: build for build in EXPLAINERS.values()}
    if name not in known or not module.startswith("labn."):
        return ""
    return (inspect.getdoc(known[name]) or "").partition("\n")[0].replace("`", "")


def _values(report: Report) -> Entries:
    tables = [table for table in (report.summary, report.summary_more) if table is not None]
    names = dict.fromkeys([*(column for table in tables for column in table.columns), *report.metrics])
    described = ((name, describe_value(name, report.quantity)) for name in names)
    return [(name, str(description)) for name, description in described if description.meaning]


def _terms(report: Report) -> Entries:
    tables = [table for table in (report.summary, report.summary_more, *report.paired) if table is not None]
    cells = [cell for table in tables for row in table.rows.values() for cell in row if cell is not None]
    shown = {
        "map": True,
        "target": bool(report.cards),
        "insertion, deletion": bool(report.curves),
        "fill": bool(report.curves),
        "[low, high]": any(cell.bounded for cell in cells),
        "n": bool(cells),
        "●": any(table.best for table in tables),
        "*": any(cell.stands for cell in cells),
        "rank": bool(report.rankings),
        "±": any(cell.spread is not None for cell in cells),
        "random, constant": not {"random", "constant"}.isdisjoint(_methods(report)),
    }
    return [(term, TERMS[term]) for term, is_shown in shown.items() if is_shown]


def _methods(report: Report) -> list[str]:
    """Names of the methods in the columns, without the labels of runs before them."""
    return [name.rpartition(": ")[2] for name in report.columns]
