"""The public API on models that nothing else in the project knows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import labn
from labn import Explanation, evaluate, explain
from labn.explainers import GradCAM, explainer_by_name
from labn.metrics import metric_by_name

ROOT = Path(__file__).parents[1]
FOREIGN = "regnetx_002"

THREE_LINES = f"""
import json, sys
import timm, torch

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 5, 4, stride=4)
        self.out = torch.nn.Linear(5, 7)

    def forward(self, x):
        return self.out(torch.tanh(self.body(x)).amax((2, 3)))

torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)
for model in (timm.create_model({FOREIGN!r}, num_classes=7), Own()):
    from labn import explain, evaluate
    result = explain(model, images, method="gradcam", relu=False)
    scores = evaluate(model, images, result.maps, targets=result.targets, metrics=["pid16", "pid8"])
    found = {{name: value.tolist() for name, value in scores.items()}}
    found |= {{"shape": list(result.maps.shape), "spread": result.maps.std().item(), "training": model.training}}
    print(json.dumps({{**found, "lightning": "lightning" in sys.modules}}))
"""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Own(nn.Module):
    """A user's own network."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def model() -> Own:
    torch.manual_seed(0)
    return Own().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_explain_and_evaluate_work_on_a_timm_model(images: Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, num_classes=5)
    result = explain(model, images, method="lrp", targets=None)
    scores = evaluate(model, images, result.maps, targets=result.targets, metrics=["pid16", "id"])
    assert result.maps.shape == (2, 32, 32)
    assert set(scores) == {"pid16", "id"}
    assert all(value.shape == (2,) and value.isfinite().all() for value in scores.values())


@pytest.mark.slow
def test_the_api_works_in_a_plain_interpreter(tmp_path: Path) -> None:
    """From any folder, on a timm model that no configuration names and on a module of the user's; without Lightning."""
    assert not any(FOREIGN in path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", THREE_LINES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for found in lines:
        assert found["shape"] == [2, 64, 64]
        assert found["spread"] > 0
        assert found["training"] is True
        assert found["lightning"] is False
        assert all(len(found[name]) == 2 and max(map(abs, found[name])) <= 1 for name in ("pid16", "pid8"))


def test_explain_works_on_an_own_module(model: Own, images: Tensor) -> None:
    result = explain(model, images, "gradcam++", relu=False)
    with torch.no_grad():
        assert torch.equal(result.targets, model(images).argmax(1))
    assert result.method == "gradcam++"
    assert result.maps.min() < 0
    same = explain(model, images, "gradcam++", result.targets, relu=False)
    assert torch.equal(same.maps, result.maps)


def test_explain_accepts_targets_and_ready_explainers(model: Own, images: Tensor) -> None:
    assert explain(model, images, "gradcam", 2).targets.tolist() == [2, 2]
    ready = explain(model, images, GradCAM(), [1, 0])
    assert ready.method == "GradCAM"
    assert torch.equal(ready.maps, explain(model, images, "gradcam", torch.tensor([1, 0])).maps)
    with pytest.raises(TypeError, match="a ready GradCAM takes no more arguments, got relu"):
        explain(model, images, GradCAM(), relu=False)


def test_indices_reach_random_methods(model: Own, images: Tensor) -> None:
    maps = explain(model, images, "random", indices=torch.tensor([4, 7])).maps
    assert not torch.equal(maps[0], maps[1])
    assert torch.equal(maps[1], explain(model, images[:1], "random", indices=torch.tensor([7])).maps[0])


def test_evaluate_equals_the_metric_classes(model: Own, images: Tensor) -> None:
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(2))
    targets, indices = torch.tensor([0, 2]), torch.arange(2)
    names = ["pid8", "id", "pid1", "insertion16", "pid16@official", "fill_probability"]
    found = evaluate(model, images, maps, targets, names)
    assert list(found) == names
    for name in names:
        expected = metric_by_name(name, mean=MEAN, std=STD).score(model, images, maps, targets, indices)
        key = "id" if name == "pid1" else name
        assert torch.allclose(found[name], expected[key], atol=1e-6), name


