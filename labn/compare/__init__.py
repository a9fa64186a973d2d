"""Runs side by side: one table and one report, over the same samples under the same protocol."""

from labn.compare.merge import Comparison, check_comparable, compare_runs
from labn.compare.runs import Run, open_runs
from labn.compare.tables import latex_table, markdown_table, paired_csv, ranks_csv, seeds_csv, table_csv

__all__ = [
    "Comparison",
    "Run",
    "check_comparable",
    "compare_runs",
    "latex_table",
    "markdown_table",
    "open_runs",
    "paired_csv",
    "ranks_csv",
    "seeds_csv",
    "table_csv",
]
