"""Scores of a detector's maps: removal curves by hand, and what the names promise."""

from __future__ import annotations

import math

import pytest
import torch
from small_detectors import TinySSD, picture, tiny
from torch import nn

from labn.explainers import CRP
from labn.explainers.relevance.crp import Question
from labn.metrics.detection import DetectionScores, runner_up, similarity_by_layer, without_contrast
from labn.metrics.functional.detection import map_similarity, removal_curves
from labn.models.detectors import COORDINATES, Unit


class Brightness(TinySSD):
    """Every default box has the class logits (0, s, 0, 0) and the offsets (s, -s, 2s, 0), s the mean of the image."""

    def forward(self, images):
        predictions = super().forward(images)
        mean = images.mean((1, 2, 3))[:, None, None]
        predictions.classes.mul_(0).add_(mean * torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=images.dtype))
        predictions.offsets.mul_(0).add_(mean * torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=images.dtype))
        return predictions


def test_map_similarity_is_the_cosine():
    a = torch.tensor([[[1.0, 0.0]], [[1.0, -1.0]], [[0.0, 0.0]]])
    b = torch.tensor([[[0.0, 2.0]], [[-3.0, 3.0]], [[1.0, 0.0]]])
    assert map_similarity(a, b).tolist() == pytest.approx([0.0, -1.0, 0.0])


def test_removal_curves_equal_forwards_of_images_masked_by_hand():
    """Removing a quarter of a constant image of value 4 takes a quarter of its mean away, whichever patches go."""
    detector = Brightness().double().eval()
    image = torch.full((1, 3, 32, 32), 4.0, dtype=torch.float64)
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curves = removal_curves(detector, image, maps, [5, 140], [1, 0], fractions=(0, 0.25, 0.5))
    means = [4.0, 3.0, 2.0]
    assert curves.confidence[0].tolist() == pytest.approx([math.exp(s) / (math.exp(s) + 3) for s in means])
    assert curves.confidence[1].tolist() == pytest.approx([1 / (math.exp(s) + 3) for s in means])
    expected = [[0, 0, 0, 0], [-0.1, 0.1, -0.4, 0], [-0.2, 0.2, -0.8, 0]]
    assert curves.shifts[0].tolist() == [pytest.approx(row) for row in expected]
    assert curves.mean_confidence()[1] == pytest.approx(curves.confidence[1, 1:].mean())
    assert curves.mean_shifts()[0].tolist() == pytest.approx([-0.15, 0.15, -0.6, 0])


def test_removed_pixels_are_a_share_of_each_detections_area():
    detector = Brightness().double().eval()
    image = torch.full((1, 3, 32, 32), 4.0, dtype=torch.float64)
    areas = torch.tensor([1.0, 0.5], dtype=torch.float64)
    curves = removal_curves(detector, image, torch.ones(2, 32, 32), [5, 5], [1, 1], (0, 0.25, 0.5), areas)
    assert curves.shifts[:, :, 0].flatten().tolist() == pytest.approx([0, -0.1, -0.2, 0, -0.05, -0.1])


def test_removal_starts_with_the_highest_patches():
    detector = Brightness().double().eval()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    image[:, :, :4, :4] = 64.0
    heat = torch.zeros(32, 32, dtype=torch.float64)
    heat[0, 0] = 1.0
    maps = torch.stack([heat, -heat])
    curves = removal_curves(detector, image, maps, [0, 0], [1, 1], fractions=(0, 1 / 64, 0.5))
    assert curves.shifts[0, 1, 0] == pytest.approx(-0.1)
    assert curves.shifts[1, :, 0].tolist() == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0, 0), (0,), (0, 2)])
def test_fractions_must_start_at_zero_and_ascend(fractions):
    with pytest.raises(ValueError, match="fractions must start with 0 and ascend"):
        removal_curves(tiny(), picture(tiny()), torch.zeros(1, 32, 32), [0], [1], fractions)


