"""Gradient methods and occlusion beside captum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from labn.explainers import (
    BlackWhiteIntegratedGradients,
    BlurredIntegratedGradients,
    Deconvnet,
    Explainer,
    Gradient,
    GradientTimesInput,
    GuidedBackpropagation,
    IntegratedGradients,
    KernelSHAP,
    Occlusion,
)
from labn.explainers.perturbation.cells import cells_to_pixels
from labn.inference.modes import explaining
from labn.perturbation.fills import make_fill

attr = pytest.importorskip("captum.attr", reason="captum is not installed")
TARGETS = torch.tensor([1, 3])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 20, 26, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ours(explainer: Explainer, model: nn.Module, images: Tensor) -> Tensor:
    with explaining(model):
        return explainer.attribute(model, images, TARGETS, None)


def test_gradient_equals_captums(model: nn.Module, images: Tensor) -> None:
    expected = attr.Saliency(model).attribute(images, TARGETS, abs=False).sum(1)
    assert torch.allclose(ours(Gradient(), model, images), expected, atol=1e-12)
    largest = attr.Saliency(model).attribute(images, TARGETS, abs=True).amax(1)
    assert torch.allclose(ours(Gradient("max_abs"), model, images), largest, atol=1e-12)


def test_gradient_times_input_equals_captums(model: nn.Module, images: Tensor) -> None:
    expected = attr.InputXGradient(model).attribute(images, TARGETS).sum(1)
    assert torch.allclose(ours(GradientTimesInput(), model, images), expected, atol=1e-12)


@pytest.mark.parametrize("n_steps", [3, 50])
def test_integrated_gradients_equal_captums(n_steps: int, model: nn.Module, images: Tensor) -> None:
    expected = attr.IntegratedGradients(model).attribute(images, 0.1, TARGETS, n_steps=n_steps).sum(1)
    assert torch.allclose(ours(IntegratedGradients(n_steps, 0.1), model, images), expected, atol=1e-8)


def test_other_baselines_equal_captums(model: nn.Module, images: Tensor) -> None:
    captum = attr.IntegratedGradients(model)
    blurred = captum.attribute(images, make_fill("blur", images), TARGETS, n_steps=30).sum(1)
    assert torch.allclose(ours(BlurredIntegratedGradients(30), model, images), blurred, atol=1e-6)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    both = [captum.attribute(images, ((v - mean) / std).expand_as(images), TARGETS, n_steps=30) for v in (0.0, 1.0)]
    found = ours(BlackWhiteIntegratedGradients(30, mean.flatten().tolist(), std.flatten().tolist()), model, images)
    assert torch.allclose(found, torch.stack(both).mean(0).sum(1), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize(
    ("explainer", "name"), [(GuidedBackpropagation(), "GuidedBackprop"), (Deconvnet(), "Deconvolution")]
)
def test_rectified_gradients_equal_captums(explainer: Explainer, name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    ]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double().eval()
    expected = getattr(attr, name)(copy.deepcopy(model)).attribute(images, TARGETS).sum(1)
    found = ours(explainer, model, images)
    assert torch.allclose(found, expected, atol=1e-12)
    assert (found - ours(Gradient(), model, images)).abs().max() > 1e-4


@pytest.mark.parametrize(("window", "stride"), [(6, 6), (7, 4)])
def test_occlusion_equals_captums(window: int, stride: int, model: nn.Module, images: Tensor) -> None:
    single = copy.deepcopy(model).float()  # captum's own mask is float32
    expected = attr.Occlusion(single).attribute(
        images.float(), (3, window, window), (3, stride, stride), baselines=0.2, target=TARGETS
    )
    found = ours(Occlusion(window, stride, baseline=0.2), model, images)
    assert torch.allclose(found.float(), expected[:, 0], atol=1e-6)


def test_kernelshap_equals_captums_shapley_values(model: nn.Module, images: Tensor) -> None:
    """Captum's exact values over all orders of four cells, and near them what its KernelShap draws."""
    cells = cells_to_pixels(torch.arange(4), 2, (20, 26))[None, None]
    expected = attr.ShapleyValues(model).attribute(images, 0.1, TARGETS, feature_mask=cells)[:, 0]
    found = ours(KernelSHAP(2, baseline=0.1), model, images).float() * 130  # pixels of a cell; captum's are float32
    assert torch.allclose(found, expected, atol=1e-5)
    torch.manual_seed(0)
    drawn = attr.KernelShap(model).attribute(images[:1], 0.1, TARGETS[:1], feature_mask=cells, n_samples=400)[0, 0]
    assert (found[0] - drawn).abs().max() < 0.1 * expected[0].abs().max()
