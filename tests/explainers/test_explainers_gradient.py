"""Gradient methods against their definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import DeepTail, Parameterless, pictures, seeded
from torch import Tensor, nn

from labn.explainers import Explainer, Gradient, GradientTimesInput, IntegratedGradients, Occlusion, SmoothGrad
from labn.explainers.gradient import gaussian_noise
from labn.inference.modes import explaining

TARGETS = torch.tensor([0, 2])


def exact(explainer: Explainer, model: nn.Module, images: Tensor) -> Tensor:
    """The map in float64."""
    with explaining(model):
        return explainer.attribute(model, images, TARGETS, None)


def finite_differences(model: nn.Module, image: Tensor, target: int, step: float = 1e-6) -> Tensor:
    """dy_c/dx of one image, coordinate by coordinate."""
    moves = torch.eye(image.numel(), dtype=torch.float64).view(-1, *image.shape) * step
    with torch.no_grad():
        return ((model(image + moves) - model(image - moves))[:, target] / (2 * step)).view_as(image)


def test_gradient_equals_finite_differences() -> None:
    model, images = seeded(DeepTail), pictures(2, 8, 8)
    slopes = torch.stack([finite_differences(model, x, int(t)) for x, t in zip(images, TARGETS)])
    assert torch.allclose(exact(Gradient(), model, images), slopes.sum(1), atol=1e-7)
    assert torch.allclose(exact(Gradient("mean_abs"), model, images), slopes.abs().mean(1), atol=1e-7)
    assert torch.allclose(exact(Gradient("max_abs"), model, images), slopes.abs().amax(1), atol=1e-7)
    assert torch.allclose(exact(Gradient("l2"), model, images), slopes.norm(dim=1), atol=1e-7)
    assert torch.allclose(exact(GradientTimesInput(), model, images), (images * slopes).sum(1), atol=1e-7)


def test_gradient_times_input_sums_to_the_score_of_a_relu_network_without_biases() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 14 * 18, 4, bias=False)
    ).double()
    images = pictures()
    scores = model(images).gather(1, TARGETS[:, None]).squeeze(1)
    assert torch.allclose(exact(GradientTimesInput(), model, images).sum((1, 2)), scores, atol=1e-12)


def test_integrated_gradients_of_a_quadratic_are_exact_with_one_node() -> None:
    """y_c = 3 mean(x_c^2): the gradient is linear along the path, so IG = 3 (x_c^2 - x'_c^2 ...) / Z for one node."""
    images = pictures()
    baseline = [0.5, -0.2, 0.1]
    start = torch.tensor(baseline, dtype=torch.float64)[TARGETS].view(-1, 1, 1)
    chosen = torch.stack([image[target] for image, target in zip(images, TARGETS)])
    expected = 3 * (chosen**2 - start**2) / images[0, 0].numel()
    found = exact(IntegratedGradients(1, baseline), Parameterless(), images)
    assert torch.allclose(found, expected, atol=1e-14)


def test_integrated_gradients_sum_to_the_difference_of_scores() -> None:
    class Smooth(DeepTail):
        """SiLU in place of ReLU, for which the quadrature converges fast."""

        def __init__(self) -> None:
            super().__init__()
            self.features[2] = self.features[4] = self.head[1] = nn.SiLU()

    model, images = seeded(Smooth), pictures()
    found = exact(IntegratedGradients(30), model, images)
    with torch.no_grad():
        gain = (model(images) - model(torch.zeros_like(images))).gather(1, TARGETS[:, None]).squeeze(1)
    assert torch.allclose(found.sum((1, 2)), gain, atol=1e-10)


def test_integrated_gradients_equal_their_definition() -> None:
    model, images = seeded(DeepTail), pictures()
    nodes, weights = np.polynomial.legendre.leggauss(5)
    total = torch.zeros_like(images)
    for node, weight in zip(nodes, weights):
        point = (images * (node + 1) / 2).requires_grad_()
        score = model(point).gather(1, TARGETS[:, None]).sum()
        total += weight / 2 * torch.autograd.grad(score, point)[0]
    assert torch.allclose(exact(IntegratedGradients(5), model, images), (images * total).sum(1), atol=1e-12)


def test_smoothgrad_equals_its_definition() -> None:
    model, images = seeded(DeepTail), pictures()
    span = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    for relative, scale in ((True, 0.1 * span.view(-1, 1, 1, 1)), (False, torch.tensor(0.1))):
        slopes = []
        for draw in range(4):
            point = (images + scale * gaussian_noise(images, None, 7, draw)).requires_grad_()
            slopes.append(torch.autograd.grad(model(point).gather(1, TARGETS[:, None]).sum(), point)[0])
        expected = torch.stack(slopes).mean(0).sum(1)
        found = exact(SmoothGrad(4, 0.1, relative, seed=7), model, images)
        assert torch.allclose(found, expected, atol=1e-12)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    model = seeded(DeepTail)
    assert torch.allclose(exact(SmoothGrad(1, 0.0), model, pictures()), exact(Gradient(), model, pictures()))


def test_noise_depends_on_the_sample_index_only() -> None:
    images = pictures(3)
    noise = gaussian_noise(images, torch.tensor([5, 9, 5]), 0, 2)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], gaussian_noise(images[:1], torch.tensor([9]), 0, 2))
    assert torch.equal(gaussian_noise(images.float(), None, 0, 2).double(), gaussian_noise(images, None, 0, 2).float())
    assert abs(float(gaussian_noise(pictures(1, 200, 200), None, 1, 0).std()) - 1) < 0.02


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize(("window", "stride"), [(5, 3), (4, 4), (30, 7)])
def test_occlusion_equals_its_definition(score: str, window: int, stride: int) -> None:
    model, images = seeded(DeepTail), pictures()
    read = {"logit": lambda y: y, "probability": lambda y: y.softmax(1)}[score]
    height, width = images.shape[-2:]
    expected = torch.zeros(2, height, width, dtype=torch.float64)
    count = torch.zeros(height, width, dtype=torch.float64)
    with torch.no_grad():
        whole = read(model(images))
        for top in range(0, max(height - window, 0) + stride, stride):
            for left in range(0, max(width - window, 0) + stride, stride):
                covered = images.clone()
                covered[:, :, top : top + window, left : left + window] = 0.3
                lost = (whole - read(model(covered))).gather(1, TARGETS[:, None])
                expected[:, top : top + window, left : left + window] += lost[:, :, None]
                count[top : top + window, left : left + window] += 1
    assert count.min() > 0
    found = exact(Occlusion(window, stride, 0.3, score, chunk_size=5), model, images)
    assert torch.allclose(found, expected / count, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gradient("all"), "channels must be one of"),
        (lambda: IntegratedGradients(0), "n_steps must be at least 1"),
        (lambda: SmoothGrad(0), "n_samples must be at least 1"),
        (lambda: Occlusion(4, 5), "stride must be from 1 to window"),
        (lambda: Occlusion(score="odds"), "score must be one of"),
    ],
)
def test_bad_arguments_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_baseline_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline must be one number or 3"):
        IntegratedGradients(2, baseline=[0.0, 1.0])(seeded(), pictures(), TARGETS)


def test_logits_without_a_gradient_are_refused() -> None:
    class Rounded(Parameterless):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    with pytest.raises(ValueError, match="No gradient of the logits of Rounded reaches the images"):
        Gradient()(Rounded(), pictures(), TARGETS)
