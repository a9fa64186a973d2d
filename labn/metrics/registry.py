"""Registry of metrics by the names in files and on command lines: `pid16@official`, `id`, `mass`, ..."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labn.errors import InputError, InputTypeError
from labn.metrics.base import SampleMetric
from labn.metrics.confidence import ADCC, AverageDrop, PercentIncrease
from labn.metrics.descriptions import ValueDescription, own_description
from labn.metrics.errors import ErrorAnalysis
from labn.metrics.faithfulness import Completeness, Infidelity, MuFidelity, SensitivityN
from labn.metrics.filled import FillProbability
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.irof import IROF
from labn.metrics.localisation import (
    MapAUROC,
    MapIoU,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    TopKLocalisation,
)
from labn.metrics.percentage_in import FORMS, PERCENTS, PercentageIn
from labn.metrics.randomisation import (
    EfficientRandomisation,
    LayerRandomisation,
    Randomisation,
    SmoothRandomisation,
)
from labn.metrics.road import ROAD
from labn.metrics.scene import SceneAgreement
from labn.metrics.sparseness import Sparseness
from labn.metrics.stability import RandomLogit, Sensitivity


@dataclass(frozen=True)
class MetricEntry:
    """One family of metric names.

    Attributes:
        pattern: regular expression that matches the whole name.
        metric: the metric's class, which receives those of the shared settings that its constructor has.
        arguments: match -> constructor arguments that the name contains.
        examples: names to suggest for a similar unknown name.
        descriptions: name of a value -> its meaning, range and better end, for reports.

    Example:
        >>> entry = MetricEntry(r"gini", Sparseness, lambda match: {}, ("gini",))
        >>> bool(re.fullmatch(entry.pattern, "gini"))
        True
    """

    pattern: str
    metric: type[SampleMetric]
    arguments: Callable[[re.Match[str]], dict[str, Any]]
    examples: tuple[str, ...]
    descriptions: Mapping[str, ValueDescription] = field(default_factory=dict)

    @property
    def parameters(self) -> set[str]:
        """Names of the constructor's arguments."""
        return set(inspect.signature(self.metric).parameters) - {"kwargs"}


_SUFFIXES: dict[str, dict[str, str]] = {
    "": {},
    "@official": {"protocol": "official"},
    "@stable": {"ties": "stable"},
    "@random": {"ties": "random"},
    "@threshold": {"ties": "threshold"},
}

_PATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def _no_arguments(match: re.Match[str]) -> dict[str, Any]:
    return {}


