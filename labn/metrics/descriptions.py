"""What every value means, its range and its better end: the text beside tables in reports."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class ValueDescription:
    """The definition of one value.

    Attributes:
        meaning: a phrase without a full stop.
        range: its interval, such as "[0, 1]"; empty if the value has no fixed range.
        better: which end is better; empty if neither is.

    Example:
        >>> print(ValueDescription("share of correct predictions", "[0, 1]", "high"))
        share of correct predictions. Range [0, 1], higher is better.
    """

    meaning: str
    range: str = ""
    better: Literal["high", "low", ""] = ""

    @property
    def sign(self) -> int:
        """1 if high values are better, -1 if low ones are, 0 if neither end is."""
        return {"high": 1, "low": -1, "": 0}[self.better]

    @property
    def reading(self) -> str:
        """Range and direction, such as `range [0, 1], higher is better`; empty if the value has neither."""
        direction = {"high": "higher is better", "low": "lower is better", "": ""}[self.better]
        return ", ".join(part for part in (f"range {self.range}" if self.range else "", direction) if part)

    def __str__(self) -> str:
        reading = self.reading
        return f"{self.meaning}." + (f" {reading[0].upper()}{reading[1:]}." if reading else "")


_TIES = {
    "": "",
    "@stable": "; tied patches in raster order",
    "@random": "; tied patches in a seeded random order",
    "@threshold": "; tied patches together, at the x position of their first, which rewards ties",
    "@official": "; as the released code computes it, where a constant map scores high",
}


def _insertion_deletion(match: re.Match[str]) -> ValueDescription:
    kind, side = match["kind"], int(match["side"] or 1)
    pieces = "single pixels" if side == 1 else f"patches of {side} pixels"
    area = "area under the curve of the class's {quantity} while"
    texts = {
        "insertion": (f"{area} {pieces} of the picture are shown on the fill, highest of the map first", "high"),
        "deletion": (f"{area} {pieces} of the picture are removed, highest of the map first", "low"),
        "pid": (f"insertion minus deletion area for {pieces}", "high"),
    }
    difference, suffix = kind in ("id", "pid"), match["suffix"] or ""
    meaning, better = texts["pid" if difference else kind]
    # Under the other ways to treat ties a constant map does not get 0.
    zero = "; a map without information gets 0" if difference and suffix in ("", "@random") else ""
    limits = "[-1, 1]" if difference else "[0, 1]"
    return ValueDescription(meaning + zero + _TIES[suffix], limits, better)  # type: ignore[arg-type]


def _percentage_in(match: re.Match[str]) -> ValueDescription:
    what, limits = {
        "prob": ("probability of the class", "[0, 1]"),
        "logit": ("logit of the class", ""),
        "ratio": ("probability of the class over that on the whole picture,", ""),
    }[match["form"] or "logit"]
    return ValueDescription(f"{what} with only the highest {match['percent']} % of the pixels shown", limits, "high")


def _detection_shift(match: re.Match[str]) -> ValueDescription:
    of = {"cx": "horizontal position", "cy": "vertical position", "w": "width", "h": "height"}[match["coordinate"]]
    return ValueDescription(
        f"mean change of the box's {of} while the patches that most support a larger one are removed; a faithful map "
        "is below random ones, its negative above them"
    )


def _scene(match: re.Match[str]) -> ValueDescription:
    output = "logit" if match["logit"] else "probability"
    importance = f"Shapley value for the class's {output}" if match["shapley"] else f"effect on the class's {output}"
    if match["top"]:
        meaning = "1 where the object with the highest sum of the map is the one with the largest {}, else 0"
    else:
        meaning = "rank correlation, over the objects of a drawn picture, of the map's sum on each with its {}"
    drawn = "" if match["shapley"] else " when the picture is drawn without it"
    return ValueDescription(meaning.format(importance + drawn), "[0, 1]" if match["top"] else "[-1, 1]", "high")


Maker = Callable[[re.Match[str]], ValueDescription]

_SUFFIX = r"(?P<suffix>@official|@stable|@random|@threshold)?"

DESCRIPTIONS: dict[str, ValueDescription | Maker] = {
    r"(?P<kind>pid|insertion|deletion)(?P<side>\d+)" + _SUFFIX: _insertion_deletion,
    r"(?P<kind>id)(?P<side>)" + _SUFFIX: _insertion_deletion,
    rf"(?P<value>(pid\d+|id){_SUFFIX})@error": lambda match: ValueDescription(
        f"estimated bound of the error of {match['value']} from steps that were not evaluated", "[0, inf)"
    ),
    r"fill_probability": ValueDescription("{quantity} of the class on the bare fill, where insertion starts", "[0, 1]"),
    r"mass": ValueDescription("share of the map's positive values inside the mask or box", "[0, 1]", "high"),
    r"rank": ValueDescription(
        "share of the highest pixels, as many as the mask or box has, that lie inside it", "[0, 1]", "high"
    ),
    r"pointing": ValueDescription("1 where the map's maximum lies inside the mask or box, else 0", "[0, 1]", "high"),
    r"auroc": ValueDescription(
        "probability that a pixel inside the mask or box is higher than one outside; chance gets 0.5", "[0, 1]", "high"
    ),
    r"iou": ValueDescription(
        "intersection over union of the mask or box and the pixels above Otsu's threshold", "[0, 1]", "high"
    ),
    r"topk_localisation": ValueDescription(
        "intersection over union of the mask or box and as many of the highest pixels as it has", "[0, 1]", "high"
    ),
    r"completeness": ValueDescription(
        "relative gap between the map's sum and what the class's logit loses on the bare fill", "[0, inf)", "low"
    ),
    r"sensitivity_n": ValueDescription(
        "correlation, over random sets of patches, of the map's sum with what the class's logit loses without them",
        "[-1, 1]",
        "high",
    ),
    r"mufidelity": ValueDescription(
        "correlation, over random sets of a grid's cells, of the map's sum with what the class's logit loses without "
        "them",
        "[-1, 1]",
        "high",
    ),
    r"infidelity": ValueDescription(
        "mean squared gap, over random sets of patches, between the map's scaled sum and what the class's logit loses",
        "[0, inf)",
        "low",
    ),
    r"(?P<which>max|avg)_sensitivity": lambda match: ValueDescription(
        f"{'largest' if match['which'] == 'max' else 'mean'} relative change of the map under small noise",
        "[0, inf)",
        "low",
    ),
    r"irof": ValueDescription(
        "area over the curve of the class's probability, relative to the whole picture's, while superpixels are "
        "removed, highest of the map first",
        "(-inf, 1]",
        "high",
    ),
    r"road": ValueDescription(
        "half the difference of the class's probability without the least and without the most relevant pixels, which "
        "become means of their neighbours; a map without information gets 0",
        "[-0.5, 0.5]",
        "high",
    ),
    r"random_logit": ValueDescription("rank correlation of the map with that of another class", "[-1, 1]", "low"),
    r"errors_id": ValueDescription("the value id, by which failures are chosen", "[-1, 1]", "high"),
    r"errors_coverage": ValueDescription("share of the mask or box that the map's area covers", "[0, 1]"),
    r"errors_outside": ValueDescription("share of the map's area outside of the mask or box", "[0, 1]"),
    r"errors_mass": ValueDescription("share of the map's positive values inside the mask or box", "[0, 1]", "high"),
    r"average_drop": ValueDescription(
        "loss of the class's probability, in percent, when the picture is multiplied by its map", "[0, 100]", "low"
    ),
    r"percent_increase": ValueDescription(
        "100 where the class's probability rises when the picture is multiplied by its map, else 0", "[0, 100]", "high"
    ),
    r"adcc": ValueDescription("harmonic mean of kept probability, coherency and 1 - complexity", "[0, 1]", "high"),
    r"adcc_coherency": ValueDescription(
        "(1 + correlation) / 2 of the map and the map of the picture multiplied by it", "[0, 1]", "high"
    ),
    r"adcc_complexity": ValueDescription("mean of the map, scaled to [0, 1]", "[0, 1]", "low"),
    r"pctin(_(?P<form>prob|logit|ratio))?(?P<percent>\d+)": _percentage_in,
    r"randomisation": ValueDescription(
        "rank correlation of the map with that of a copy of the network with random weights", "[-1, 1]", "low"
    ),
    r"mprt_layers": ValueDescription(
        "area under the curve of the map's rank correlation with those of copies of the network whose layers get "
        "random weights from the last to the first",
        "[-1, 1]",
        "low",
    ),
    r"smprt": ValueDescription(
        "rank correlation of the map with that of a copy of the network with random weights, both means over noisy "
        "pictures",
        "[-1, 1]",
        "low",
    ),
    r"emprt": ValueDescription(
        "relative rise of the entropy of the map's values on a copy of the network with random weights",
        "[-1, inf)",
        "high",
    ),
    r"sparseness": ValueDescription("Gini index of the map's absolute values; 0 for an even map", "[0, 1)"),
    r"scene(?P<logit>_logit)?(?P<top>_top)?(?P<shapley>@shapley)?": _scene,
    # Of detectors.
    r"similarity": ValueDescription(
        "cosine between the maps for the detected class and for the next probable one", "[-1, 1]", "low"
    ),
    r"confidence": ValueDescription(
        "probability of the detected class while the most supporting patches are removed", "[0, 1]", "low"
    ),
    r"shift_(?P<coordinate>cx|cy|w|h)": _detection_shift,
    # Of the model.
    r"loss": ValueDescription("the training objective", "[0, inf)", "low"),
    r"main_loss": ValueDescription("classification loss of the perception branch", "[0, inf)", "low"),
    r"branch_loss": ValueDescription("classification loss of the attention branch", "[0, inf)", "low"),
    r"kl": ValueDescription("divergence of the prediction for the most salient pixels alone", "[0, inf)", "low"),
    r"map_distance": ValueDescription("1 - correlation of the attention map and its teacher's", "[0, 2]", "low"),
    r"map_mean": ValueDescription("mean of the attention map", "[0, 1]"),
    r"classification": ValueDescription("loss of the boxes' classes", "[0, inf)", "low"),
    r"localisation": ValueDescription("loss of the boxes' coordinates", "[0, inf)", "low"),
    r"accuracy": ValueDescription("share of correct predictions", "[0, 1]", "high"),
    r"top(?P<k>\d+)_error": lambda match: ValueDescription(
        f"share of samples whose class is not among the {match['k']} most probable ones", "[0, 1]", "low"
    ),
    r"brier_skill": ValueDescription(
        "1 - Brier score / that of always forecasting the class frequencies, which gets 0", "(-inf, 1]", "high"
    ),
    r"tss": ValueDescription("hit rate minus false alarm rate; chance gets 0", "[-1, 1]", "high"),
    r"(?P<value>tss|brier_skill)_(?P<end>low|high)": lambda match: ValueDescription(
        f"{'lower' if match['end'] == 'low' else 'upper'} bound of the 95 % interval of {match['value']}"
    ),
    r"map50": ValueDescription(
        "mean over classes of the average precision of boxes that overlap by at least a half", "[0, 1]", "high"
    ),
    r"ap50_(?P<name>.+)": lambda match: ValueDescription(f"average precision of {match['name']}", "[0, 1]", "high"),
}
"""Regular expression of a value's name -> its description, or a function of the match that gives it."""

_OF_QUANTITY = r"(id|(pid|insertion|deletion)\d+)(@\w+)?|fill_probability"
"""Names of the values that have the range of the perturbed outputs: [0, 1] for probabilities, none for logits."""


def own_description(name: str, quantity: str = "probability") -> ValueDescription | None:
    """The description of a value of this project, or None for another name.

    Args:
        name: name of the value in tables, such as `pid16`, or of a figure of the model, such as `accuracy`.
        quantity: what insertion and deletion curves show, `probability` or `logit`.

    Example:
        >>> own_description("pid16").reading
        'range [-1, 1], higher is better'
    """
    for pattern, found in DESCRIPTIONS.items():
        if match := re.fullmatch(pattern, name):
            description = found if isinstance(found, ValueDescription) else found(match)
            return _of_quantity(description, name, quantity)
    return None


def _of_quantity(description: ValueDescription, name: str, quantity: str) -> ValueDescription:
    if not re.fullmatch(_OF_QUANTITY, name):
        return description
    meaning = description.meaning.replace("{quantity}", quantity)
    return replace(description, meaning=meaning, range=description.range if quantity == "probability" else "")
