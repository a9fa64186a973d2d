"""Train, explain and honestly evaluate image models (LABN, PID, LRP on ResNets, and their baselines)."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labn.api import Explanation, Explanations, evaluate, explain, prepare

__all__ = ["Explanation", "Explanations", "evaluate", "explain", "prepare"]

OLD_PATHS = {"labn.weighted": "labn.lrp", "labn.explainers.crp": "labn.explainers.relevance.crp"}
"""Modules that README showed in version 0.1 -> where their names are now; kept for one version."""


class _OldPaths(MetaPathFinder, Loader):
    """Import the names of a module that has moved, with a warning that says where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in OLD_PATHS else None

    def exec_module(self, module: ModuleType) -> None:
        new = OLD_PATHS[module.__name__]
        # Three frames of importlib lie between this one and the import statement.
        warnings.warn(f"{module.__name__} has moved to {new}; import from there.", FutureWarning, stacklevel=5)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})


sys.meta_path.append(_OldPaths())


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`, or a part such as `labn.lrp`, when it is first used (PEP 562).

    Commands that need no network start at once.
    """
    if name in __all__:
        return getattr(importlib.import_module("labn.api"), name)
    if any(part.name == name for part in pkgutil.iter_modules(__path__)):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