def test_detection_scores_cover_all_explainers_and_measures():
    detector = tiny(dtype=torch.float32)
    crp = CRP()
    trace = crp.trace(detector, picture(detector, dtype=torch.float32))
    found = trace.detections(crp.thresholds).best(2)
    scores = DetectionScores(fractions=(0, 0.1), seed=3)(crp, trace, found, index=7)
    names = {(s.explainer, s.metric) for s in scores}
    shifts = {(e, f"shift_{c}") for e in ("crp", "-crp", "random") for c in COORDINATES}
    plain = {(e, m) for e in ("crp", "lrp") for m in ("similarity", "mass", "confidence")}
    assert names == shifts | plain | {("random", "confidence")}
    assert len(scores) == 2 * len(names)
    assert {s.detection for s in scores} == {0, 1}
    assert all(math.isfinite(s.value) for s in scores)
    assert scores == DetectionScores(fractions=(0, 0.1), seed=3)(crp, trace, found, index=7)
    assert DetectionScores()(crp, trace, found.best(0)) == []


@pytest.mark.parametrize("direction", ["negative", "predicted"])
def test_shifts_do_not_depend_on_the_direction_of_crp(direction):
    detector = tiny(dtype=torch.float32)
    image = picture(detector, dtype=torch.float32)
    scores = DetectionScores(fractions=(0, 0.1))
    trace = CRP().trace(detector, image)
    found = trace.detections(CRP().thresholds).best(3)
    assert bool((trace.predictions.offsets[0, found.priors] < 0).any())
    turned = CRP(direction=direction)
    assert scores(turned, turned.trace(detector, image), found) == scores(CRP(), trace, found)
    assert turned.direction == direction


def test_scores_of_crp_without_contrast_are_refused():
    detector = tiny(dtype=torch.float32)
    crp = CRP(contrast_at="none")
    trace = crp.trace(detector, picture(detector, dtype=torch.float32))
    with pytest.raises(ValueError, match="contrast_at of crp is 'none', so the rows crp and lrp would be identical"):
        DetectionScores()(crp, trace, trace.detections(crp.thresholds).best(0))


def test_without_contrast_copies_the_explainer():
    crp = CRP(others=2, first_layer="flat")
    plain = without_contrast(crp)
    assert (plain.contrast_at, plain.others, plain.config) == ("none", 2, crp.config)
    assert crp.contrast_at == "source"


def test_similarity_by_layer_starts_at_the_head_and_ends_at_the_pixels():
    detector = tiny()
    crp = CRP()
    trace = crp.trace(detector, picture(detector))
    found = similarity_by_layer(crp, trace, 150, (1, 2))
    assert list(found) == ["head", "high.0", "low.3", "pixels"]
    maps = [crp.start(trace, Question(150, "class", k)) for k in (1, 2)]
    assert found["head"] == pytest.approx(float(map_similarity(*(m.relevance[None] for m in maps))))
    pixels = trace.maps(maps)
    assert found["pixels"] == pytest.approx(float(torch.cosine_similarity(*pixels.flatten(1), dim=0)))
    plain = similarity_by_layer(without_contrast(crp), trace, 150, (1, 2))
    assert plain["pixels"] > plain["head"]
    assert plain["pixels"] > found["pixels"]


def test_runner_up_is_another_object_class():
    detector = tiny(dtype=torch.float32)
    crp = CRP()
    trace = crp.trace(detector, picture(detector, dtype=torch.float32))
    logits = trace.predictions.classes[0, 9].tolist()
    best = max((1, 2, 3), key=lambda k: logits[k])
    assert runner_up(trace, 9, best) == max({1, 2, 3} - {best}, key=lambda k: logits[k])
    pair = tiny(2, dtype=torch.float32)
    assert runner_up(crp.trace(pair, picture(pair, dtype=torch.float32)), 9, 1) == 0


def test_removal_of_pixels_for_right_moves_a_linear_detector_left():
    """One positive and one negative patch of evidence: the claim of the localisation rule, where it must hold."""
    detector = tiny()
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.abs_()
        side = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
        for head in detector.locate:
            head.weight.copy_(head.weight * side)  # evidence on the left of the window pushes right
    image = picture(detector).abs()
    crp = CRP()
    trace = crp.trace(detector, image)
    prior = trace.layout.prior(Unit(source=0, row=4, column=4, box=0))
    heat = crp.ask(trace, [Question(prior, "cx")]).maps
    supports = removal_curves(detector, image, heat, [prior], [1], (0, 0.02, 0.05))
    contradicts = removal_curves(detector, image, -heat, [prior], [1], (0, 0.02, 0.05))
    assert float(supports.mean_shifts()[0, 0]) < 0
    assert float(contradicts.mean_shifts()[0, 0]) > 0
