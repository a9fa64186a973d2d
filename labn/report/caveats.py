"""What must be read with the numbers, as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labn.report.curves import PROBABILITY
from labn.results.reader import StageResults

FEW = 30
LISTED = 10
"""Classes that a sentence names one by one."""
FILL_LIMIT = 0.2


def caveats(results: StageResults, split_size: int | None = None) -> list[str]:
    """Sentences on the protocol, the subset and the size of a results folder.

    Args:
        results: the folder.
        split_size: number of samples of the whole split, where it is known.
    """
    return [*_subset(results, split_size), *_protocols(results), *_fill(results), *_settings(results.manifest)]


def _subset(results: StageResults, split_size: int | None) -> Iterator[str]:
    explained = results.manifest.get("samples", 0)
    if split_size and explained and explained < split_size:
        yield f"Only {explained} of the {split_size} samples were explained and scored."
    counts, one, what, over = [int(row["n"]) for row in results.summary], "sample", "samples", "the samples"
    if results.groups is not None:
        counts = [len(total.groups) for total in results.totals.values()]
        one, what, over = "group of samples", "groups of samples", "whole groups of samples"
    if counts and min(counts) == 1:
        yield f"Some values rest on one {one} alone: they have no interval, and no difference in them is decided."
    elif counts and min(counts) < FEW:
        yield f"Some values rest on {min(counts)} {what}: intervals of so few are too narrow."
    if counts:
        yield f"Intervals are 95 % bootstrap intervals over {over}, not over seeds."


def _protocols(results: StageResults) -> Iterator[str]:
    names = results.value_names
    if any("@official" in name for name in names):
        yield (
            "@official is the released code, bug for bug: a constant map scores high under it, and its figures do not "
            "compare across patch sizes."
        )
    if any("@threshold" in name for name in names):
        yield "@threshold rewards ties: tied patches enter together, at the place of the first of them on the x axis."
    if any("@stable" in name for name in names):
        yield "@stable orders tied patches by position; without a suffix tied patches enter together."
    if any(name.startswith(("pid", "id")) for name in names):
        yield (
            "PID is insertion minus deletion area; a map without information expects 0 "
            "(nearly, where the last step is shorter)."
        )


def _fill(results: StageResults) -> Iterator[str]:
    found = [total for (_, metric), total in results.totals.items() if metric == "fill_probability"]
    mean = sum(total.sum for total in found) / max(sum(total.count for total in found), 1)
    # A logit says nothing by itself.
    if results.quantity == PROBABILITY and mean > FILL_LIMIT:
        yield (
            f"The bare fill alone has a mean probability of {mean:.3f}: insertion curves start there, which moves "
            "every area."
        )


def _settings(manifest: dict[str, Any]) -> Iterator[str]:
    settings = manifest.get("settings", {})
    if settings.get("positives_only"):
        yield from _positives(manifest)
    if settings.get("correct_only"):
        yield "Metrics that perturb images are scored on correctly classified samples only."
    if settings.get("probability") == "logit":
        yield (
            "Insertion, deletion, pid (id) and fill_probability are in logits of the class instead of probabilities: "
            "they have no fixed range, and their scale is the network's own."
        )
    if settings.get("area", "trapezoid") != "trapezoid":
        yield "Areas are means of the curves' points."
    if settings.get("precision", "fp32") != "fp32":
        yield f"Perturbed inputs ran in {settings['precision']}."
    for name in ("n_steps", "step"):
        if settings.get(name):
            yield f"Curves were sampled with {name} = {settings[name]} instead of the protocol's own."
    if manifest.get("target") == "prediction":
        yield "Maps explain the predicted class, which may be wrong; metrics score the class that the settings name."
    elif manifest.get("target", "label") != "label":
        yield f"Maps explain the class target = {manifest['target']}; metrics score the class that the settings name."


def _positives(manifest: dict[str, Any]) -> Iterator[str]:
    classes, names = manifest.get("positive_classes"), manifest.get("class_names", [])
    if classes is None:  # of results that do not say which
        which = "the data's positive classes"
    elif not set(range(len(names))) - set(classes):
        return
    elif len(classes) > LISTED:
        which = f"{len(classes)} of the {len(names)} classes"
    else:
        which = ", ".join(f"'{names[k]}'" for k in classes) or "no class"
    yield f"Metrics that perturb images are scored on samples of {which} only."
