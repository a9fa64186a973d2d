"""The report of several runs side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from labn.compare.merge import Comparison
from labn.compare.runs import Run
from labn.errors import without_credentials
from labn.metrics.registry import metric_by_name, values_named
from labn.metrics.statistics import Interval
from labn.report.best import Differences, both_directions, standing_pairs, with_best
from labn.report.caveats import caveats
from labn.report.curves import curve_metrics, curve_panels, on_grid
from labn.report.glossary import glossary
from labn.report.page import Cell, Report, Table, thin
from labn.report.ranking import rankings
from labn.report.run_report import made_with, paired_of
from labn.report.training import training_panels
from labn.results.reader import Card
from labn.results.training_logs import read_training

GRIDS = ("x", "insertion", "deletion")
VERDICT = ("prediction", "target", "probability", "confidence")
"""Fields of a card that depend on the network."""


def comparison_report(comparison: Comparison, title: str = "Comparison", max_bytes: int = 36_000_000) -> Report:
    """The page of a comparison.

    Args:
        comparison: the merged runs.
        title: title of the page.
        max_bytes: maximum size of the gallery in bytes; every card shows the maps of one network per row.
    """
    rows = list(dict.fromkeys(comparison.row_name(label, explainer) for label, explainer, _ in comparison.columns))
    present = [metric for _, _, metric in comparison.columns]
    values = list(dict.fromkeys([*(name for name in comparison.asked if name in present), *present]))
    curves = merged_curves(comparison)
    cards = thin(merged_cards(comparison), max_bytes)
    quantity = comparison.runs[0].results.quantity
    differences = differences_between(comparison)
    ranks = {(row, metric): rank for row, metric, rank in comparison.ranks}
    more = _table(comparison, rows, [v for v in values if v not in comparison.asked], "Other values")
    report = Report(
        title=title,
        quantity=quantity,
        caveats=_notes(comparison),
        summary=with_best(_table(comparison, rows, comparison.asked, _caption(comparison)), differences, quantity),
        summary_more=with_best(more, differences, quantity),
        paired=paired_of(rows, differences, [name for name in comparison.asked if name != "fill_probability"]),
        rankings=rankings(rows, comparison.asked, ranks, standing_pairs(differences)),
        curves={m: curve_panels(curves, rows, m, quantity=quantity) for m in curve_metrics(curves)},
        training=_training(comparison.runs),
        cards=cards,
        columns=rows,
        metrics=values,
        scores=_scores(comparison, cards, rows, values),
        class_names=next((run.results.manifest["class_names"] for run in comparison.runs if _named(run)), []),
        made_with=[
            (f"{run.results.folder}: {t}", e) for run in comparison.runs for t, e in made_with(run.results.manifest)
        ],
        configs=[(str(path), without_credentials(path.read_text())) for path in _configs(comparison.runs)],
    )
    explainers = {n: e for run in comparison.runs for n, e in run.results.manifest.get("explainers", {}).items()}
    return replace(report, glossary=glossary(report, explainers))


def _caption(comparison: Comparison) -> str:
    if any(row.std is not None for row in comparison.rows):
        return "Mean over samples ± standard deviation over seeds, with the 95 % interval of the mean"
    return "Mean over samples with its 95 % interval"


def _configs(runs: Iterable[Run]) -> list[Path]:
    """Resolved configurations of the run folders; `fit.yaml` only of runs whose results have its weights."""
    paths = [p for run in runs for p in sorted(run.folder.glob("*.yaml")) if p.name != "fit.yaml" or not run.stale]
    return list(dict.fromkeys(paths))


def _named_run(run: Run) -> str:
    return f"{run.label} ({run.name})"


def _named(run: Run) -> bool:
    return "class_names" in run.results.manifest


def _notes(comparison: Comparison) -> list[str]:
    """Caveats of all runs; one that all runs share appears once, without the name of a run."""
    each = [(_named_run(run), caveats(run.results)) for run in comparison.runs]
    shared = [note for note in each[0][1] if all(note in other for _, other in each)]
    notes = shared + [f"{name}: {note}" for name, own in each for note in own if note not in shared]
    notes += [
        f"{_named_run(run)}: the weights of {run.results.folder} are in no checkpoint of its run folder; the training "
        "of that folder is not shown."
        for run in comparison.runs
        if run.stale
    ]
    notes += [
        f"{metric}: {n} samples that not every row has were left out." for metric, n in comparison.left_out.items()
    ]
    if any(row.seeds > 1 for row in comparison.rows):
        over = "samples" if comparison.groups is None else "whole groups of samples"
        counts = ", ".join(f"{label}: {n}" for label, n in {row.label: row.seeds for row in comparison.rows}.items())
        notes.append(
            f"± is the standard deviation over seeds ({counts}); intervals of the mean over seeds are over {over}."
        )
        notes.append(
            "Gallery: maps and prediction of every row are those of the first seed that has the picture; scores are "
            "means over seeds."
        )
    return list(dict.fromkeys(notes))


def _table(comparison: Comparison, rows: list[str], columns: list[str], caption: str) -> Table | None:
    cells = {(comparison.row_name(r.label, r.explainer), r.metric): _cell(r.interval, r.std) for r in comparison.rows}
    table = {row: [cells.get((row, column)) for column in columns] for row in rows}
    return Table(caption, tuple(columns), table) if any(any(line) for line in table.values()) else None


def _cell(interval: Interval, std: float | None = None) -> Cell:
    return Cell(interval.mean, interval.low, interval.high, interval.n, std)


def differences_between(comparison: Comparison) -> dict[str, Differences]:
    """Value -> differences between the rows, in both directions."""
    pairs: dict[str, list[tuple[str, str, Cell]]] = {}
    for a, b, metric, difference in comparison.paired:
        pairs.setdefault(metric, []).append((a, b, replace(_cell(difference), p_adjusted=difference.p_adjusted)))
    return {metric: both_directions(found) for metric, found in pairs.items()}


def merged_curves(comparison: Comparison) -> dict[str, np.ndarray]:
    """Curves of the common samples: arrays `<row>/<metric>/{x,insertion,deletion}` (n, 101), means over seeds.

    If samples have groups, there are also arrays `<row>/<metric>/group` (n,).
    """
    stacks: dict[str, list[np.ndarray]] = {}
    groups: dict[str, np.ndarray] = {}
    for run in _one_folder_per_network(comparison.runs):
        names = run.results.names
        for key in (k.removesuffix("/index") for k in run.results.curves if k.endswith("/index")):
            explainer, metric = key.rsplit("/", 1)
            position = {names[i]: n for n, i in enumerate(run.results.curves[f"{key}/index"].tolist()) if i in names}
            common = comparison.columns.get((run.label, explainer, _value_of(metric)))
            if common is None or not all(name in position for name in common):
                continue
            chosen = [position[name] for name in common]
            x, row = run.results.curves[f"{key}/x"][chosen], f"{comparison.row_name(run.label, explainer)}/{metric}"
            for line in GRIDS:
                # Seeds may have steps at other abscissae, so that curves are interpolated before they are averaged.
                curves = on_grid(x, x if line == "x" else run.results.curves[f"{key}/{line}"][chosen])
                stacks.setdefault(f"{row}/{line}", []).append(curves)
            if (drawn := comparison.groups_of(common)) is not None:
                groups[f"{row}/group"] = np.array(drawn)
    return {key: np.mean(stack, axis=0) for key, stack in stacks.items()} | groups


def _value_of(metric: str) -> str:
    """Name in the tables of the value that a metric's name stands for: `id` for `pid1`."""
    try:
        return next(iter(values_named(metric, metric_by_name(metric)).values()))
    except ValueError:  # a metric of the user, which is registered only where the run was made
        return metric


