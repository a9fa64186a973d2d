"""Metrics by the names that files and command lines use: `pid16@official`, `id`, `mass`, ..."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from labn.errors import InputError, InputTypeError
from labn.metrics.base import SampleMetric
from labn.metrics.confidence import ADCC, AverageDrop, PercentIncrease
from labn.metrics.errors import ErrorAnalysis
from labn.metrics.filled import FillProbability
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.localisation import MapAUROC, PointingGame, RelevanceMass, RelevanceRank
from labn.metrics.percentage_in import FORMS, PERCENTS, PercentageIn
from labn.metrics.randomisation import Randomisation
from labn.metrics.sparseness import Sparseness


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


_SUFFIXES: dict[str, dict[str, str]] = {
    "": {},
    "@official": {"protocol": "official"},
    "@stable": {"ties": "stable"},
    "@random": {"ties": "random"},
    "@threshold": {"ties": "threshold"},
}

_PATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def _nothing(match: re.Match[str]) -> dict[str, Any]:
    return {}


def _insertion_deletion(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": int(match["m"]), **_SUFFIXES[match["suffix"] or ""]}


def _pixel_wise(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": 1, **_SUFFIXES[match["suffix"] or ""]}


def _percentage_in(match: re.Match[str]) -> dict[str, Any]:
    form = match["form"]
    return {"percents": [int(match["q"])], "forms": [form or "logit"], "headline": form is None}


_SUFFIX = r"(?P<suffix>@official|@stable|@random|@threshold)?"

_FAMILY = r"(pid|insertion|deletion)(?P<m>[1-9]\d*)"

_FAMILY_EXAMPLES = tuple(
    f"{stem}{m}{suffix}" for stem in ("pid", "insertion", "deletion") for m in _PATCH_SIZES for suffix in _SUFFIXES
)

_PERCENTAGE = rf"pctin(_(?P<form>{'|'.join(FORMS)}))?(?P<q>[1-9]\d?|100)"

_PERCENTAGE_EXAMPLES = tuple(f"pctin{form}{q}" for form in ("", *(f"_{form}" for form in FORMS)) for q in PERCENTS)

REGISTRY: list[MetricEntry] = [
    MetricEntry(r"id" + _SUFFIX, PatchInsertionDeletion, _pixel_wise, tuple(f"id{suffix}" for suffix in _SUFFIXES)),
    MetricEntry(_FAMILY + _SUFFIX, PatchInsertionDeletion, _insertion_deletion, _FAMILY_EXAMPLES),
    MetricEntry(r"fill_probability", FillProbability, _nothing, ("fill_probability",)),
    MetricEntry(r"pctin", PercentageIn, _nothing, ("pctin",)),
    MetricEntry(_PERCENTAGE, PercentageIn, _percentage_in, _PERCENTAGE_EXAMPLES),
    MetricEntry(r"randomisation", Randomisation, _nothing, ("randomisation",)),
    MetricEntry(r"sparseness", Sparseness, _nothing, ("sparseness",)),
    MetricEntry(r"average_drop", AverageDrop, _nothing, ("average_drop",)),
    MetricEntry(r"percent_increase", PercentIncrease, _nothing, ("percent_increase",)),
    MetricEntry(r"adcc", ADCC, _nothing, ("adcc",)),
    MetricEntry(r"errors", ErrorAnalysis, _nothing, ("errors",)),
    *(MetricEntry(m.name, m, _nothing, (m.name,)) for m in (RelevanceMass, PointingGame, RelevanceRank, MapAUROC)),
]


def register_metric(entry: MetricEntry) -> None:
    """Add a family of names."""
    REGISTRY.append(entry)


def metric_by_name(name: str, **shared: Any) -> SampleMetric:
    """The metric of a name.

    Args:
        name: `id`, `pid<m>`, `insertion<m>`, `deletion<m>`, each also with `@official`, `@stable`,
            `@random` (a seeded order of ties) or `@threshold` (the released code's handling of ties alone);
            `fill_probability`; `average_drop`, `percent_increase`, `adcc`; `pctin_prob<q>`, `pctin_logit<q>`,
            `pctin_ratio<q>` for a percentage q, `pctin<q>` (the logit) and `pctin` (all three at 5, 10, 20, 25 and 50
            from one curve);
            `mass`, `pointing`, `rank`, `auroc`, `errors`; `randomisation`, `sparseness`; and what else is registered.
        shared: settings for all metrics, such as `mean`, `std`, `fill`; each metric takes those it knows.

    Returns:
        A new metric; `values_named` says which of its values the name stands for.

    Raises:
        ValueError: no metric has this name; the message lists the near ones.
        TypeError: a setting that no metric knows.
    """
    for setting in shared:
        if not any(setting in entry.parameters for entry in REGISTRY):
            raise InputTypeError(f"no metric has a setting {setting!r}.")
    entry, arguments = _entry_of(name)
    known = {key: value for key, value in shared.items() if key in entry.parameters}
    return entry.metric(**{**known, **arguments})


def check_settings(names: Sequence[str], settings: Iterable[str]) -> None:
    """Raise TypeError for a setting without effect: none of these metrics knows it, or their names say it already.

    Args:
        names: as for `metric_by_name`.
        settings: names of constructor arguments.
    """
    entries = [_entry_of(name) for name in names]
    for setting in settings:
        takers = [arguments for entry, arguments in entries if setting in entry.parameters]
        if all(setting in arguments for arguments in takers):
            why = "say it by their names" if takers else "have no such setting"
            raise InputTypeError(f"{setting!r} would do nothing: the metrics {', '.join(names)} {why}.")


def _entry_of(name: str) -> tuple[MetricEntry, dict[str, Any]]:
    """The family that a name belongs to, and the arguments that the name says."""
    for entry in REGISTRY:
        match = re.fullmatch(entry.pattern, name)
        if match:
            return entry, entry.arguments(match)
    examples = [example for entry in REGISTRY for example in entry.examples]
    near = difflib.get_close_matches(name, examples, n=5, cutoff=0.4) or examples
    raise InputError(f"unknown metric {name!r}; near names: {', '.join(near)}.")


def values_named(name: str, metric: SampleMetric) -> dict[str, str]:
    """What the name asks for among the metric's values, by the names to report them under.

    The value called so (`pid1` is `id`); else, for a family such as `pctin`, every value under its own name.
    """
    canonical = re.sub(r"^pid1(?=@|$)", "id", name)
    return {name: canonical} if canonical in metric.names else {value: value for value in metric.names}