def test_black_fill_depends_on_the_normalisation(model: Own, images: Tensor) -> None:
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(2))
    default = evaluate(model, images, maps, [0, 1], ["fill_probability"])
    raw = evaluate(model, images, maps, [0, 1], ["fill_probability"], mean=None, std=None)
    with torch.no_grad():
        zero = model(torch.zeros(1, 3, 32, 32)).softmax(1)[0, :2].double()
    assert torch.allclose(raw["fill_probability"], zero, atol=1e-6)
    assert not torch.allclose(default["fill_probability"], zero, atol=1e-4)


def test_labels_masks_and_settings_reach_the_metrics(model: Own, images: Tensor) -> None:
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(2))
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, :16] = True
    mass = evaluate(model, images, maps, [0, 1], ["mass"], masks=masks)["mass"]
    assert torch.allclose(mass, (maps[:, :16].sum((1, 2)) / maps.sum((1, 2))).double())
    as_labelled = evaluate(model, images, maps, [0, 1], ["pid8"], labels=torch.tensor([1, 0]))["pid8"]
    assert torch.allclose(as_labelled, evaluate(model, images, maps, [1, 0], ["pid8"])["pid8"])
    blurred = evaluate(model, images, maps, [0, 1], ["pid8"], fill="blur")["pid8"]
    assert not torch.allclose(blurred, evaluate(model, images, maps, [0, 1], ["pid8"])["pid8"])


@pytest.mark.parametrize("method", ["random", "smoothgrad"])
def test_evaluate_repeats_the_explanation_of_explain(model: Own, images: Tensor, method: str) -> None:
    again: list[Tensor] = []
    ready = explainer_by_name(method)
    with patch.object(type(ready), "attribute", spy(type(ready).attribute, again)):
        for indices in (None, torch.tensor([3, 5])):
            result = explain(model, images, method, indices=indices)
            evaluate(model, images, result.maps, result.targets, ["randomisation"], explainer=ready, indices=indices)
    assert again == [None, None, [3, 5], [3, 5]]


def spy(function, seen: list) -> object:
    def attribute(self, model, images, targets, indices):
        seen.append(None if indices is None else indices.tolist())
        return function(self, model, images, targets, indices)

    return attribute


def test_chunk_size_fold_and_precision_reach_the_engine(model: Own, images: Tensor) -> None:
    maps = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(2))
    seen: list[torch.dtype] = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    full = evaluate(model, images, maps, [0, 1], ["pid8"], fold=False)["pid8"]
    assert set(seen) == {torch.float32}
    seen.clear()
    reduced = evaluate(model, images, maps, [0, 1], ["pid8"], fold=False, precision="bf16")["pid8"]
    assert set(seen) == {torch.float32, torch.bfloat16}  # the prediction, and everything else
    assert torch.allclose(full, reduced, atol=0.01)
    assert not torch.equal(full, reduced)
    with pytest.raises(ValueError, match="precision must be one of"):
        evaluate(model, images, maps, precision="fp8")


def test_explain_and_evaluate_do_not_change_the_model(model: Own, images: Tensor) -> None:
    model.train()
    before, given = {k: v.clone() for k, v in model.state_dict().items()}, images.clone()
    result = explain(model, images, "scorecam")
    evaluate(model, images, result.maps, result.targets)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert torch.equal(images, given)
    assert isinstance(result, Explanation)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: explain(m, x, "gradcams"), "no method 'gradcams'; did you mean gradcam"),
        (lambda m, x: explain(m, x, "gradcam", 3), "targets must be from 0 to 2"),
        (lambda m, x: explain(m, x, "gradcam", [0]), "targets must be 2 class indices, one per image"),
        (lambda m, x: explain(m, x, "gradcam", target_layer="conf"), "near it: conv"),
        (lambda m, x: explain(m, x[:, :2], "gradcam"), "images have 2 channels; Own expects 3"),
        (lambda m, x: evaluate(m, x, x[:, 0], metrics=["pid_16"]), "unknown metric 'pid_16'; similar names: pid16"),
        (lambda m, x: evaluate(m, x, x[:, 0, :9]), "resize them"),
        (lambda m, x: explain(m, x[:0], "gradcam"), "images is an empty batch; give at least one"),
        (lambda m, x: evaluate(m, x[:0], x[:0, 0]), "images is an empty batch; give at least one"),
        (
            lambda m, x: evaluate(m, x, x[:, 0], [0, 0], ["mass", "pid64"], masks=x[:, 0] > 0),
            "patch_size must be from 1",
        ),
        (lambda m, x: explain(m, x[0], "gradcam"), r"images must be \(B, C, H, W\), got .*; a single image goes in as"),
        (lambda m, x: evaluate(m, x[0, 0], x[0, 0]), r"images must be \(B, C, H, W\), got \(\d+, \d+\)\.$"),
    ],
)
def test_bad_input_gives_an_error_of_one_sentence(model: Own, images: Tensor, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, images)


