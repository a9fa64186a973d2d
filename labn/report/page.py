"""Render the data of a report as one HTML file; template, style and scripts are in `assets/`."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup

from labn.io.digits import decimals
from labn.metrics.registry import describe_value
from labn.report import charts
from labn.report.charts import Panel
from labn.report.ranking import Ranking
from labn.results.reader import Card

SCRIPTS = ("data.js", "maps.js", "gallery.js", "player.js", "main.js")
COLORS = ("RdBu_r", "inferno")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        mean: the mean.
        low: lower bound of the 95 % interval; NaN for one sample or one group, which cannot be resampled.
        high: upper bound of the interval.
        n: number of samples.
        spread: standard deviation over seeds; None for one seed.
        p_adjusted: of a difference, its p-value when all pairs of the table are taken together; NaN if unknown.
    """

    mean: float
    low: float
    high: float
    n: int
    spread: float | None = None
    p_adjusted: float = math.nan

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    @property
    def decided(self) -> bool:
        """Whether there is an interval that excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def stands(self) -> bool:
        """Whether a difference stands at the level of 5 % when all pairs of the table are taken together."""
        return self.p_adjusted <= 0.05


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: its caption; of a table of differences, the name of the value.
        columns: names of the columns.
        rows: name of a row -> one cell per column, None for a missing value.
        best: (row, column) of the cells marked as best, see `labn.report.best.with_best`.
    """

    caption: str
    columns: tuple[str, ...]
    rows: dict[str, list[Cell | None]]
    best: frozenset[tuple[str, str]] = frozenset()


@dataclass
class Report:
    """Everything that a page shows.

    Attributes:
        title: title of the page.
        quantity: what insertion and deletion curves show, `probability` or `logit`.
        facts: (name, value) of metrics of the model, shown under the title.
        caveats: sentences that must be read with the numbers.
        summary: means per row and requested value.
        summary_more: means of all other values.
        paired: differences between rows, one table per value.
        rankings: ranks of the rows, one figure per value with a better end.
        curves: metric -> its panels.
        training: panels of the training.
        training_more: panels of the maps' scores while training.
        cards: records of the gallery.
        columns: names of the explainers, in the order of the tables.
        metrics: names of the values by which the gallery can be sorted.
        scores: sample name -> explainer -> values in the order of `metrics` (None for a missing value).
        class_names: one per class.
        player: metric of the player with patch size, fills and scale of its chart; None: no player.
        glossary: (group, (name, definition) pairs), see `labn.report.glossary`.
        made_with: (group, (name, value) pairs) of hashes, versions and arguments.
        configs: (file name, text) of resolved configurations.
    """

    title: str
    quantity: str = "probability"
    facts: list[tuple[str, str]] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    summary: Table | None = None
    summary_more: Table | None = None
    paired: list[Table] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)
    curves: dict[str, list[Panel]] = field(default_factory=dict)
    training: list[Panel] = field(default_factory=list)
    training_more: list[Panel] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    player: dict[str, Any] | None = None
    glossary: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    made_with: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    configs: list[tuple[str, str]] = field(default_factory=list)


def render(report: Report) -> str:
    """The page as HTML text.

    The page needs no server and makes no requests; a content security policy forbids them. The policy allows script and
    style by their hash alone, so that no file or class name can inject either.
    """
    script = "\n".join(_asset(name) for name in SCRIPTS)
    # One function scope: the names of the scripts do not become global. The hash covers exactly this text.
    script = f'(() => {{\n"use strict";\n{script}\n}})();\n'
    style = _asset("style.css")
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            chart=charts,
            describe=lambda name: describe_value(name, report.quantity),
            script=Markup(script),
            script_hash=_hash(script),
            style=Markup(style),
            style_hash=_hash(style),
            data=Markup(embed(_page_data(report))),
        )
    )


def embed(data: Any) -> str:
    """JSON that is safe inside a `<script>` element, whatever its strings contain."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def thin(cards: Sequence[Card], budget: int) -> list[Card]:
    """The largest number of evenly spaced cards whose JSON takes at most `budget` bytes together."""
    sizes = np.array([len(embed(card)) for card in cards])
    # From the largest number down: cards differ in size, so that fewer cards need not be smaller and bisection could
    # miss the largest fitting number.
    for count in range(len(cards), 0, -1):
        chosen = np.unique(np.linspace(0, len(cards) - 1, count).round().astype(int))
        if sizes[chosen].sum() <= budget:
            return [cards[n] for n in chosen]
    return []


def _page_data(report: Report) -> dict[str, Any]:
    return {
        "columns": report.columns,
        "metrics": report.metrics,
        "classNames": report.class_names,
        "cards": report.cards,
        "scores": report.scores,
        "player": report.player,
        "colors": {name: _lookup(name) for name in COLORS},
    }


def _lookup(name: str) -> str:
    """256 colours of a colour map as base64 of red, green and blue bytes."""
    colors = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return base64.b64encode((colors * 255).round().astype(np.uint8).tobytes()).decode()


@cache
def _asset(name: str) -> str:
    return (files("labn.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a misspelt field of the template raises instead of printing nothing
    )
    digits = {"signed": partial(decimals, signed=True), "three": decimals}
    environment.filters.update(digits, short=lambda value: f"{value:g}", breakable=breakable)
    environment.globals.update(digits)
    return environment


def breakable(name: str) -> Markup:
    """A name as HTML that may be broken behind its underscores, not inside a word.

    Example:
        >>> breakable("a_<b>")
        Markup('a_<wbr>&lt;b&gt;')
    """
    return Markup("_<wbr>").join(name.split("_"))


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
