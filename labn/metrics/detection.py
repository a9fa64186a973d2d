"""Scores of a detector's explanations: CRP beside plain relevance propagation and random maps."""

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
    """One value of a detection.

    Attributes:
        detection: number of the detection in its image.
        explainer: `crp`, `-crp`, `lrp` or `random`.
        metric: name of the measure, see `DetectionScores`.
        value: the score.
    """

    detection: int
    explainer: str
    metric: str
    value: float


@dataclass(frozen=True)
class DetectionScores:
    """Scores of the maps of detections.

    - `similarity`: cosine of the maps for the detected class and for the next most probable object class; lower is more
      discriminative. The contrastive relevances of all K classes add up to zero, so that the expected value of `crp` is
      -1 / (K - 1) for classes without common evidence, and exactly -1 for two classes, whatever the network.
    - `mass`: share of positive relevance inside the detected box.
    - `confidence`: probability of the class, averaged over the removal of the most supporting patches (5 to 40 % of the
      box's area, anywhere in the image); lower is better.
    - `shift_<coordinate>`: mean change of the coordinate while the patches that most support right, down, wider or
      taller are removed (in default-box sizes, or as the logarithm of the size).
    - `shift_<coordinate>` of `-crp`: the same for the patches that contradict most.

    Explainers are `crp`, `lrp` (alpha1-beta0 without contrast), `random` and, for the shifts, `-crp`. A box moves
    whatever is removed, so that a shift is read against the one of `random`: a faithful map has a lower shift for
    `crp` and a higher one for `-crp`.

    Args:
        fractions: of the detected box's area, see `removal_curves`; removed pixels show the mean colour.
        patch_size: side of the patches in pixels, see `removal_curves`.
        chunk_size: images per forward.
        seed: seed of the random maps.
    """

    fractions: Sequence[float] = FRACTIONS
    patch_size: int = 4
    chunk_size: int | None = None
    seed: int = 0

    def __call__(self, crp: CRP, trace: DetectionTrace, detections: Detections, index: int = 0) -> list[Score]:
        """All scores of the detections of one image; an empty list without detections.

        Args:
            crp: explainer with class contrast. Shifts are scored with its maps for right, down, wider and taller,
                whatever its `direction`.
            trace: recorded forward of the image.
            detections: the detections to score.
            index: position of the image in its data set, which seeds the random maps.

        Raises:
            InputError: an explainer without class contrast.
        """
        check_contrast(crp)
        if not len(detections):
            return []
        return [*self._classes(crp, trace, detections, index), *self._coordinates(crp, trace, detections)]

    def _classes(self, crp: CRP, trace: DetectionTrace, detections: Detections, index: int) -> Iterator[Score]:
        priors, labels = detections.priors.tolist(), detections.labels.tolist()
        boxes = boxes_to_masks(detections.boxes[:, None].to(trace.image.device), trace.size)
        other = [runner_up(trace, p, k) for p, k in zip(priors, labels)]
        maps: dict[str, Tensor] = {}
        for name, method in (("crp", crp), ("lrp", without_contrast(crp))):
            own, rival = (
                method.ask(trace, [Question(p, "class", k) for p, k in zip(priors, classes)]).maps
                for classes in (labels, other)
            )
            maps[name] = own
            yield from _scores(name, "similarity", map_similarity(own, rival))
            yield from _scores(name, "mass", relevance_mass(own, boxes))
        # One stateless random map per detection; an image has fewer than 1000 detections, so that no seed repeats.
        numbers = torch.arange(len(priors), device=own.device) + 1000 * index
        noise = sample_uniform(self.seed, numbers, own[0].numel(), torch.float32).view_as(own)
        for name, heat in (*maps.items(), ("random", noise)):
            curves = self._curves(trace, heat, detections)
            yield from _scores(name, "confidence", curves.mean_confidence())
        # `curves` are now those of the last entry, the random maps.
        for task, shifts in zip(COORDINATES, curves.mean_shifts().T):
            yield from _scores("random", f"shift_{task}", shifts)

    def _coordinates(self, crp: CRP, trace: DetectionTrace, detections: Detections) -> Iterator[Score]:
        method = positive(crp)
        for number, task in enumerate(COORDINATES):
            maps = method.ask(trace, [Question(p, task) for p in detections.priors.tolist()]).maps
            for name, heat in (("crp", maps), ("-crp", -maps)):
                curves = self._curves(trace, heat, detections)
                yield from _scores(name, f"shift_{task}", curves.mean_shifts()[:, number])

    def _curves(self, trace: DetectionTrace, maps: Tensor, detections: Detections) -> RemovalCurves:
        return removal_curves(
            trace.detector,
            trace.image,
            maps,
            detections.priors.tolist(),
            detections.labels.tolist(),
            self.fractions,
            (box_area(detections.boxes) / math.prod(trace.size)).double().cpu(),
            patch_size=self.patch_size,
            chunk_size=self.chunk_size,
        )


