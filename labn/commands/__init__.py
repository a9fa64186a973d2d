"""Commands that need no trainer; `cli.py` gives them their place on the command line.

Each module has SUMMARY, DETAILS, `add_arguments(parser)` and `run(options)`.
"""

from labn.commands import coarse, compare, doctor, explain, sweep, table

__all__ = ["coarse", "compare", "doctor", "explain", "sweep", "table"]
