"""`python cli.py compare RUN RUN ...`: one table and one report of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from labn.compare import (
    compare_runs,
    latex_table,
    markdown_table,
    open_runs,
    paired_csv,
    ranks_csv,
    seeds_csv,
    table_csv,
)
from labn.errors import printable
from labn.io.atomic import write_atomically
from labn.report.comparison import comparison_report
from labn.report.page import render

DETAILS = """\
RUN is a run folder (runs/quickstart) or a results folder in it (runs/quickstart/val/epoch=002). Runs whose
configurations differ only in the seed form one row with mean and standard deviation; each results folder of one run
is a row of its own. LABEL=RUN sets the name of the row: runs of one label form one row. Samples are matched by name.
Runs with different data or different settings of the metrics are rejected with the reason.

Written to --out: table.csv (one line per run, method and value), table.md, table.tex (booktabs), seeds.csv (the
mean of every seed), paired.csv (differences on the same samples, and which of them stand when all are taken
together), ranks.csv (rank of every row, its interval, and the probability of being the best) and report.html.

example:
  python cli.py compare runs/seed1 runs/seed2 ours=runs/mine --out compared
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or LABEL=RUN")
    parser.add_argument("--stage", default="test", help="results folder inside each run (default: test)")
    parser.add_argument("--out", type=Path, default=Path("compared"), help="folder to write to (default: compared)")


def run(options: argparse.Namespace) -> None:
    """Compare the runs, print the table and write all files to `options.out`.

    Raises:
        MissingFileError: a run has no scores.
        InputError: the runs are not comparable.
    """
    comparison = compare_runs(open_runs(options.runs, options.stage))
    markdown = markdown_table(comparison)
    texts = {
        "table.csv": table_csv(comparison),
        "table.md": markdown.encode(),
        "table.tex": latex_table(comparison).encode(),
        "seeds.csv": seeds_csv(comparison),
        "paired.csv": paired_csv(comparison),
        "ranks.csv": ranks_csv(comparison),
        "report.html": render(comparison_report(comparison)).encode(),
    }
    for name, text in texts.items():
        write_atomically(options.out / name, text)
    print(printable(f"{markdown}\n{options.out}: {', '.join(texts)}", keep="\n"))
