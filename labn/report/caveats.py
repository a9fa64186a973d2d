"""Caveats of a results folder as sentences for the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from labn.io.digits import decimals
from labn.report.curves import PROBABILITY
from labn.results.reader import StageResults
from labn.results.tables import FEW, INSERTION_DELETION, NEGLIGIBLE

LISTED = 10
"""Maximum number of classes that a sentence lists by name."""
SCORED = {"label": "the true class", "target": "the same class", "predicted": "the predicted class"}
"""Setting `score_class` -> the class in words, after a sentence about the explained class."""
CLEARLY = 1.645
"""95 % quantile of the standard normal distribution, one-sided."""
FILL_LIMIT = 0.2
"""Mean probability of the bare fill above which a caveat says so."""


def caveats(results: StageResults, split_size: int | None = None) -> list[str]:
    """Sentences about the explained subset, the protocols, the fill and the settings of a results folder.

    Args:
        results: content of the results folder.
        split_size: number of samples of the whole split, if known.
    """
    protocols = [*_protocols(results), *_flat(results)]
    return [*_subset(results, split_size), *protocols, *_fill(results), *_settings(results.manifest)]


def chance_caveat(accuracy: float | None, labels: Sequence[int]) -> str | None:
    """A sentence for an accuracy that is not clearly above the share m of the most frequent class, or None.

    Clearly is above the 95 % quantile of the accuracy of always answering that class, m + 1.645 sqrt(m (1 - m) / n).

    Args:
        accuracy: of the network on the samples; None where it is not known.
        labels: class of each of the n samples.

    Example:
        >>> chance_caveat(0.7, [0, 1, 1])[:61]
        'The accuracy of 0.700 is not clearly above 0.667, the share o'
        >>> chance_caveat(0.9, [0, 1, 1] * 30) is None
        True
    """
    if accuracy is None or not labels:
        return None
    share = max(Counter(labels).values()) / len(labels)
    limit = share + CLEARLY * math.sqrt(share * (1 - share) / len(labels))
    # With a single class every answer is right or wrong alike, and there is nothing to compare with.
    if share == 1 or accuracy > limit:
        return None
    return (
        f"The accuracy of {accuracy:.3f} is not clearly above {share:.3f}, the share of the most frequent class among "
        f"the {len(labels)} samples: maps of a network that knows nothing explain nothing."
    )


def _subset(results: StageResults, split_size: int | None) -> Iterator[str]:
    explained = results.manifest.get("samples", 0)
    if split_size and explained and explained < split_size:
        yield f"Only {explained} of the {split_size} samples were explained and scored."
    counts, one, what, over = [int(row["n"]) for row in results.summary], "sample", "samples", "the samples"
    if results.groups is not None:
        counts = [len(total.groups) for total in results.totals.values()]
        one, what, over = "group of samples", "groups of samples", "whole groups of samples"
    # The smallest count decides: metrics may leave samples out.
    if counts and min(counts) == 1:
        yield f"Some values are based on one {one} alone: they have no interval and decide no difference."
    elif counts and min(counts) < FEW:
        yield f"Some values are based on {min(counts)} {what}: intervals of so few are too narrow."
    if counts:
        yield f"Intervals are 95 % bootstrap intervals over {over}."


def _protocols(results: StageResults) -> Iterator[str]:
    names = results.value_names
    if any("@official" in name for name in names):
        yield (
            "@official is the released code with its errors: a constant map scores high under it, and its scores are "
            "not comparable across patch sizes."
        )
    if any("@threshold" in name for name in names):
        yield "@threshold rewards ties: tied patches enter together, at the x position of the first of them."
    if any("@stable" in name for name in names):
        yield "@stable orders tied patches by position; without a suffix tied patches enter together."
    if any(name.startswith(("pid", "id")) for name in names):
        yield (
            "PID is the area under the insertion curve minus that under the deletion curve; its expectation for a map "
            "without information is 0 (approximately 0 if the last step is shorter)."
        )


def _flat(results: StageResults) -> Iterator[str]:
    """A sentence where all means of a PID column are next to nothing; those of logits have no fixed range."""
    columns: dict[str, list[float]] = {}
    for row in results.summary:
        # A constant map has its own level under @official.
        if INSERTION_DELETION.fullmatch(row["metric"]) and row["explainer"] != "constant":
            columns.setdefault(row["metric"], []).append(abs(float(row["mean"])))
    flat = [name for name, means in columns.items() if max(means) < NEGLIGIBLE]
    if flat and results.quantity == PROBABILITY:
        yield (
            f"{', '.join(flat)}: every method lies within {NEGLIGIBLE} of 0, the value of a map without information. "
            "The network's answer hardly depends on which pixels are taken away (flat curves), so that the marks, "
            "stars and ranks of these values mean next to nothing."
        )


def _fill(results: StageResults) -> Iterator[str]:
    totals = [total for (_, metric), total in results.totals.items() if metric == "fill_probability"]
    mean = sum(total.sum for total in totals) / max(sum(total.count for total in totals), 1)
    # Logits have no fixed range, so that no limit would fit them.
    if results.quantity == PROBABILITY and mean > FILL_LIMIT:
        yield (
            f"The bare fill alone has a mean probability of {decimals(mean)}: insertion curves start there, which "
            "changes every area."
        )


def _settings(manifest: dict[str, Any]) -> Iterator[str]:
    settings = manifest.get("settings", {})
    if settings.get("positives_only"):
        yield from _positives(manifest)
    if settings.get("correct_only"):
        yield "Metrics that perturb images are scored on correctly classified samples only."
    if settings.get("probability") == "logit":
        yield (
            "Insertion, deletion, pid (id) and fill_probability are logits of the class instead of probabilities: "
            "they have no fixed range, and their scale depends on the network."
        )
    if settings.get("area", "trapezoid") != "trapezoid":
        yield "Areas are means of the curve's points instead of trapezoidal areas."
    if settings.get("precision", "fp32") != "fp32":
        yield f"Perturbed inputs ran in {settings['precision']}."
    for name in ("n_steps", "step"):
        if settings.get(name):
            yield f"Curves were sampled with {name} = {settings[name]} instead of the protocol's own."
    if (target := str(manifest.get("target", "label"))) != "label":
        yield f"Maps explain {_explained(target, manifest.get('class_names', []))}. {_scored(settings)}"


def _explained(target: str, names: list[str]) -> str:
    """The explained class in words, for `prediction`, `top<k>` or the number of a class."""
    if target == "prediction":
        return "the class that the network predicts, which may be wrong"
    if target.startswith("top"):
        return f"the class in place {target[3:]} of the network's prediction, which may be wrong"
    number = int(target)
    return (
        f"the class '{names[number]}' in every picture" if number < len(names) else f"class {number} in every picture"
    )


def _scored(settings: dict[str, Any]) -> str:
    """Which class's output the metrics measure, as a sentence."""
    output = "measure the network's output for"
    if settings.get("score_class") in SCORED:
        return f"The metrics {output} {SCORED[settings['score_class']]}."
    return (
        f"Insertion and deletion {output} the true class; average drop, ROAD and scene metrics, for the explained one."
    )


def _positives(manifest: dict[str, Any]) -> Iterator[str]:
    classes, names = manifest.get("positive_classes"), manifest.get("class_names", [])
    if classes is None:  # results of an earlier version do not say which
        which = "the data's positive classes"
    elif not set(range(len(names))) - set(classes):
        return
    elif len(classes) > LISTED:
        which = f"{len(classes)} of the {len(names)} classes"
    else:
        which = ", ".join(f"'{names[k]}'" for k in classes) or "no class"
    yield f"Metrics that perturb images are scored on samples of {which} only."