def test_classes_may_be_of_any_integer_type(model: Own, images: Tensor) -> None:
    maps, metrics = images[:, 0], ["pid4@random", "average_drop"]
    expected = evaluate(model, images, maps, torch.tensor([1, 0]), metrics, labels=torch.tensor([0, 1]))
    for dtype in (torch.uint8, torch.int32):
        classes = {"targets": torch.tensor([1, 0], dtype=dtype), "labels": torch.tensor([0, 1], dtype=dtype)}
        found = evaluate(model, images, maps, metrics=metrics, **classes)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"labels must be class indices, got torch\.float32"):
        evaluate(model, images, maps, torch.tensor([1, 0]), metrics, labels=torch.tensor([0.0, 1.0]))


def test_maps_labels_and_regions_may_be_arrays_and_lists(model: Own, images: Tensor) -> None:
    maps, boxes = images[:, 0], torch.tensor([[[1, 2, 5, 6]], [[0, 0, 9, 9]]])
    metrics = ["pid4", "mass", "average_drop"]
    more = {"labels": torch.tensor([0, 1]), "boxes": boxes, "indices": torch.tensor([3, 4])}
    expected = evaluate(model, images, maps, [1, 0], metrics, **more)
    given = {"labels": [0, 1], "boxes": boxes.tolist(), "indices": np.array([3, 4])}
    found = evaluate(model, images, maps.numpy(), [1, 0], metrics, **given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    masks = np.zeros((2, 32, 32), dtype=bool)
    masks[0, :9] = True
    mass = evaluate(model, images, maps.tolist(), metrics=["mass"], masks=masks)["mass"]
    assert mass.isnan().tolist() == [False, True]
    assert evaluate(model, images, maps, metrics=["mass"], boxes=[boxes[0], []])["mass"].isnan().tolist() == [
        False,
        True,
    ]
    for name, bad in (("maps", "map"), ("labels", ["a", "b"]), ("boxes", [None, None])):
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, an array or lists of numbers, got "):
            evaluate(**{"model": model, "images": images, "maps": maps, "metrics": ["mass"], **more, name: bad})


def test_maps_may_be_bool(model: Own, images: Tensor) -> None:
    metrics = ["pid4", "id", "auroc", "mass", "average_drop", "sparseness", "pctin10"]
    regions = images[:, 0] > 0.5
    found, expected = (evaluate(model, images, m, [1, 0], metrics, masks=regions) for m in (regions, regions.float()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scores_carry_no_autograd_graph(model: Own, images: Tensor) -> None:
    maps = images[:, 0].clone().requires_grad_()
    assert not evaluate(model, images, maps, [0, 1], ["sparseness"])["sparseness"].requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: explain(m, x.numpy(), "gradcam"), r"images must be a tensor \(B, C, H, W\), got ndarray"),
        (lambda m, x: explain(m, (255 * x).byte(), "gradcam"), r"images are torch\.uint8; they must be floating point"),
        (lambda m, x: evaluate(m, (255 * x).byte(), x[:, 0]), r"images are torch\.uint8; they must be floating point"),
        (lambda m, x: evaluate(m, x, x[:, 0], metrics="pid16"), r"such as \['pid16'\]"),
    ],
)
def test_input_of_a_wrong_type_gives_an_error_of_one_sentence(model: Own, images: Tensor, call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(model, images)


def test_images_of_other_channels_need_mean_and_std() -> None:
    images, model = torch.rand(1, 1, 16, 16), Own(1).eval()
    with pytest.raises(ValueError, match="images have 1 channels; give mean and std"):
        evaluate(model, images, images[:, 0], [0], ["pid4"])
    assert evaluate(model, images, images[:, 0], [0], ["pid4"], mean=None, std=None)["pid4"].shape == (1,)


@pytest.mark.parametrize(
    ("old", "names"), [("labn.weighted", ["Dense", "weighted"]), ("labn.explainers.crp", ["CRP", "Question"])]
)
def test_old_module_paths_export_their_names_with_a_warning(old, names, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"{old} has moved to labn"):
        module = importlib.import_module(old)
    new = importlib.import_module(labn.OLD_PATHS[old])
    assert [getattr(module, name) for name in names] == [getattr(new, name) for name in names]


def tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, x: explain("resnet18", x), r"model is the name 'resnet18'; pass the network itself"),
        (lambda m, x: explain(lambda y: y, x), r"model is a function; write it as the forward of an nn\.Module"),
        (lambda m, x: explain(m, x, "gradcam", "cat"), r"targets is 'cat'; class indices are needed"),
        (
            lambda m, x: explain(m, x, "gradcam", torch.tensor([0.5, 1.0])),
            r"2 class indices, one per image; .* torch\.float32",
        ),
        (lambda m, x: explain(m, x, "rise", 0, masks=3), r"method 'rise' has no argument 'masks'; it has n_masks, "),
        (lambda m, x: explain(m, x, "ig", 0), r"no method 'ig'; did you mean integrated_gradients\?"),
        (lambda m, x: explain(m, x, "Grad-CAM", 0), r"no method 'Grad-CAM'; did you mean gradcam\?"),
        (lambda m, x: explain(m, x, "Input x Gradient", 0), r"did you mean gradxinput\?"),
        (lambda m, x: explain(m, x, ["gradcam", "lrp"], 0, relu=False), r"relu cannot be given to several methods"),
        (lambda m, x: explain(m, x, 3, 0), r"method is a int; it must be a name, an explainer, or a list"),
        (lambda m, x: explain(m, "a.jpg"), r"images must be a tensor .* labn\.prepare makes it from pictures"),
        (lambda m, x: explain(m, torch.full_like(x, torch.nan)), r"images must be finite; image 0 holds NaN"),
        (lambda m, x: labn.prepare(3), r"a picture is a int"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_would_be_right(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(tiny_model(), torch.randn(2, 3, 32, 32))


def test_classes_lists_and_explanations_are_accepted():
    model, images = tiny_model(), torch.randn(2, 3, 32, 32)
    by_name = explain(model, images, "gradcam", torch.tensor(1))
    assert by_name.targets.tolist() == [1, 1]
    assert torch.equal(explain(model, images, GradCAM, 1).maps, by_name.maps)
    several = explain(model, images, ["gradcam", "-gradcam"], 1)
    assert torch.equal(several["gradcam"].maps, by_name.maps)
    assert torch.equal(several["-gradcam"].maps, -by_name.maps)
    scores = evaluate(model, images, by_name, metrics=["pid16"], mean=None, std=None)
    expected = evaluate(model, images, by_name.maps[:, None], by_name.targets, ["pid16"], mean=None, std=None)
    assert torch.equal(scores["pid16"], expected["pid16"])


def test_pictures_are_prepared_as_arrays_paths_or_pil_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = labn.prepare([pixels, tmp_path / "a.png", Image.fromarray(pixels), str(tmp_path / "a.png")], size=16)
    assert images.shape == (4, 3, 16, 16)
    assert all(torch.equal(images[0], image) for image in images)


@pytest.mark.parametrize(("images", "warned"), [("unit", True), ("bytes", True), ("normalised", False)])
def test_images_that_cannot_have_been_normalised_are_warned_about(images, warned, recwarn):
    unit = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {"unit": unit, "bytes": unit * 255, "normalised": (unit - 0.45) / 0.22}[images]
    evaluate(tiny_model(), batch, torch.rand(2, 32, 32), 0, ["fill_probability"])
    assert any("as if they were not normalised" in str(w.message) for w in recwarn) is warned
    recwarn.clear()
    explain(tiny_model(), batch, "gradxinput", 0)
    assert any("as if they were pixels" in str(w.message) for w in recwarn) is (images == "bytes")
