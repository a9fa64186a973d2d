"""Identity of an explainer or metric in saved results: its class, its arguments, and the source of foreign classes."""

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
"""Packages of this project. Their classes are identified by name, classes of other packages by their source as well."""

# Keys of maps and scores on disk are hashes of class paths. A module that moves would change them and make every saved
# map unusable, so that the hash goes on using the path of version 0.1.
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
"""Modules and classes that have moved -> the paths under which saved results know them."""


ADDED: dict[str, dict[str, Any]] = {
    "labn.lrp.config.Config": {
        "norm": "identity",
        "softmax": "constant",
        "biases": False,
        "dead": None,
        "composite": [],
    },
    "labn.explainers.perturbation.rise.RISE": {"control": False},
    "labn.explainers.perturbation.rise.ReleasedRISE": {"control": False},
    "labn.metrics.insertion_deletion.PatchInsertionDeletion": {"tolerance": None},
}
"""Class -> arguments that came after version 0.1, with their defaults. At its default such an argument leaves every
value as it was, and is no part of the key, so that stored maps stay valid."""


def describe(thing: Any) -> Any:
    """A JSON-compatible description of an explainer, a metric or a value: class path and public attributes."""
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
    if not hasattr(thing, "__dict__"):  # such as a dtype or a built-in function; its address would differ in every run
        return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
    arguments = {name: value for name, value in vars(thing).items() if not name.startswith("_")}
    source = source_digest(type(thing))
    # These keys contain a space, so that no attribute can have the same name. Classes of this project have neither key
    # in general, so that their hashes depend on class and arguments alone.
    extra: dict[str, Any] = {} if source is None else {"source code": source}
    if isinstance(thing, (Explainer, SampleMetric)) and thing.revision:
        extra["the revision"] = thing.revision
    added = ADDED.get(f"{type(thing).__module__}.{type(thing).__qualname__}", {})
    described = {
        name: value for name, value in describe(arguments).items() if name not in added or value != added[name]
    }
    return {"class": _path_of(type(thing)), **extra, **described}


def _path_of(kind: type) -> str:
    """The import path that identifies a class in results; for a class that has moved, its original path."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return MOVED.get(path) or f"{MOVED.get(kind.__module__, kind.__module__)}.{kind.__qualname__}"


def source_digest(kind: type) -> str | None:
    """Hash of the source files of a foreign class and of its base classes.

    Base classes that it inherits through a class of this project, such as `torchmetrics.Metric`, are not included.

    Returns:
        None for a class of this project, and for a class without a source file, such as one from an interpreter.
    """
    if _ours(kind):
        return None
    # A new release of torchmetrics must not invalidate the scores of every metric that derives from SampleMetric.
    through_ours = {base for one in kind.__mro__ if _ours(one) for base in one.__mro__}
    files = dict.fromkeys(_source_file(one) for one in kind.__mro__ if one not in through_ours)
    texts = [path.read_bytes().hex() for path in files if path is not None]
    return digest(*texts) if texts else None


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] in OURS


def _source_file(kind: type) -> Path | None:
    try:
        path = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # a built-in class, or a class from an interpreter
        return None
    return Path(path) if path is not None and Path(path).is_file() else None
