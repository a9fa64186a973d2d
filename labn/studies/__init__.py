"""Whole studies from the command line: sweeps over seeds, the papers' tables, coarse against fine maps.

Nothing here knows about training: a sweep starts the command line, and tables and figures read the run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labn.studies import coarse, sweep, table

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sweep": sweep.main,
    "table": table.main,
    "coarse": coarse.main,
}

__all__ = ["COMMANDS"]
