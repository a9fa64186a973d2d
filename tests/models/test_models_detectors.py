"""Default boxes, decoding and the trunk of SSD300, against torchvision's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList

from labn.models.detectors import (
    Detections,
    Layout,
    Predictions,
    Thresholds,
    TorchvisionSSD,
    Unit,
    corners,
    decode_boxes,
    detect,
    detector_of,
    ssd300,
)

SSD300 = Layout(((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)), (4, 6, 6, 6, 4, 4))


def test_ssd300_has_the_published_numbers_of_default_boxes():
    assert SSD300.starts == (0, 5776, 7942, 8542, 8692, 8728, 8732)
    assert SSD300.unit(0) == Unit(0, 0, 0, 0)
    assert SSD300.unit(5776 + 6 * 20 + 5) == Unit(1, 1, 1, 5)
    assert SSD300.unit(8731) == Unit(5, 0, 0, 3)


@settings(max_examples=40)
@given(st.integers(0, 8731))
def test_index_of_a_default_box_and_its_unit_are_inverse(prior):
    assert SSD300.prior(SSD300.unit(prior)) == prior


@pytest.mark.parametrize("prior", [-1, 8732])
def test_a_default_box_that_does_not_exist_raises(prior):
    with pytest.raises(IndexError, match="8732"):
        SSD300.unit(prior)


def slim(num_classes: int = 5) -> TorchvisionSSD:
    torch.manual_seed(0)
    return ssd300(num_classes, width=1 / 16).eval()


@pytest.fixture(scope="module")
def scene():
    detector = slim()
    images = torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return detector, images, detector(images)


def test_predictions_follow_the_order_of_the_default_boxes(scene):
    detector, images, predictions = scene
    layout = detector.layout(predictions.grids)
    assert layout == SSD300
    with torch.no_grad():
        maps = list(detector.model.backbone(images).values())
        heads = detector.heads()
        for prior in (0, 3001, 5775, 5776, 7000, 8000, 8600, 8700, 8731):
            unit = layout.unit(prior)
            classes = detector.get_submodule(heads[unit.source].classification)(maps[unit.source])
            offsets = detector.get_submodule(heads[unit.source].localisation)(maps[unit.source])
            channels = classes[:, unit.box * 5 : unit.box * 5 + 5, unit.row, unit.column]
            torch.testing.assert_close(channels, predictions.classes[:, prior])
            torch.testing.assert_close(
                offsets[:, unit.box * 4 : unit.box * 4 + 4, unit.row, unit.column], predictions.offsets[:, prior]
            )


def test_detections_equal_torchvisions_and_have_their_default_box(scene):
    detector, images, predictions = scene
    model = detector.model
    anchors = model.anchor_generator(ImageList(images, [(300, 300)] * 2), list(model.backbone(images).values()))
    heads = {"cls_logits": predictions.classes, "bbox_regression": predictions.offsets}
    with torch.no_grad():
        expected = model.postprocess_detections(heads, anchors, [(300, 300)] * 2)
    found = detect(detector, predictions, (300, 300))
    boxes = corners(
        decode_boxes(predictions.offsets, detector.default_boxes((300, 300), predictions.grids, images))
    ).clamp(0, 300)
    for b, (mine, theirs) in enumerate(zip(found, expected)):
        torch.testing.assert_close(mine.boxes, theirs["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine.scores, theirs["scores"])
        assert mine.labels.tolist() == theirs["labels"].tolist()
        assert len(mine) == 200
        torch.testing.assert_close(mine.boxes, boxes[b, mine.priors])
        probabilities = predictions.classes[b].softmax(-1)
        torch.testing.assert_close(mine.scores, probabilities[mine.priors, mine.labels])


def test_an_image_without_detections_gives_an_empty_result(scene):
    detector, _, predictions = scene
    for found in detect(detector, predictions, (300, 300), Thresholds(score=1.0)):
        assert isinstance(found, Detections)
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)


def test_positive_offsets_move_right_down_and_make_wider_taller():
    default = torch.tensor([[10.0, 20.0, 8.0, 4.0]])
    decoded = decode_boxes(torch.tensor([[1.0, 2.0, 5.0, -5.0]]), default)
    expected = torch.tensor([[10 + 0.1 * 8, 20 + 0.2 * 4, 8 * torch.e, 4 / torch.e]])
    torch.testing.assert_close(decoded, expected)


@pytest.mark.slow
def test_width_one_is_the_network_of_torchvision():
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4).eval()
    own = ssd300(4).eval()
    own.model.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 300, 300) * 50
    with torch.no_grad():
        expected = [*theirs.backbone(images).values()]
        got = [*own.model.backbone(images).values()]
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_losses_equal_those_of_torchvision(scene):
    detector, images, predictions = scene
    boxes = [torch.tensor([[20.0, 30.0, 150.0, 160.0], [5.0, 5.0, 40.0, 60.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([1, 3]), torch.zeros(0, dtype=torch.int64)]
    detector.model.train()
    with torch.no_grad():
        model = detector.model
        model.transform.image_mean, model.transform.image_std = [0.0] * 3, [1.0] * 3
        expected = model(list(images), [{"boxes": b, "labels": k} for b, k in zip(boxes, labels)])
    detector.model.eval()
    got = detector.losses(predictions, (300, 300), boxes, labels)
    assert float(got["classification"]) == pytest.approx(float(expected["classification"]), rel=1e-5)
    assert float(got["localisation"]) == pytest.approx(float(expected["bbox_regression"]), rel=1e-5)


def test_ssdlite_can_be_wrapped():
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    detector = detector_of(model)
    images = torch.randn(1, 3, 320, 320)
    with torch.no_grad():
        predictions = detector(images)
    layout = detector.layout(predictions.grids)
    assert layout.starts[-1] == predictions.classes.shape[1] == 3234
    assert detector.heads()[0].classification == "model.head.classification_head.module_list.0.1"
    assert isinstance(predictions, Predictions)


def test_a_network_that_is_not_a_detector_raises():
    with pytest.raises(TypeError, match=r"Linear is not a detector.*Detector"):
        detector_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="class_names has 1 names for 5 classes"):
        TorchvisionSSD(slim().model, ("background",))
    named = TorchvisionSSD(slim(3).model, ("background", "cat", "dog"))
    assert named.class_index("dog") == 2
    for wrong in ("cow", 3, -1):
        with pytest.raises(ValueError, match=r"not one of the detector's 3 classes \(background, cat, dog\)"):
            named.class_index(wrong)
