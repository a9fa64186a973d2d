"""The scores of a detector's explanations: CRP against plain relevance propagation and against chance."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_area

from labn.errors import InputError
from labn.explainers.relevance.crp import CRP, Question
from labn.explainers.relevance.detection_trace import DetectionTrace
from labn.metrics.functional.detection import FRACTIONS, RemovalCurves, map_similarity, removal_curves
from labn.metrics.functional.localisation import boxes_to_masks, relevance_mass
from labn.models.detectors import COORDINATES, Detections
from labn.perturbation.stateless_random import sample_uniform


class Score(NamedTuple):
    """One value: which detection of the image, which method, which measure."""

    detection: int
    explainer: str
    metric: str
    value: float


@dataclass(frozen=True)
class DetectionScores:
    """Measures the maps of detections.

    - `similarity`: cosine of the maps for the detected class and for the next most probable object class; lower is more
      discriminative. The contrasts of all K classes add up to zero, so that those of `crp` have -1 / (K - 1) where they
      have nothing else in common: -1 for two classes, whatever the network.
    - `mass`: share of positive relevance inside the detected box.
    - `confidence`: probability of the class, averaged while the most supporting patches are removed (5 to 40 % of the
      box's area, wherever they lie); lower is better.
    - `shift_<coordinate>`: how far the coordinate moves while the patches are removed that support right/down/wider/
      taller most (in default-box sizes, or as log of the size).
    - `shift_<coordinate>` of `-crp`: the same for the patches that contradict most.

    Explainers are `crp`, `lrp` (alpha1-beta0 without contrast), `random` and, for the shifts, `-crp`. Boxes move
    whatever is removed, so that a shift means something beside that of `random` only: the map means what it says if
    that of `crp` lies below it and that of `-crp` above.

    Args:
        fractions: of the detected box's area, see `removal_curves`; removed pixels show the mean colour.
        patch_size, chunk_size: see `removal_curves`.
        seed: of the random maps.
    """

    fractions: Sequence[float] = FRACTIONS
    patch_size: int = 4
    chunk_size: int | None = None
    seed: int = 0

    def __call__(self, crp: CRP, trace: DetectionTrace, found: Detections, index: int = 0) -> list[Score]:
        """All scores of the detections of one image; none for no detection.

        Args:
            crp: with its class contrast on; the shifts are of its maps for right/down/wider/taller, whatever its
                `direction`.
            trace: of the image.
            found: the detections to score.
            index: of the image in its data set, the source of the random maps.

        Raises:
            ValueError: `crp` has no class contrast.
        """
        check_contrast(crp)
        if not len(found):
            return []
        return [*self._classes(crp, trace, found, index), *self._coordinates(crp, trace, found)]

    def _classes(self, crp: CRP, trace: DetectionTrace, found: Detections, index: int) -> Iterator[Score]:
        priors, labels = found.priors.tolist(), found.labels.tolist()
        boxes = boxes_to_masks(found.boxes[:, None].to(trace.image.device), trace.size)
        other = [runner_up(trace, p, k) for p, k in zip(priors, labels)]
        maps: dict[str, Tensor] = {}
        for name, method in (("crp", crp), ("lrp", without_contrast(crp))):
            own, rival = (
                method.ask(trace, [Question(p, "class", k) for p, k in zip(priors, classes)]).maps
                for classes in (labels, other)
            )
            maps[name] = own
            yield from _rows(name, "similarity", map_similarity(own, rival))
            yield from _rows(name, "mass", relevance_mass(own, boxes))
        numbers = torch.arange(len(priors), device=own.device) + 1000 * index
        noise = sample_uniform(self.seed, numbers, own[0].numel(), torch.float32).view_as(own)
        for name, heat in (*maps.items(), ("random", noise)):
            curves = self._curves(trace, heat, found)
            yield from _rows(name, "confidence", curves.mean_confidence())
        for task, shifts in zip(COORDINATES, curves.mean_shifts().T):
            yield from _rows("random", f"shift_{task}", shifts)

    def _coordinates(self, crp: CRP, trace: DetectionTrace, found: Detections) -> Iterator[Score]:
        method = positive(crp)
        for number, task in enumerate(COORDINATES):
            maps = method.ask(trace, [Question(p, task) for p in found.priors.tolist()]).maps
            for name, heat in (("crp", maps), ("-crp", -maps)):
                curves = self._curves(trace, heat, found)
                yield from _rows(name, f"shift_{task}", curves.mean_shifts()[:, number])

    def _curves(self, trace: DetectionTrace, maps: Tensor, found: Detections) -> RemovalCurves:
        return removal_curves(
            trace.detector,
            trace.image,
            maps,
            found.priors.tolist(),
            found.labels.tolist(),
            self.fractions,
            (box_area(found.boxes) / math.prod(trace.size)).double().cpu(),
            patch_size=self.patch_size,
            chunk_size=self.chunk_size,
        )


def similarity_by_layer(crp: CRP, trace: DetectionTrace, prior: int, labels: tuple[int, int]) -> dict[str, float]:
    """How alike the relevance of two classes is at the input of every convolution, from the head down to the pixels.

    Under plain propagation the difference between classes fades from layer to layer; under the contrast it stays
    (CRP, IJCNN 2019).

    Args:
        crp: with the contrast, or `without_contrast`.
        trace: of an image.
        prior: the default box.
        labels: two class channels.

    Returns:
        Module name -> cosine of the two relevances at its input, top layer first; `pixels` last.
    """
    starts = [crp.start(trace, Question(prior, "class", label)) for label in labels]
    top = starts[0].window.value
    graph = trace.trace.graph
    reached = graph.reach({top})
    names = {n.inputs[0]: n.call.module for n in graph.nodes.values() if n.kind == "linear" and n.index in reached}
    layers = [index for index in sorted(names, reverse=True) if 0 < index < top]
    found = {"head": map_similarity(*(s.relevance[None] for s in starts))}
    found |= {names[index]: map_similarity(*trace.maps(starts, until=index).split(1)) for index in layers}
    found["pixels"] = map_similarity(*trace.maps(starts).split(1))
    return {name: float(value) for name, value in found.items()}


def _rows(explainer: str, metric: str, values: Tensor) -> Iterator[Score]:
    for number, value in enumerate(values.tolist()):
        yield Score(number, explainer, metric, value)


def without_contrast(crp: CRP) -> CRP:
    """The same explainer as plain alpha1-beta0 propagation."""
    plain = copy.copy(crp)
    plain.contrast_at = "none"
    return plain


def positive(crp: CRP) -> CRP:
    """The same explainer asked for right, down, wider and taller."""
    turned = copy.copy(crp)
    turned.direction = "positive"
    return turned


def check_contrast(crp: CRP) -> None:
    """Refuse an explainer without contrast, whose rows `crp` and `lrp` would be the same.

    Raises:
        ValueError: it has none.
    """
    if crp.contrast_at == "none":
        raise InputError(
            "contrast_at of crp is 'none', so the rows crp and lrp would be identical; set it to source or output, or "
            "leave scores out."
        )


def runner_up(trace: DetectionTrace, prior: int, label: int) -> int:
    """The most probable object class of a default box other than `label` (the background where there is no other)."""
    logits = trace.predictions.classes[0, prior].clone()
    logits[label] = -torch.inf
    background = trace.detector.background
    if background is not None and len(logits) > 2:
        logits[background] = -torch.inf
    return int(logits.argmax())
