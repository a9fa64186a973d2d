"""The report of one results folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from labn.errors import without_credentials
from labn.metrics.comparisons import Rank
from labn.report.best import Differences, both_directions, standing_pairs, with_best
from labn.report.caveats import caveats
from labn.report.charts import nice_ticks, span
from labn.report.curves import PROBABILITY, UNIT, curve_metrics, curve_panels
from labn.report.glossary import glossary
from labn.report.page import Cell, Report, Table, thin
from labn.report.ranking import rankings
from labn.report.training import training_panels
from labn.results.reader import Card, StageResults
from labn.results.training_logs import read_training


@dataclass(frozen=True)
class RunInfo:
    """Content of a report that is not in the results folder.

    Attributes:
        title: title of the page.
        run_dir: run folder with logs and resolved configurations.
        class_names: one per class.
        split_size: number of samples of the whole split.
        figures: logged metrics of the model in this stage, such as accuracy.
        notes: sentences of the data module about samples that it left out.
        player: metric of the player with its patch size and image size; None: no player.
        max_bytes: maximum size of the gallery in bytes.
        epoch: training curves end before this epoch, so that the page of a validation does not depend on what a killed
            attempt has logged afterwards; None shows all epochs.
        command: the command that writes the page.
    """

    title: str
    run_dir: Path
    class_names: list[str]
    split_size: int
    figures: dict[str, float]
    notes: tuple[str, ...] = ()
    player: dict[str, Any] | None = None
    max_bytes: int = 36_000_000
    epoch: int | None = None
    command: str = "test"

    @property
    def configs(self) -> list[Path]:
        """Paths of the resolved configurations of the training and of the current command."""
        return [self.run_dir / f"{name}.yaml" for name in dict.fromkeys(("fit", self.command))]


def run_report(results: StageResults, info: RunInfo) -> Report:
    """The report of a results folder."""
    charted = {
        metric: curve_panels(results.curves, results.explainers, metric, results.scratch_dir, results.quantity)
        for metric in curve_metrics(results.curves)
    }
    training = read_training(info.run_dir, info.epoch)
    # One slash: values of the model. More: scores of maps, which are shown apart, and counts of the confusion matrix.
    plain = {name: values for name, values in training.items() if name.count("/") == 1}
    of_maps = {n: v for n, v in training.items() if n not in plain and n.split("/")[1] != "confusion"}
    cards = with_curves(results, info.player)
    gallery, player = shared_fills(thin(cards, info.max_bytes), info.player)
    player = None if player is None else player | player_scale(gallery, results.quantity)
    notes = [*caveats(results, info.split_size), *info.notes]
    if len(gallery) < len(cards):
        notes.append(
            f"The gallery shows {len(gallery)} of {len(cards)} pictures, evenly spaced, to limit the size of the file."
        )
    more = [name for name in results.value_names if name not in results.headline]
    differences = differences_of(results.paired)
    summary = summary_of(results, results.headline, "Mean over samples with its 95 % interval")
    report = Report(
        title=info.title,
        quantity=results.quantity,
        facts=[(name, f"{value:.4g}") for name, value in info.figures.items()],
        caveats=notes,
        summary=with_best(summary, differences, results.quantity),
        summary_more=with_best(summary_of(results, more, "Other values"), differences, results.quantity),
        paired=paired_of(
            results.explainers, differences, [name for name in results.headline if name != "fill_probability"]
        ),
        rankings=rankings(results.explainers, results.headline, ranks_of(results), standing_pairs(differences)),
        curves=charted,
        training=training_panels(plain),
        training_more=training_panels(of_maps),
        cards=gallery,
        columns=results.explainers,
        metrics=gallery_metrics(results),
        scores=sample_scores(results, gallery),
        class_names=info.class_names,
        player=player,
        made_with=made_with(results.manifest),
        configs=[(path.name, without_credentials(path.read_text())) for path in info.configs if path.is_file()],
    )
    return replace(report, glossary=glossary(report, results.manifest.get("explainers", {})))


def summary_of(results: StageResults, columns: list[str], caption: str) -> Table | None:
    """`summary.csv` as a table; None if it has no value in these columns."""
    cells = {(row["explainer"], row["metric"]): cell_of(row, "mean") for row in results.summary}
    rows = {e: [cells.get((e, column)) for column in columns] for e in results.explainers}
    return Table(caption, tuple(columns), rows) if any(any(row) for row in rows.values()) else None


def ranks_of(results: StageResults) -> dict[tuple[str, str], Rank]:
    """(method, value) -> rank, from `ranks.csv`."""
    return {
        (row["explainer"], row["metric"]): Rank(
            float(row["rank"]), float(row["rank_low"]), float(row["rank_high"]), float(row["p_best"]), int(row["n"])
        )
        for row in results.ranks
    }


def differences_of(paired: Iterable[Mapping[str, Any]]) -> dict[str, Differences]:
    """Value -> differences between the methods, in both directions; the rows of `paired.csv` hold each pair once."""
    pairs: dict[str, list[tuple[str, str, Cell]]] = {}
    for row in paired:
        pairs.setdefault(row["metric"], []).append((row["explainer_a"], row["explainer_b"], cell_of(row, "difference")))
    return {metric: both_directions(found) for metric, found in pairs.items()}


def paired_of(names: list[str], differences: Mapping[str, Differences], metrics: Iterable[str]) -> list[Table]:
    """One square table per metric that has differences: row minus column."""
    return [_square(metric, names, differences[metric]) for metric in metrics if metric in differences]


def _square(metric: str, names: list[str], cells: Differences) -> Table:
    present = {name for pair in cells for name in pair}
    shown = [name for name in names if name in present]
    return Table(metric, tuple(shown), {a: [cells.get((a, b)) for b in shown] for a in shown})


def cell_of(row: Mapping[str, Any], mean: str) -> Cell:
    """A cell from a row of `summary.csv` or `paired.csv`; `mean` is the name of the column with the mean."""
    adjusted = float(row.get("p_adjusted") or math.nan)
    return Cell(float(row[mean]), float(row["ci_low"]), float(row["ci_high"]), int(row["n"]), p_adjusted=adjusted)


def gallery_metrics(results: StageResults) -> list[str]:
    """Names of all values, requested ones first; the first one is shown under every map of the gallery."""
    return list(dict.fromkeys([*results.headline, *results.value_names]))


def sample_scores(results: StageResults, cards: list[Card]) -> dict[str, dict[str, list[float | None]]]:
    """Sample name -> explainer -> values of all metrics, exactly as in `scores.csv`."""
    return {
        card["name"]: {
            explainer: [results.scores.get((explainer, m), {}).get(card["index"]) for m in gallery_metrics(results)]
            for explainer in results.explainers
        }
        for card in cards
    }


def with_curves(results: StageResults, player: dict[str, Any] | None) -> list[Card]:
    """The cards with the curves of the player's metric per explainer, rounded to four decimals to save space."""
    if player is None:
        return results.cards
    found: dict[int, dict[str, Any]] = {}
    shown = [card["index"] for card in results.cards]
    for explainer in results.explainers:
        key = f"{explainer}/{player['metric']}"
        if f"{key}/index" not in results.curves:
            continue
        indices = results.curves[f"{key}/index"]
        rows = np.flatnonzero(np.isin(indices, shown))
        lines = [results.curves[f"{key}/{name}"][rows].round(4).tolist() for name in ("x", "insertion", "deletion")]
        for index, *values in zip(indices[rows].tolist(), *lines):
            found.setdefault(index, {})[explainer] = dict(zip(("x", "insertion", "deletion"), values))
    # A card needs curves and steps for the player; without them it is in the gallery only.
    playable = [card["index"] in found and bool(card.get("steps")) for card in results.cards]
    return [card | {"curves": found[card["index"]]} if ok else card for card, ok in zip(results.cards, playable)]


