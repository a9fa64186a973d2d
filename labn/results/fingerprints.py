"""What identifies an explainer or metric in results: its class, its arguments, and the source of foreign classes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from torch import Tensor

from labn.explainers import Explainer
from labn.inference.fingerprint import digest, tensor_digest
from labn.metrics.base import SampleMetric

OURS = ("labn", "callbacks", "datamodules")
"""Packages of this project, whose classes are identified by their names; other ones' change with their source."""


MOVED = {
    "labn.explainers.baseline.GroundTruthMap": "labn.explainers.truth.TruthMap",
    "labn.explainers.attention.own_maps": "labn.explainers.attention",
    "labn.explainers.attention.rollout": "labn.explainers.rollout",
    "labn.explainers.cam.ablation": "labn.explainers.ablation_cam",
    "labn.explainers.cam.attention_guided": "labn.explainers.attention_guided",
    "labn.explainers.cam.gradcam": "labn.explainers.cam",
    "labn.explainers.cam.linear": "labn.explainers.linear_cam",
    "labn.explainers.cam.score": "labn.explainers.score_cam",
    "labn.explainers.cam.smooth": "labn.explainers.smooth_cam",
    "labn.explainers.perturbation.occlusion": "labn.explainers.occlusion",
    "labn.explainers.perturbation.rise": "labn.explainers.rise",
    "labn.explainers.relevance.crp": "labn.explainers.crp",
    "labn.explainers.relevance.lrp": "labn.explainers.lrp",
}
"""Modules and classes that have moved since results were first written -> the names that folders on disk hold."""


def describe(thing: Any) -> Any:
    """A JSON-able description of an explainer or metric: its class and plain arguments."""
    if isinstance(thing, Tensor):
        return tensor_digest(thing)
    if isinstance(thing, (str, int, float, bool, type(None))):
        return thing
    if isinstance(thing, PurePath):
        return str(thing)
    if isinstance(thing, (list, tuple)):
        return [describe(item) for item in thing]
    if isinstance(thing, dict):
        return {str(name): describe(value) for name, value in thing.items()}
    if isinstance(thing, np.ndarray):
        return digest(str(thing.dtype), thing.tolist())
    if not hasattr(thing, "__dict__"):  # such as a dtype; an address would differ in every run
        return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
    arguments = {name: value for name, value in vars(thing).items() if not name.startswith("_")}
    source = source_digest(type(thing))
    # Keys that no argument can have; none at all for most of the project's own classes.
    extra: dict[str, Any] = {} if source is None else {"source code": source}
    if isinstance(thing, (Explainer, SampleMetric)) and thing.revision:
        extra["the revision"] = thing.revision
    return {"class": _path_of(type(thing)), **extra, **describe(arguments)}


def _path_of(kind: type) -> str:
    """The path of a class that identifies it in results: the one that it had when results were first written."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return MOVED.get(path) or f"{MOVED.get(kind.__module__, kind.__module__)}.{kind.__qualname__}"


def source_digest(kind: type) -> str | None:
    """Hash of the source files of a class from outside this project, and of the classes that it builds on.

    What it inherits through the project's own classes does not enter, such as those of other packages.

    Returns:
        None for a class of this project, and where there is no source file, as for one typed into an interpreter.
    """
    if _ours(kind):
        return None
    through_ours = {base for one in kind.__mro__ if _ours(one) for base in one.__mro__}
    files = dict.fromkeys(_source_file(one) for one in kind.__mro__ if one not in through_ours)
    texts = [path.read_bytes().hex() for path in files if path is not None]
    return digest(*texts) if texts else None


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] in OURS


def _source_file(kind: type) -> Path | None:
    try:
        path = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # built in, or typed into an interpreter
        return None
    return Path(path) if path is not None and Path(path).is_file() else None
