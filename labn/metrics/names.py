"""Metrics by the names that files and command lines use: `pid16@official`, `id`, `mass`, ..."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from labn.metrics.base import SampleMetric
from labn.metrics.filled import FillProbability
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.localisation import MapAUROC, PointingGame, RelevanceMass, RelevanceRank


@dataclass(frozen=True)
class MetricEntry:
    """One family of names.

    Attributes:
        pattern: regular expression that the whole name matches.
        metric: the class; of the shared settings it gets those that its constructor takes.
        arguments: match -> the constructor arguments that the name itself says.
        examples: names offered where an unknown one is near.
    """

    pattern: str
    metric: type[SampleMetric]
    arguments: Callable[[re.Match[str]], dict[str, Any]]
    examples: tuple[str, ...]

    @property
    def parameters(self) -> set[str]:
        """Names that the constructor takes."""
        return set(inspect.signature(self.metric).parameters) - {"kwargs"}


_SUFFIXES: dict[str, dict[str, str]] = {"": {}, "@official": {"protocol": "official"}, "@stable": {"ties": "stable"}}
_PATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def _nothing(match: re.Match[str]) -> dict[str, Any]:
    return {}


def _insertion_deletion(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": int(match["m"]), **_SUFFIXES[match["suffix"] or ""]}


def _pixel_wise(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": 1, **_SUFFIXES[match["suffix"] or ""]}


_SUFFIX = r"(?P<suffix>@official|@stable)?"
_FAMILY = r"(pid|insertion|deletion)(?P<m>[1-9]\d*)"
_FAMILY_EXAMPLES = tuple(
    f"{stem}{m}{suffix}" for stem in ("pid", "insertion", "deletion") for m in _PATCH_SIZES for suffix in _SUFFIXES
)

REGISTRY: list[MetricEntry] = [
    MetricEntry(r"id" + _SUFFIX, PatchInsertionDeletion, _pixel_wise, tuple(f"id{suffix}" for suffix in _SUFFIXES)),
    MetricEntry(_FAMILY + _SUFFIX, PatchInsertionDeletion, _insertion_deletion, _FAMILY_EXAMPLES),
    MetricEntry(r"fill_probability", FillProbability, _nothing, ("fill_probability",)),
    *(MetricEntry(m.name, m, _nothing, (m.name,)) for m in (RelevanceMass, PointingGame, RelevanceRank, MapAUROC)),
]


def register_metric(entry: MetricEntry) -> None:
    """Add a family of names."""
    REGISTRY.append(entry)


def metric_by_name(name: str, **shared: Any) -> SampleMetric:
    """The metric of a name.

    Args:
        name: `id`, `pid<m>`, `insertion<m>`, `deletion<m>`, each also with `@official` or `@stable`;
            `fill_probability`, `mass`, `pointing`, `rank`, `auroc`; and what else is registered.
        shared: settings for all metrics, such as `mean`, `std`, `fill`; each metric takes those it knows.

    Returns:
        A new metric; its `score` has the name among its keys (`pid1` is `id`).

    Raises:
        ValueError: no metric has this name; the message lists the near ones.
        TypeError: a setting that no metric knows.
    """
    for setting in shared:
        if not any(setting in entry.parameters for entry in REGISTRY):
            raise TypeError(f"no metric has a setting {setting!r}.")
    for entry in REGISTRY:
        match = re.fullmatch(entry.pattern, name)
        if match:
            known = {key: value for key, value in shared.items() if key in entry.parameters}
            return entry.metric(**{**known, **entry.arguments(match)})
    examples = [example for entry in REGISTRY for example in entry.examples]
    near = difflib.get_close_matches(name, examples, n=5, cutoff=0.4) or examples
    raise ValueError(f"unknown metric {name!r}; near names: {', '.join(near)}.")
