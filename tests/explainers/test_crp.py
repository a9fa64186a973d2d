"""CRP in use: many questions about one trace, own and torchvision's detectors, and errors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from small_detectors import TinySSD, picture, slim, tiny
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from labn import evaluate, explain
from labn.explainers import CRP
from labn.explainers.relevance.crp import TASKS, Answers, Question
from labn.lrp import ConservationReport
from labn.models.detectors import COORDINATES, TorchvisionSSD
from labn.modules import SSD

QUESTIONS = [Question(p, t, k) for p, k in ((3, 1), (150, 2), (70, 3)) for t in TASKS]


def test_maps_of_many_questions_do_not_depend_on_the_chunk_size():
    detector = tiny()
    crp = CRP()
    trace = crp.trace(detector, picture(detector))
    together = crp.ask(trace, QUESTIONS)
    assert isinstance(together, Answers)
    assert together.maps.shape == (15, 32, 32)
    assert together.questions == tuple(QUESTIONS)
    singles = torch.cat([crp.ask(trace, [q]).maps for q in QUESTIONS])
    scale = float(singles.abs().max())
    torch.testing.assert_close(together.maps, singles, rtol=1e-7, atol=1e-9 * scale)
    for size in (1, 4, 100):
        other = CRP(chunk_size=size)
        torch.testing.assert_close(other.ask(trace, QUESTIONS).maps, singles, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize(("classify", "locate"), [(3, 1), (1, 3), (3, 5)])
def test_class_and_coordinate_heads_may_have_different_kernels(classify, locate):
    detector = TinySSD()
    for heads, side in ((detector.classify, classify), (detector.locate, locate)):
        for n, head in enumerate(heads):
            heads[n] = torch.nn.Conv2d(head.in_channels, head.out_channels, side, padding=side // 2, bias=False)
    detector = detector.double().eval()
    crp = CRP(chunk_size=100)
    trace = crp.trace(detector, picture(detector))
    singles = torch.cat([crp.ask(trace, [q]).maps for q in QUESTIONS])
    torch.testing.assert_close(crp.ask(trace, QUESTIONS).maps, singles, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(crp.ask(trace, QUESTIONS[::-1]).maps, singles.flip(0), rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_maps_with_batchnorm_equal_maps_of_the_folded_network():
    """A network with BatchNorm gets the maps of the same network with BatchNorm folded into its convolutions."""
    normed, plain = slim(batchnorm=True), slim()
    for module in normed.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    convolutions = [[m for m in d.modules() if isinstance(m, torch.nn.Conv2d)] for d in (normed, plain)]
    norms = [m for m in normed.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for i, (source, goal) in enumerate(zip(*convolutions)):
            if i < len(norms):
                scale = norms[i].weight / (norms[i].running_var + norms[i].eps).sqrt()
                goal.weight.copy_(source.weight * scale[:, None, None, None])
                goal.bias.copy_((source.bias - norms[i].running_mean) * scale + norms[i].bias)
            else:
                goal.load_state_dict(source.state_dict())
    image = picture(plain)
    crp = CRP()
    maps = [
        crp.ask(crp.trace(d, image), [Question(3000, "class", 1), Question(6000, "cy")]).maps for d in (normed, plain)
    ]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-5, atol=1e-9)


def test_the_call_explains_the_best_detection_of_the_class():
    detector = tiny()
    image = picture(detector)
    crp = CRP(task="w")
    trace = crp.trace(detector, image)
    found = trace.detections(crp.thresholds)
    label = int(found.labels[0])
    expected = crp.ask(trace, [Question(int(found.priors[0]), "w", label)]).maps
    result = explain(detector, image, method=crp)
    assert result.targets.tolist() == [label]
    torch.testing.assert_close(result.maps, expected.float())
    named = explain(detector, image, method="crp", targets=label, contrast_at="none")
    assert float(named.maps.min()) >= 0


def test_the_negated_method_chooses_the_class_that_the_method_chooses():
    detector = tiny()
    image = picture(detector)
    plain, negated = explain(detector, image, "crp"), explain(detector, image, "-crp")
    assert torch.equal(negated.targets, plain.targets)
    torch.testing.assert_close(negated.maps, -plain.maps)


def test_a_question_without_class_asks_for_the_prediction():
    detector = tiny()
    crp = CRP()
    trace = crp.trace(detector, picture(detector))
    predicted = int(trace.predictions.classes[0, 40, 1:].argmax()) + 1
    maps = crp.ask(trace, [Question(40), Question(40, "class", predicted)]).maps
    assert torch.equal(maps[0], maps[1])


def test_no_detection_is_an_empty_result():
    detector = tiny(dtype=torch.float32)
    image = picture(detector, dtype=torch.float32)
    crp = CRP(score_threshold=1.0)
    trace = crp.trace(detector, image)
    assert len(trace.detections(crp.thresholds)) == 0
    assert crp.ask(trace, []).maps.shape == (0, 32, 32)
    assert float(crp(detector, image, torch.tensor([1])).abs().max()) == 0
    assert explain(detector, image, method=crp).targets.tolist() == [0]


def test_unknown_boxes_classes_and_tasks_are_refused():
    detector = tiny(dtype=torch.float32)
    crp = CRP()
    trace = crp.trace(detector, picture(detector, dtype=torch.float32))
    with pytest.raises(ValueError, match="class 4 is not one of the detector's 4 classes"):
        crp.ask(trace, [Question(0, "class", 4)])
    with pytest.raises(ValueError, match="class 'cat' is not one of"):
        crp.ask(trace, [Question(0, "class", "cat")])
    with pytest.raises(IndexError, match="default box 160 does not exist: the detector has 160"):
        crp.ask(trace, [Question(160)])
    with pytest.raises(ValueError, match="task is 'left'; it must be one of class, cx, cy, w, h"):
        crp.ask(trace, [Question(0, "left")])
    with pytest.raises(ValueError, match="leaves a class without any other class"):
        CRP(others=[1]).ask(trace, [Question(0, "class", 1)])
    with pytest.raises(TypeError, match=r"SSD is not a detector; .* or the `network` of labn.modules.SSD"):
        crp.trace(SSD(num_classes=2, width=1 / 16), torch.zeros(3, 300, 300))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got -1"):
        CRP(chunk_size=-1)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        trace.maps([crp.start(trace, Question(0))], chunk_size=0)
    with pytest.raises(TypeError, match="Linear is not a detector"):
        crp.trace(torch.nn.Linear(1, 1), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="one image, got 2"):
        crp.trace(detector, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "left"}, "task is 'left'"),
        ({"contrast_at": "input"}, "contrast_at is 'input'; it must be one of source, output, none"),
        ({"localisation": "both"}, "localisation is 'both'"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"initial": 2}, "initial is 2"),
        ({"others": 0}, "others is 0; it must be 'all'"),
        ({"others": "most"}, "others is 'most'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CRP(**settings)


def test_targets_follow_the_contract_of_all_methods():
    detector, images = tiny(dtype=torch.float32), torch.rand(2, 3, 32, 32)
    detector.class_names = ("nothing", "cat", "dog", "cow")
    found = explain(detector, images, "crp", targets="dog", score_threshold=0.0)
    assert found.targets.tolist() == [2, 2]
    assert torch.equal(found.maps, explain(detector, images, "crp", targets=[2, 2], score_threshold=0.0).maps)
    for wrong in ([1.7, 2.2], [1, 2, 3]):
        with pytest.raises(ValueError, match="targets must be 2 class indices, one per image"):
            explain(detector, images, "crp", targets=wrong)
    with pytest.raises(ValueError, match="class 'bird' is not one of the detector's 4 classes"):
        explain(detector, images, "crp", targets="bird")


def test_a_default_box_and_a_class_may_be_tensors():
    detector = tiny(dtype=torch.float32)
    crp = CRP(score_threshold=0.0)
    trace = crp.trace(detector, picture(detector, dtype=torch.float32))
    found = trace.detections(crp.thresholds)
    given = crp.ask(trace, [Question(found.priors[0], "class", found.labels[0])]).maps
    assert torch.equal(given, crp.ask(trace, [Question(int(found.priors[0]), "class", int(found.labels[0]))]).maps)


def test_half_precision_images_are_explained_in_single_precision():
    detector = tiny(dtype=torch.bfloat16)
    image = picture(detector, dtype=torch.bfloat16)
    crp = CRP()
    single = crp.ask(crp.trace(detector.float(), image.float()), QUESTIONS).maps
    found = crp.ask(crp.trace(detector.bfloat16(), image), QUESTIONS).maps
    torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["gradcam", "gradient", "lrp", "rise"])
def test_methods_and_metrics_for_classifiers_refuse_a_detector(method):
    """The columns of all predictions are not classes."""
    detector, images = tiny(dtype=torch.float32), torch.rand(1, 3, 32, 32)
    for targets in (None, 2):
        with pytest.raises((TypeError, ValueError), match=r"TinySSD|Predictions"):
            explain(detector, images, method, targets)
    with pytest.raises(TypeError, match=r"returned Predictions; .* Detectors are explained by `crp`"):
        evaluate(detector, images, torch.rand(1, 32, 32), targets=[2], metrics=["pid16"])


def test_heads_that_do_not_fit_the_predictions_are_refused():
    detector = tiny(dtype=torch.float32)
    image = picture(detector, dtype=torch.float32)
    detector.heads = lambda: tuple(replace(h, boxes=3) for h in TinySSD.heads(detector))
    with pytest.raises(ValueError, match=r"TinySSD predicts 1280 values; .* 240 default boxes x \(4 classes"):
        CRP().trace(detector, image)
    detector.heads = lambda: tuple(replace(h, classification="low") for h in TinySSD.heads(detector))
    with pytest.raises(ValueError, match=r"heads\(\) names 'low', which must be a 2-D convolution"):
        CRP().trace(detector, image)


@pytest.mark.slow
def test_the_account_of_ssdlite_closes():
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    detector = TorchvisionSSD(model)
    crp = CRP()
    trace = crp.trace(detector, torch.randn(3, 320, 320))
    assert len(trace.detections(crp.thresholds))
    with pytest.warns(UserWarning, match="relevance arrives at the pixels"):
        answers = crp.ask(trace, [Question(0), Question(3, "cx")])
    assert answers.maps.shape == (2, 320, 320)
    assert answers.maps.flatten(1).any(1).all()
    assert answers.sums.abs().max() < 1e-6
    # Depthwise layers keep the relevance of units without positive contribution, of either sign.
    report = ConservationReport()
    trace._sweep([crp.start(trace, Question(0))], 0, report)
    kept = sum(entry.leaks for entry in report.entries)
    assert torch.allclose(answers.arrived[:1], answers.sums[:1] - kept, atol=1e-6)


def test_torchvisions_ssd_is_explained_without_an_adapter():
    detector = slim(num_classes=3, dtype=torch.float32)
    image = picture(detector, dtype=torch.float32)
    result = explain(detector.model, image, method="crp", targets=2, score_threshold=0.0)
    assert torch.equal(result.maps, explain(detector, image, method="crp", targets=2, score_threshold=0.0).maps)
    size = float(result.maps.double().abs().sum())
    assert size > 0
    assert abs(float(result.maps.double().sum())) < 1e-3 * size


def test_relevance_at_an_inner_layer_stays_inside_the_receptive_field():
    """The contrast is still zero-sum and as large at conv3 as at the head: signed shares do not cancel on the way."""
    detector = slim()
    crp = CRP()
    trace = crp.trace(detector, picture(detector))
    start = crp.start(trace, Question(3000, "class", 1))
    pool = next(n.index for n in trace.trace.graph.nodes.values() if n.call.module == "model.backbone.features.9")
    inner = trace.maps([start], until=pool)
    assert inner.shape[1:] == (8, 75, 75)
    assert abs(float(inner.sum())) < 1e-9
    assert set(COORDINATES) < set(TASKS)


def depthwise(weights):
    """The tiny detector with a depthwise convolution in place of its second one, whose weights are `weights`."""
    detector = tiny()
    detector.low[3] = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    detector.low.insert(4, torch.nn.Conv2d(6, 8, 1, bias=False))
    torch.nn.init.constant_(detector.low[4].weight, 1.0)
    with torch.no_grad():
        detector.low[3].weight.copy_(weights)
    return detector.double()


def test_answers_carry_the_relevance_that_arrives_at_the_pixels():
    """Channels without positive contribution keep their relevance, of the rivals more than of the class."""
    weights = torch.ones(6, 1, 3, 3)
    weights[:3] = -1.0
    detector = depthwise(weights)
    with torch.no_grad():
        detector.low[3].bias = torch.nn.Parameter(torch.full((6,), 1e3, dtype=torch.float64))
        detector.low[4].weight.copy_(torch.rand(8, 6, 1, 1, generator=torch.Generator().manual_seed(0)))
    crp = CRP(contrast_at="none")
    trace = crp.trace(detector, picture(detector))
    with pytest.warns(UserWarning, match=r"relevance arrives at the pixels of TinySSD; most is kept by 'low\.3'"):
        answers = crp.ask(trace, QUESTIONS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once per detector
        crp.ask(trace, QUESTIONS)
    assert answers.arrived.tolist() == pytest.approx([float(answers.maps.sum())])
    assert 0 < float(answers.arrived) < 0.95 * float(answers.sums)