def similarity_by_layer(crp: CRP, trace: DetectionTrace, prior: int, labels: tuple[int, int]) -> dict[str, float]:
    """Cosine similarity of the relevance of two classes at the input of every convolution, from the head to the pixels.

    Plain propagation makes the relevances of different classes more alike from layer to layer; contrastive propagation
    keeps them apart (CRP, IJCNN 2019).

    Args:
        crp: the explainer, or `without_contrast` of it.
        trace: recorded forward of an image.
        prior: number of the default box.
        labels: two class channels.

    Returns:
        Module name -> cosine of the two relevances at its input, top layer first; `pixels` last.
    """
    starts = [crp.start(trace, Question(prior, "class", label)) for label in labels]
    # Nodes behind the head's output in the graph receive no relevance; node 0, the image, is added last.
    top = starts[0].window.value
    graph = trace.trace.graph
    reached = graph.reach({top})
    names = {n.inputs[0]: n.call.module for n in graph.nodes.values() if n.kind == "linear" and n.index in reached}
    layers = [index for index in sorted(names, reverse=True) if 0 < index < top]
    similarities = {"head": map_similarity(*(s.relevance[None] for s in starts))}
    similarities |= {names[index]: map_similarity(*trace.maps(starts, until=index).split(1)) for index in layers}
    similarities["pixels"] = map_similarity(*trace.maps(starts).split(1))
    return {name: float(value) for name, value in similarities.items()}


def _scores(explainer: str, metric: str, values: Tensor) -> Iterator[Score]:
    for number, value in enumerate(values.tolist()):
        yield Score(number, explainer, metric, value)


def without_contrast(crp: CRP) -> CRP:
    """Copy of the explainer without contrast: plain alpha1-beta0 propagation."""
    # A shallow copy is enough, as only this attribute is replaced.
    plain = copy.copy(crp)
    plain.contrast_at = "none"
    return plain


def positive(crp: CRP) -> CRP:
    """Copy of the explainer that explains the coordinates towards right, down, wider and taller."""
    explainer = copy.copy(crp)
    explainer.direction = "positive"
    return explainer


def check_contrast(crp: CRP) -> None:
    """Raise InputError for an explainer without contrast: its scores as `crp` and as `lrp` would be equal."""
    if crp.contrast_at == "none":
        raise InputError(
            "contrast_at of crp is 'none', so the rows crp and lrp would be identical; set it to source or output, or "
            "leave scores out."
        )


def runner_up(trace: DetectionTrace, prior: int, label: int) -> int:
    """Most probable object class of a default box other than `label`; the background where there is no other class."""
    # A copy, as the trace's predictions serve all detections of the image.
    logits = trace.predictions.classes[0, prior].clone()
    logits[label] = -torch.inf
    background = trace.detector.background
    if background is not None and len(logits) > 2:
        logits[background] = -torch.inf
    return int(logits.argmax())
