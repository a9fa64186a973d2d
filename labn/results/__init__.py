"""A results folder, read and written: store of maps and scores, tables, reader, fingerprints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labn.results.result_table import ResultTable, read

__all__ = ["ResultTable", "read"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used (PEP 562), so that other modules of the room start at once."""
    if name in __all__:
        return getattr(importlib.import_module("labn.results.result_table"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
