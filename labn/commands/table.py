"""`python cli.py table`: the papers' tables with our mean and standard deviation over seeds below each number."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from labn.compare import Run, check_comparable
from labn.errors import InputError, printable
from labn.io.digits import decimals
from labn.io.readers import read_json, read_table
from labn.metrics.statistics import Interval, bootstrap_mean
from labn.results.reader import StageResults
from labn.results.store import MANIFEST
from labn.results.training_logs import log_files

DETAILS = """\
A cell of a run is: mean ± standard deviation over seeds [95 % interval over samples of the seeds' mean]. The runs are
those of `cli.py sweep` in RUNS/<experiment>/seed=* or, without any, a single run in RUNS/<experiment>. `accuracy` is
the value of the last test on the whole split, however many samples were explained.
"""
PUBLISHED = Path(__file__).with_name("published.yaml")
VARIANTS = {"paper": "", **{name: f"@{name}" for name in ("official", "stable", "random", "threshold")}}
ACCURACY = "accuracy"  # of the network: the same for every method and protocol
Scores = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A published row and the run that reproduces it.

    Attributes:
        name: name as printed in the paper, or name of the method.
        run: name of the experiment, which is that of the folder of its runs.
        explainer: method scored in these runs.
        mean: published numbers, one per metric; empty for a method that the paper does not have.
        sd: published standard deviations over runs; empty if none are printed.
        config: path of the configuration of the runs.
    """

    name: str
    run: str
    explainer: str
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    config: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        source: paper and number of the table.
        metrics: names of the metrics in its columns.
        rows: its rows.
    """

    source: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


@cache
def published() -> dict[str, PaperTable]:
    """All tables by their names on the command line."""
    content: dict[str, Any] = yaml.safe_load(PUBLISHED.read_text())
    return {
        name: PaperTable(
            table["source"],
            tuple(table["metrics"]),
            tuple(
                Row(r["name"], r["run"], r["explainer"], tuple(r["mean"]), tuple(r.get("sd", ())), config_of(table, r))
                for r in table["rows"]
            ),
        )
        for name, table in content.items()
    }


def config_of(table: dict[str, Any], row: dict[str, Any]) -> str:
    """Path of the configuration of a row's runs."""
    return f"configs/{table['configs']}/{row['run']}.yaml"


@dataclass(frozen=True)
class Runs:
    """The tested runs of one experiment, one per seed.

    Attributes:
        folders: their run folders.
        scores: per run, (explainer, metric) -> sample name -> value.
        accuracies: test accuracies, in [0, 1], of the runs that logged one.
        groups: sample name -> group, for samples that are not independent; else empty.
    """

    folders: tuple[Path, ...]
    scores: tuple[Scores, ...]
    accuracies: tuple[float, ...]
    groups: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> Runs:
        """The tested runs in `folder/seed=*`; without any, `folder` itself if it has been tested.

        Raises:
            InputError: the runs differ in data, settings or the arguments of a method.
        """
        seeds = tuple(run for run in sorted(folder.glob("seed=*")) if _tested(run))
        # A single run of the same configuration lies in the folder of the sweep; it may repeat one of the seeds, so
        # that it does not count beside them.
        folders = seeds or tuple(run for run in [folder] if _tested(run))
        groups = [_groups(run) for run in folders]
        # Runs with other data, another protocol or other arguments of a method must not be averaged.
        check_comparable([_manifest_run(folder.name, run, own) for run, own in zip(folders, groups)])
        accuracies = tuple(value for run in folders for value in _accuracy(run))
        return cls(folders, tuple(map(_scores, folders)), accuracies, groups[0] if groups else {})

    def columns(self, explainer: str, metric: str) -> list[dict[str, float]]:
        """Sample name -> value, per run that has the metric."""
        return [s[explainer, metric] for s in self.scores if (explainer, metric) in s]

    def common(self, explainer: str, metric: str) -> list[str]:
        """Names of the samples with this value in all runs; mean, deviation and interval are over these samples.

        Raises:
            InputError: the runs have no sample in common.
        """
        columns = self.columns(explainer, metric)
        names = sorted(set.intersection(*map(set, columns))) if columns else []
        if columns and not names:
            raise InputError(
                f"{', '.join(map(str, self.folders))} have no sample in common that {metric} of {explainer} was scored "
                "on; test them again with the same configuration."
            )
        return names

    def left_out(self, explainer: str, metric: str) -> int:
        """Number of samples with this value in some but not all runs."""
        return len(set().union(*self.columns(explainer, metric))) - len(self.common(explainer, metric))

    def values(self, explainer: str, metric: str) -> list[float]:
        """Per run with the metric, the mean over the common samples."""
        names = self.common(explainer, metric)
        return [mean(column[name] for name in names) for column in self.columns(explainer, metric)]

    def interval(self, explainer: str, metric: str) -> Interval:
        """Mean over samples of the means over runs, with its 95 % interval over samples or whole groups of samples."""
        columns, names = self.columns(explainer, metric), self.common(explainer, metric)
        groups = [self.groups[name] for name in names] if self.groups else None
        return bootstrap_mean([mean(column[name] for column in columns) for name in names], groups=groups)


def _tested(run: Path) -> bool:
    return (run / "test" / "scores.csv").exists()


def _scores(run: Path) -> Scores:
    found: Scores = {}
    for row in read_table(run / "test" / "scores.csv", ("name", "explainer", "metric", "value"), escaped=True):
        found.setdefault((row["explainer"], row["metric"]), {})[row["name"]] = row.number("value", float)
    return found


def _accuracy(run: Path) -> list[float]:
    """The accuracy that the last test logged, as a list; empty if no test logged one."""
    column = f"test/{ACCURACY}"
    rows = itertools.chain.from_iterable(read_table(path, escaped=True) for path in log_files(run, "test"))
    # Logs come oldest first, so that the last value is that of the last test.
    return [row.number(column, float) for row in rows if row.cells.get(column)][-1:]


def _groups(run: Path) -> dict[str, int]:
    rows = read_table(run / "test" / "predictions.csv", ("name",), escaped=True)
    return {row["name"]: row.number("group", int) for row in rows if "group" in row.cells}


def _manifest_run(label: str, run: Path, groups: dict[str, int]) -> Run:
    """A run with the fields that `check_comparable` reads, without scores and curves."""
    manifest = read_json(run / "test" / MANIFEST, dict)
    by_index = dict(enumerate(groups.values())) or None
    return Run(label, run, StageResults(run / "test", groups=by_index, manifest=manifest), {})


def ours(runs: Runs, explainer: str, metric: str) -> str:
    """A cell `mean ± sd [low, high]` with deviation over seeds and interval over samples; a dash without scores.

    There is no interval for one sample or one group, nor for the accuracy, which is known per run and not per sample.
    """
    values = runs.accuracies if metric == ACCURACY else runs.values(explainer, metric)
    if not values:
        return "–"
    spread = f" ± {decimals(stdev(values))}" if len(values) > 1 else ""
    if metric == ACCURACY:
        return f"{decimals(mean(values))}{spread}"
    return f"{decimals(mean(values))}{spread}{runs.interval(explainer, metric).bracketed}"


def printed(row: Row, column: int) -> str:
    """The published number of a row in a column, with its standard deviation if there is one."""
    return decimals(row.mean[column]) + (f" ± {decimals(row.sd[column])}" if row.sd else "")


def markdown(
    table: PaperTable,
    folder: Path,
    protocols: Sequence[str],
    metrics: Sequence[str] | None = None,
    everything: bool = False,
) -> str:
    """The table as Markdown: per row the published numbers, then ours under every protocol.

    Args:
        table: the table.
        folder: folder with the run folders of all experiments.
        protocols: names of `VARIANTS`.
        metrics: columns; None takes the paper's. A column that the paper lacks has no published numbers.
        everything: whether methods of the same runs that the paper lacks are appended.
    """
    columns = list(metrics or table.metrics)
    lines = [f"| | | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    notes = []
    runs = {row.run: Runs.read(folder / row.run) for row in table.rows}
    others = [row for name, tested in runs.items() for row in _unpublished(table, name, tested)] if everything else []
    for row in (*table.rows, *others):
        if row.mean:
            numbers = [table.metrics.index(name) if name in table.metrics else None for name in columns]
            cells = ["–" if number is None else printed(row, number) for number in numbers]
            lines.append(f"| {row.name} | published | {' | '.join(cells)} |")
        for protocol in protocols:
            names = [name if name == ACCURACY else name + VARIANTS[protocol] for name in columns]
            cells = [ours(runs[row.run], row.explainer, name) for name in names]
            first = f" {row.name}" if not row.mean and protocol == protocols[0] else ""
            lines.append(f"|{first} | ours, {protocol} | {' | '.join(cells)} |")
        notes.append(f"{row.name}: {described(runs[row.run], row, folder)}")
    return "\n".join([f"{table.source}.", "", *lines, "", *notes])


def _unpublished(table: PaperTable, name: str, runs: Runs) -> list[Row]:
    """Rows without published numbers, for the methods of an experiment's runs that the paper does not have."""
    known = {row.explainer for row in table.rows if row.run == name}
    scored = dict.fromkeys(explainer for scores in runs.scores for explainer, _ in scores)
    return [Row(f"`{explainer}` ({name})", name, explainer, (), ()) for explainer in scored if explainer not in known]


def described(runs: Runs, row: Row, folder: Path) -> str:
    """Number of runs and samples of a row, or the command that makes the runs."""
    if not runs.folders:
        return f"not run; python cli.py sweep --config {row.config} --seeds 38 39 40 41 42 ({folder / row.run})"
    metrics = {metric for scores in runs.scores for explainer, metric in scores if explainer == row.explainer}
    samples = max((len(runs.common(row.explainer, metric)) for metric in metrics), default=0)
    missing = max((runs.left_out(row.explainer, metric) for metric in metrics), default=0)
    lost = f" and up to {missing} left out because not every run has them" if missing else ""
    return f"{len(runs.folders)} run(s), {samples} scored samples{lost} ({folder / row.run}, {row.explainer})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", nargs="*", help=f"tables: {', '.join(published())} (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder with the run folders (default: runs)")
    parser.add_argument(
        "--protocols", nargs="+", choices=list(VARIANTS), default=["paper", "official"], help="default: paper official"
    )
    parser.add_argument("--metrics", nargs="+", help="columns (default: those of the paper)")
    parser.add_argument("--all", action="store_true", help="add the methods that the paper does not have")


def run(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        InputError: a table does not exist, or the runs of an experiment are not comparable.
    """
    for name in options.names or published():
        if name not in published():
            raise InputError(f"there is no table {name!r}; the tables are {', '.join(published())}.")
        text = markdown(published()[name], options.runs, options.protocols, options.metrics, options.all)
        print(printable(f"## {name}\n\n{text}\n", keep="\n"))
