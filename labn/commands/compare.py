"""`python cli.py compare RUN RUN ...`: one table and one report of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from labn.compare import compare_runs, latex_table, markdown_table, open_runs, paired_csv, table_csv
from labn.io.atomic import write_atomically
from labn.report.comparison import comparison_report
from labn.report.page import render

SUMMARY = "Put the results of several runs into one table and one report."
DETAILS = """\
RUN is a run folder (runs/quickstart) or a results folder in it (runs/quickstart/val/epoch=002). Runs whose
configurations differ in nothing but the seed form one row with mean and standard deviation; several results folders
of one run are a row each. LABEL=RUN says explicitly what is one row, or names it. Samples are matched by name. Runs
on different data, or scored under different settings, are refused with the reason.

Written to --out: table.csv (one line per run, method and value), table.md, table.tex (booktabs), paired.csv
(differences on the same samples) and report.html.

example:
  python cli.py compare runs/seed1 runs/seed2 ours=runs/mine --out compared
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or LABEL=RUN")
    parser.add_argument("--stage", default="test", help="results folder inside each run (default: test)")
    parser.add_argument("--out", type=Path, default=Path("compared"), help="folder to write to (default: compared)")


def run(options: argparse.Namespace) -> None:
    """Compare, print the table and write everything to `options.out`.

    Raises:
        FileNotFoundError: a run has no scores.
        ValueError: runs that do not belong together.
    """
    found = compare_runs(open_runs(options.runs, options.stage))
    markdown = markdown_table(found)
    texts = {
        "table.csv": table_csv(found),
        "table.md": markdown.encode(),
        "table.tex": latex_table(found).encode(),
        "paired.csv": paired_csv(found),
        "report.html": render(comparison_report(found)).encode(),
    }
    for name, text in texts.items():
        write_atomically(options.out / name, text)
    print(f"{markdown}\n{options.out}: {', '.join(texts)}")