def _insertion_deletion(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": int(match["m"]), **_SUFFIXES[match["suffix"] or ""]}


def _error_bound(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": int(match["m"] or 1), "steps": "auto", **_SUFFIXES[match["suffix"] or ""]}


def _pixel_wise(match: re.Match[str]) -> dict[str, Any]:
    return {"patch_size": 1, **_SUFFIXES[match["suffix"] or ""]}


def _percentage_in(match: re.Match[str]) -> dict[str, Any]:
    form = match["form"]
    return {"percents": [int(match["q"])], "forms": [form or "logit"], "headline": form is None}


def _scene(match: re.Match[str]) -> dict[str, Any]:
    return {"importance": match["importance"] or "removal"}


_SCENE = r"scene(_logit)?(_top)?(@(?P<importance>shapley))?"

_SCENE_EXAMPLES = tuple(f"scene{end}{suffix}" for end in ("", "_top", "_logit") for suffix in ("", "@shapley"))

_SUFFIX = r"(?P<suffix>@official|@stable|@random|@threshold)?"

_FAMILY = r"(pid|insertion|deletion)(?P<m>[1-9]\d*)"

_FAMILY_EXAMPLES = tuple(
    f"{stem}{m}{suffix}" for stem in ("pid", "insertion", "deletion") for m in _PATCH_SIZES for suffix in _SUFFIXES
)

_ERROR_BOUND = rf"(id|pid(?P<m>[1-9]\d*)){_SUFFIX}@error"

_PERCENTAGE = rf"pctin(_(?P<form>{'|'.join(FORMS)}))?(?P<q>[1-9]\d?|100)"

_PERCENTAGE_EXAMPLES = tuple(f"pctin{form}{q}" for form in ("", *(f"_{form}" for form in FORMS)) for q in PERCENTS)

LOCALISATION = (RelevanceMass, PointingGame, RelevanceRank, MapAUROC, MapIoU, TopKLocalisation)

REGISTRY: list[MetricEntry] = [
    MetricEntry(r"id" + _SUFFIX, PatchInsertionDeletion, _pixel_wise, tuple(f"id{suffix}" for suffix in _SUFFIXES)),
    MetricEntry(_FAMILY + _SUFFIX, PatchInsertionDeletion, _insertion_deletion, _FAMILY_EXAMPLES),
    MetricEntry(_ERROR_BOUND, PatchInsertionDeletion, _error_bound, ("id@error", "pid16@error")),
    MetricEntry(r"fill_probability", FillProbability, _no_arguments, ("fill_probability",)),
    MetricEntry(r"pctin", PercentageIn, _no_arguments, ("pctin",)),
    MetricEntry(_PERCENTAGE, PercentageIn, _percentage_in, _PERCENTAGE_EXAMPLES),
    MetricEntry(r"randomisation", Randomisation, _no_arguments, ("randomisation",)),
    MetricEntry(r"mprt_layers", LayerRandomisation, _no_arguments, ("mprt_layers",)),
    MetricEntry(r"smprt", SmoothRandomisation, _no_arguments, ("smprt",)),
    MetricEntry(r"emprt", EfficientRandomisation, _no_arguments, ("emprt",)),
    MetricEntry(r"sparseness", Sparseness, _no_arguments, ("sparseness",)),
    MetricEntry(r"average_drop", AverageDrop, _no_arguments, ("average_drop",)),
    MetricEntry(r"percent_increase", PercentIncrease, _no_arguments, ("percent_increase",)),
    MetricEntry(r"adcc", ADCC, _no_arguments, ("adcc",)),
    MetricEntry(r"completeness", Completeness, _no_arguments, ("completeness",)),
    MetricEntry(r"sensitivity_n", SensitivityN, _no_arguments, ("sensitivity_n",)),
    MetricEntry(r"mufidelity", MuFidelity, _no_arguments, ("mufidelity",)),
    MetricEntry(r"infidelity", Infidelity, _no_arguments, ("infidelity",)),
    MetricEntry(r"(max|avg)_sensitivity", Sensitivity, _no_arguments, ("max_sensitivity", "avg_sensitivity")),
    MetricEntry(r"irof", IROF, _no_arguments, ("irof",)),
    MetricEntry(r"road", ROAD, _no_arguments, ("road",)),
    MetricEntry(r"random_logit", RandomLogit, _no_arguments, ("random_logit",)),
    MetricEntry(_SCENE, SceneAgreement, _scene, _SCENE_EXAMPLES),
    MetricEntry(r"errors", ErrorAnalysis, _no_arguments, ("errors",)),
    *(MetricEntry(m.name, m, _no_arguments, (m.name,)) for m in LOCALISATION),
]


def register_metric(entry: MetricEntry) -> None:
    """Add a family of names to the registry.

    Args:
        entry: the family; a name that several patterns match belongs to the first of them.

    Example:
        >>> register_metric(MetricEntry(r"gini", Sparseness, lambda match: {}, ("gini",)))
        >>> type(metric_by_name("gini")).__name__
        'Sparseness'
        >>> _ = REGISTRY.pop()
    """
    REGISTRY.append(entry)


def metric_by_name(name: str, **shared: Any) -> SampleMetric:
    """Build the metric of a name.

    Args:
        name: one of

            - `id`, `pid<m>`, `insertion<m>`, `deletion<m>`, each also with the suffix `@official`, `@stable`, `@random`
              (a seeded order of ties) or `@threshold` (the released code's handling of ties alone);
            - `id@error`, `pid<m>@error`, also behind these suffixes: the bound of the error with `steps="auto"`;
            - `fill_probability`, `average_drop`, `percent_increase`, `adcc`;
            - `pctin_prob<q>`, `pctin_logit<q>`, `pctin_ratio<q>` for a percentage q, `pctin<q>` (the logit), and
              `pctin` (all three at 5, 10, 20, 25 and 50 % from one curve);
            - `mass`, `pointing`, `rank`, `auroc`, `iou`, `topk_localisation`, `errors`, `sparseness`;
            - `completeness`, `sensitivity_n`, `mufidelity`, `infidelity`, `irof`, `road`, `max_sensitivity`,
              `avg_sensitivity`, `random_logit`, `randomisation`, `mprt_layers`, `smprt`, `emprt`;
            - `scene`, `scene_top`, `scene_logit`, `scene_logit_top`, each also with the suffix `@shapley`;
            - a name of a family that `register_metric` added.
        shared: settings for all metrics, such as `mean`, `std`, `fill`; each metric receives those it has.

    Returns:
        A new metric; `values_named` lists the values that the name refers to.

    Raises:
        InputError: an unknown name; the message lists similar ones.
        InputTypeError: a setting that no metric has.

    Example:
        >>> metric_by_name("pid16@official", fill="black").names
        ('insertion16@official', 'deletion16@official', 'pid16@official', 'fill_probability')
    """
    for setting in shared:
        if not any(setting in entry.parameters for entry in REGISTRY):
            raise InputTypeError(f"no metric has a setting {setting!r}.")
    entry, arguments = _entry_of(name)
    settings = {key: value for key, value in shared.items() if key in entry.parameters}
    # The name comes last: `pid8` keeps its patch size where a shared setting has another one.
    return entry.metric(**{**settings, **arguments})


def check_settings(names: Sequence[str], settings: Iterable[str]) -> None:
    """Check that every setting has an effect on at least one metric.

    Args:
        names: metric names, see `metric_by_name`.
        settings: names of constructor arguments.

    Raises:
        InputTypeError: a setting that none of the metrics has, or that all their names contain already.

    Example:
        >>> check_settings(["pid16", "mass"], ["fill"])
    """
    entries = [_entry_of(name) for name in names]
    for setting in settings:
        takers = [arguments for entry, arguments in entries if setting in entry.parameters]
        if all(setting in arguments for arguments in takers):
            why = "contain it in their names" if takers else "have no such setting"
            raise InputTypeError(f"{setting!r} would have no effect: the metrics {', '.join(names)} {why}.")


def _entry_of(name: str) -> tuple[MetricEntry, dict[str, Any]]:
    """The family of a name, and the constructor arguments that the name contains."""
    # Families are tried in order, so that a later one cannot take over a name of this project.
    for entry in REGISTRY:
        match = re.fullmatch(entry.pattern, name)
        if match:
            return entry, entry.arguments(match)
    examples = [example for entry in REGISTRY for example in entry.examples]
    near = difflib.get_close_matches(name, examples, n=5, cutoff=0.4) or examples
    raise InputError(f"unknown metric {name!r}; similar names: {', '.join(near)}.")


def values_named(name: str, metric: SampleMetric) -> dict[str, str]:
    """Values of a metric that a name refers to.

    A name of one value, such as `pid16`, refers to that value (`pid1` to `id`). A name of a group, such as `pctin`,
    refers to all values of the metric. With `steps="auto"`, `pid16` also refers to `pid16@error`.

    Args:
        name: the name that built the metric.
        metric: the metric.

    Returns:
        Name to report -> name of the value in `metric.names`.

    Example:
        >>> values_named("pid16", metric_by_name("pid16"))
        {'pid16': 'pid16'}
    """
    # A patch of one pixel is the pixel-wise metric, whose name is ID in the papers.
    canonical = re.sub(r"^pid1(?=@|$)", "id", name)
    if canonical not in metric.names:
        return {value: value for value in metric.names}
    # The bound stands beside an area that was not evaluated at every step.
    bounds = {f"{name}@error": bound} if (bound := f"{canonical}@error") in metric.names else {}
    return {name: canonical, **bounds}


def describe_value(name: str, quantity: str = "probability") -> ValueDescription:
    """Meaning, range and better end of a value in the tables.

    A metric of the user that has no `descriptions` is described by the first line of its class.

    Args:
        name: name of the value, such as `pid16`, or of a figure of the model, such as `accuracy`.
        quantity: what insertion and deletion curves show, `probability` or `logit`.

    Returns:
        The description; its meaning is empty for an unknown name, such as a metric that this process has not imported.

    Example:
        >>> print(describe_value("mass"))
        share of the map's positive values inside the mask or box. Range [0, 1], higher is better.
    """
    registered = (entry.descriptions[name] for entry in REGISTRY if name in entry.descriptions)
    if (found := own_description(name, quantity) or next(registered, None)) is not None:
        return found
    docs = (inspect.getdoc(entry.metric) or "" for entry in REGISTRY if re.fullmatch(entry.pattern, name))
    return ValueDescription(next(docs, "").partition("\n")[0].rstrip("."))
