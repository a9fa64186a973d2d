"""The CAM family beside torchcam and grad-cam on the same network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from labn.explainers import (
    AblationCAM,
    Explainer,
    FinerCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    ScoreCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)
from labn.explainers.cam.features import gradient_features
from labn.inference.modes import explaining

TARGETS = torch.tensor([3, 7])


class Network(nn.Module):
    """A ResNet's stem and first stages with a tail that is linear in the feature maps, or not."""

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = resnet18()
        self.stem = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool, whole.layer1, whole.layer2)
        self.stage = nn.Sequential(nn.Conv2d(128, 16, 3, padding=1), nn.ReLU())
        first = nn.Identity() if linear else nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
        self.tail = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.stage(self.stem(x))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Network().double().eval()


@pytest.fixture(scope="module")
def steep() -> nn.Module:
    """The same with 10 000 times the gradients."""
    network = Network().double().eval()
    with torch.no_grad():
        network.head.weight.mul_(1e4)
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ours(explainer: Explainer, model: nn.Module, images: Tensor) -> Tensor:
    with explaining(model):
        return explainer.attribute(model, images, TARGETS, None)


def unit(maps: Tensor) -> Tensor:
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return torch.where(high > low, (flat - low) / (high - low), 0).view_as(maps)


def torchcam_map(name: str, model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """torchcam's map, one image at a time, not normalised."""
    methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    maps = []
    for image, target in zip(images, TARGETS.tolist()):
        with getattr(methods, name)(model, target_layer="stage", **options) as extractor:
            logits = model(image[None].clone().requires_grad_())
            maps.append(extractor(target, logits, normalized=False)[0].squeeze(0).detach())
    return torch.stack(maps)


@pytest.mark.parametrize(
    ("name", "explainer"),
    [("GradCAM", GradCAM("stage")), ("XGradCAM", XGradCAM("stage"))],
)
def test_class_activation_maps_equal_torchcams(
    name: str, explainer: Explainer, model: nn.Module, images: Tensor
) -> None:
    expected = torchcam_map(name, model, images).relu()
    assert torch.allclose(unit(ours(explainer, model, images)), unit(expected), atol=1e-3)


def test_scorecam_equals_torchcams(model: nn.Module, images: Tensor) -> None:
    expected = torchcam_map("ScoreCAM", model, images, batch_size=8).relu()
    assert torch.allclose(unit(ours(ScoreCAM("stage"), model, images)), unit(expected), atol=2e-2)


def test_torchcam_plus_plus_loses_its_denominator(model: nn.Module, images: Tensor) -> None:
    """torchcam divides a copy (`alpha[mask].div_`), so that its weights are sum_ij g^2 ReLU(g) and not Grad-CAM++'s."""
    seen = gradient_features(model, model.stage, images, TARGETS)
    cubes = seen.slopes.relu() ** 3
    expected = torchcam_map("GradCAMpp", model, images).relu()
    assert torch.allclose(expected, (cubes.sum((2, 3), keepdim=True) * seen.activations).sum(1), rtol=1e-6)
    assert (unit(ours(GradCAMPlusPlus("stage"), model, images)) - unit(expected)).abs().max() > 0.01


def test_torchcam_smooth_plus_plus_is_wrong_where_gradients_vary(model: nn.Module, images: Tensor) -> None:
    """torchcam has sum_ab A_ab g_ab^3 in the denominator where the paper has g_ij^3 sum_ab A_ab, plus a fixed 1e-8.

    With one sample without noise, the gradient the same everywhere and far above that epsilon, both are the same. (Of
    several samples it takes the ReLU of the last one's gradient alone.)
    """
    linear = Network(linear=True).double().eval()
    with torch.no_grad():
        linear.head.weight.mul_(1e4)
    smooth = SmoothGradCAMPlusPlus("stage", n_samples=1, std=0.0)
    options = {"num_samples": 1, "std": 1e-12}
    expected = torchcam_map("SmoothGradCAMpp", linear, images, **options).relu()
    assert torch.allclose(unit(ours(smooth, linear, images)), unit(expected), atol=1e-4)
    assert expected.max() > 0
    varying = torchcam_map("SmoothGradCAMpp", model, images, **options).relu()
    assert (unit(ours(smooth, model, images)) - unit(varying)).abs().max() > 0.01


def grad_cam_map(name: str, model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """grad-cam's own sum at the layer, before it rescales and resizes."""
    package = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    targets_module = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason="grad-cam is not installed")
    targets = [targets_module.ClassifierOutputTarget(target) for target in TARGETS.tolist()]
    with getattr(package, name)(model=model, target_layers=[model.stage], **options) as method:
        method.outputs = method.activations_and_grads(images.clone().requires_grad_())
        sum(target(output) for target, output in zip(targets, method.outputs)).backward()
        activations = method.activations_and_grads.activations[0].detach().numpy()
        gradients = method.activations_and_grads.gradients[0].numpy()
        return torch.as_tensor(method.get_cam_image(images, model.stage, targets, activations, gradients, False))


def test_layercam_equals_torchcams(model: nn.Module, images: Tensor) -> None:
    expected = torchcam_map("LayerCAM", model, images).relu()
    assert torch.allclose(unit(ours(LayerCAM("stage"), model, images)), unit(expected), atol=1e-6)


def test_finercam_equals_grad_cams_with_one_neighbour(model: nn.Module, images: Tensor) -> None:
    """With several neighbours grad-cam also differentiates the weights by which it takes their mean."""
    module = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason="grad-cam is not installed")
    logits = model(images).detach()
    nearest = [(row - row[t]).abs().argsort()[1].item() for row, t in zip(logits, TARGETS.tolist())]
    targets = [module.FinerWeightedTarget(t, [n], 0.5) for t, n in zip(TARGETS.tolist(), nearest)]
    seen = gradient_features(
        model, model.stage, images, TARGETS, score=lambda y, _: torch.stack([t(row) for t, row in zip(targets, y)])
    )
    expected = (seen.slopes.mean((2, 3), keepdim=True) * seen.activations).sum(1).relu()
    assert torch.allclose(ours(FinerCAM("stage", alpha=0.5, n_similar=1), model, images), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "explainer"),
    [
        ("GradCAM", GradCAM("stage")),
        ("XGradCAM", XGradCAM("stage")),
        ("LayerCAM", LayerCAM("stage")),
        ("HiResCAM", HiResCAM("stage")),
    ],
)
def test_class_activation_maps_equal_grad_cams(
    name: str, explainer: Explainer, model: nn.Module, images: Tensor
) -> None:
    expected = grad_cam_map(name, model, images).relu()
    model.zero_grad()
    assert torch.allclose(ours(explainer, model, images), expected, rtol=1e-4, atol=1e-8)


def test_grad_cam_plus_plus_is_wrong_by_its_fixed_epsilon(model: nn.Module, steep: nn.Module, images: Tensor) -> None:
    """grad-cam adds 1e-6 to a denominator of the order of the squared gradient: with larger gradients it agrees."""
    small, large = (grad_cam_map("GradCAMPlusPlus", m, images).relu() for m in (model, steep))
    explainer = GradCAMPlusPlus("stage")
    assert torch.allclose(unit(ours(explainer, steep, images)), unit(large), atol=1e-3)
    assert (unit(ours(explainer, model, images)) - unit(small)).abs().max() > 2e-3


def test_ablationcam_equals_grad_cams(model: nn.Module, images: Tensor) -> None:
    """grad-cam divides by y_c as we do."""
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    from pytorch_grad_cam import AblationCAM as Theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(target) for target in TARGETS.tolist()]
    with Theirs(model=model.float(), target_layers=[model.stage], batch_size=16) as method:
        found = method(input_tensor=images.float(), targets=targets)
    model.double().zero_grad()
    maps = AblationCAM("stage")(model, images, TARGETS)
    theirs = torch.as_tensor(found)
    a, b = unit(maps).flatten(1), unit(theirs).flatten(1)
    assert torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)]).min() > 0.99
