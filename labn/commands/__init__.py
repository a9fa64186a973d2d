"""Commands that need no trainer: `compare` and `explain`; `cli.py` gives them their place on the command line."""

from labn.commands import compare, explain

__all__ = ["compare", "explain"]