def _one_folder_per_network(runs: Iterable[Run]) -> list[Run]:
    """The runs without those whose curves an earlier folder of the same network has already given."""
    seen: set[tuple[str, str, str]] = set()
    distinct = []
    for run in runs:
        keys = {(run.label, run.checkpoint, name) for name in run.results.curves}
        if not keys & seen:
            distinct.append(run)
        seen |= keys
    return distinct


def merged_cards(comparison: Comparison) -> list[Card]:
    """One card per sample name with the maps of all rows.

    Every label contributes the maps and the prediction of one network, the first with that sample. `verdicts` holds the
    fields of `VERDICT` per label, with the label as `network`.
    """
    cards: dict[str, Card] = {}
    shown: dict[tuple[str, str], str] = {}
    for run in comparison.runs:
        for card in run.results.cards:
            key = card["name"], run.label
            if shown.get(key, run.checkpoint) != run.checkpoint:
                continue
            # Steps and fills are for the player, which a comparison does not have.
            common = {name: value for name, value in card.items() if name not in (*VERDICT, "steps", "fills")}
            merged = cards.setdefault(card["name"], {**common, "maps": {}, "verdicts": []})
            if key not in shown:
                merged["verdicts"].append({"network": run.label} | {name: card[name] for name in VERDICT})
            # From here on only this network contributes to the row: a card never mixes maps of two networks.
            shown[key] = run.checkpoint
            for explainer, entry in card["maps"].items():
                merged["maps"].setdefault(comparison.row_name(run.label, explainer), entry)
    return list(cards.values())


def _scores(
    comparison: Comparison, cards: list[Card], rows: list[str], values: list[str]
) -> dict[str, dict[str, list[float | None]]]:
    named = {(comparison.row_name(la, ex), m): column for (la, ex, m), column in comparison.columns.items()}
    return {
        card["name"]: {row: [named.get((row, v), {}).get(card["name"]) for v in values] for row in rows}
        for card in cards
    }


def _training(runs: Iterable[Run]) -> list:
    """Training panels with one line per run folder, however many of its results folders are compared."""
    rows: dict[Path, dict[str, Run]] = {}
    for run in runs:
        if not run.stale:
            rows.setdefault(run.folder, {})[run.label] = run
    values = {}
    for folder, labelled in rows.items():
        line = f"{', '.join(labelled)} ({next(iter(labelled.values())).name})"
        for name, epochs in read_training(folder).items():
            stage, _, quantity = name.partition("/")
            if quantity in ("loss", "accuracy"):
                values[f"{stage}/{line}/{quantity}"] = epochs
    return training_panels(values)
