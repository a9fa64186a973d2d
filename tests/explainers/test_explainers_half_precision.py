"""Class activation maps of networks in half precision: those of the same weights in float32, up to rounding."""

import copy

import pytest
import torch
from torch import nn

from labn import explain
from labn.explainers import GradCAM
from labn.models.cbam import CBAM

HALVES = {torch.bfloat16: 0.15, torch.float16: 0.02}  # largest difference, relative to the largest value
SETTINGS = {
    "cam": [{}],
    "scorecam": [{}, {"score": "probability", "weighting": "gain"}, {"channels": 3}],
    "ablationcam": [{}, {"closed_form": False}],
    "amg": [{"attention": CBAM(8, 2), "apply_to": apply_to} for apply_to in ("weighted", "activation")],
}
CASES = [(method, settings) for method, several in SETTINGS.items() for settings in several]


def network(attention=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    if attention:
        layers.insert(2, CBAM(8, 2))
    return nn.Sequential(*layers).eval()


def alike(maps, expected, dtype):
    largest = expected.abs().max()
    return bool(largest > 0 and (maps - expected).abs().max() <= HALVES[dtype] * largest)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("method", "settings"), CASES)
def test_half_precision_gives_the_map_of_single_precision_up_to_rounding(method, settings, dtype):
    images, targets = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    model = network().to(dtype)
    single = copy.deepcopy(model).float()
    settings = {"relu": False, "target_layer": "1", **settings}
    expected = explain(single, images.to(dtype).float(), method, targets, **settings).maps
    maps = explain(model, images.to(dtype), method, targets, **settings).maps
    assert maps.dtype == torch.float32
    assert alike(maps, expected, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("apply_to", ["weighted", "activation"])
def test_the_gates_of_a_half_precision_network_are_its_own(apply_to, dtype):
    images, model = torch.randn(2, 3, 16, 16).to(dtype), network(attention=True).to(dtype)
    settings = {"attention": "cbam", "relu": False, "apply_to": apply_to}
    expected = explain(copy.deepcopy(model).float(), images.float(), "amg", 1, **settings).maps
    assert alike(explain(model, images, "amg", 1, **settings).maps, expected, dtype)


LAYERS = ["gradcam", "gradcam++", "xgradcam", "smoothgradcam++", "cam", "scorecam", "ablationcam", "amg", "-gradcam"]


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_of_a_model_in_another_dtype_is_given_as_the_module(method):
    images, model = torch.randn(2, 3, 16, 16), network().bfloat16()
    maps = explain(model, images, method, 1, target_layer=model[1]).maps
    assert torch.equal(maps, explain(model, images, method, 1, target_layer="1").maps)


def test_an_explainer_keeps_the_layer_that_it_was_given():
    images, model = torch.randn(2, 3, 16, 16), network()
    explainer = GradCAM(target_layer=model[1])
    maps = explainer(model.double(), images, torch.tensor([1, 1]))
    assert explainer.target_layer is model[1]
    with pytest.raises(ValueError, match="target_layer is a ReLU that is not a layer of Sequential"):
        explainer(network(), images, torch.tensor([1, 1]))
    assert torch.equal(maps, GradCAM("1")(model, images, torch.tensor([1, 1])))