def shared_fills(cards: list[Card], player: dict[str, Any] | None) -> tuple[list[Card], dict[str, Any] | None]:
    """The cards with fills replaced by numbers, and the player with the list of fills, each once.

    The player is None if no card has curves.
    """
    if player is None or not any("curves" in card for card in cards):
        return cards, None
    # Most fills, such as a colour or the bias image, are the same for all samples; the page holds each once.
    fills = list(dict.fromkeys(fill for card in cards for fill in card.get("fills", [])))
    numbered = [card | {"fills": [fills.index(fill) for fill in card.get("fills", [])]} for card in cards]
    return numbered, player | {"fills": fills}


def player_scale(cards: list[Card], quantity: str) -> dict[str, Any]:
    """`quantity`, `limits` and `ticks` of the y axis of the player's chart, the same for all pictures."""
    curves = [curve for card in cards for curve in card.get("curves", {}).values()]
    values = [value for curve in curves for line in ("insertion", "deletion") for value in curve[line]]
    limits = UNIT if quantity == PROBABILITY else span(values)
    return {"quantity": quantity, "limits": limits, "ticks": nice_ticks(*limits)}


def made_with(manifest: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Hashes, settings, arguments and versions of a manifest, as groups of (name, value)."""
    hashes: list[tuple[str, str]] = [
        (name, str(manifest[name])) for name in ("checkpoint", "network", "data", "split") if name in manifest
    ]
    groups = [("Hashes", hashes)]
    for title, key in (("Explainers", "explainers"), ("Settings of the metrics", "settings"), ("Versions", "versions")):
        groups.append((title, [(name, _plain(value)) for name, value in manifest.get(key, {}).items()]))
    return [(title, entries) for title, entries in groups if entries]


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "class" in value:
        arguments = ", ".join(f"{name}={_plain(v)}" for name, v in value.items() if name != "class")
        return f"{value['class'].rpartition('.')[2]}({arguments})"
    return value if isinstance(value, str) else json.dumps(value)
