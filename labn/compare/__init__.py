"""Runs side by side: one table and one report, over the same samples under the same protocol."""

from labn.compare.merge import Comparison, compare_runs, refuse_mixed
from labn.compare.runs import Run, open_runs
from labn.compare.tables import latex_table, markdown_table, paired_csv, table_csv

__all__ = [
    "Comparison",
    "Run",
    "compare_runs",
    "latex_table",
    "markdown_table",
    "open_runs",
    "paired_csv",
    "refuse_mixed",
    "table_csv",
]
