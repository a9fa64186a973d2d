"""Gradient methods against their definitions in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from small_networks import DeepTail, Parameterless, pictures, seeded
from torch import Tensor, nn

from callbacks import ExplanationCallback
from datamodules import SyntheticFundus
from labn import evaluate, explain
from labn.explainers import (
    BlackWhiteIntegratedGradients,
    BlurredIntegratedGradients,
    Deconvnet,
    ExpectedGradients,
    Explainer,
    Gradient,
    GradientTimesInput,
    GuidedBackpropagation,
    IntegratedGradients,
    Negated,
    Occlusion,
    SmoothGrad,
    SmoothGradCAMPlusPlus,
    SobelMap,
)
from labn.explainers.gradient import gaussian_noise, over_variants
from labn.inference.fingerprint import digest
from labn.inference.modes import explaining
from labn.modules import Classifier
from labn.perturbation.engine import ChunkSize
from labn.perturbation.fills import make_fill
from labn.results.fingerprints import describe

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
        for noise in gaussian_noise(images, None, 7, range(4)):
            point = (images + scale * noise).requires_grad_()
            slopes.append(torch.autograd.grad(model(point).gather(1, TARGETS[:, None]).sum(), point)[0])
        expected = torch.stack(slopes).mean(0).sum(1)
        found = exact(SmoothGrad(4, 0.1, relative, seed=7), model, images)
        assert torch.allclose(found, expected, atol=1e-12)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    model = seeded(DeepTail)
    assert torch.allclose(exact(SmoothGrad(1, 0.0), model, pictures()), exact(Gradient(), model, pictures()))


def test_noise_depends_on_the_sample_index_only() -> None:
    images = pictures(3)
    (noise,) = gaussian_noise(images, torch.tensor([5, 9, 5]), 0, range(2, 3))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], gaussian_noise(images[:1], torch.tensor([9]), 0, range(4))[2])
    single, double = (gaussian_noise(x, None, 0, range(2)) for x in (images.float(), images))
    assert torch.equal(single, double.float())


def test_noise_is_standard_normal() -> None:
    noise = gaussian_noise(pictures(1, 200, 200), None, 1, range(4)).flatten()
    assert abs(float(noise.mean())) < 0.005
    assert abs(float(noise.std()) - 1) < 0.005
    assert abs(float(noise.pow(4).mean()) - 3) < 0.05
    for quantile in (0.001, 0.1, 0.5, 0.975):
        expected = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64))
        share = float((noise <= expected).double().mean())
        assert abs(share - quantile) < 4 * (quantile * (1 - quantile) / len(noise)) ** 0.5
    neighbours = torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.01


@pytest.mark.parametrize("method", [SmoothGrad(5), IntegratedGradients(5), SmoothGradCAMPlusPlus(n_samples=5)])
def test_maps_do_not_depend_on_how_many_variants_run_at_once(method, monkeypatch) -> None:
    model, images = seeded(DeepTail), pictures()
    sizes = []

    def run_in_chunks_of(size):
        monkeypatch.setattr("labn.explainers.gradient.ChunkSize", lambda _, images: ChunkSize(size, images))
        handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        maps = exact(method, model, images)
        handle.remove()
        return maps

    expected = run_in_chunks_of(1)
    assert max(sizes) == len(images)
    for size in (2 * len(images), 100):
        torch.testing.assert_close(run_in_chunks_of(size), expected, rtol=0, atol=1e-12)
    assert max(sizes) == 5 * len(images)


def test_variants_run_again_in_halves_where_memory_runs_out() -> None:
    seen = []

    def run(batch, classes):
        seen.append(len(batch))
        if len(batch) > 8:
            raise torch.OutOfMemoryError("full")
        return batch.sum((1, 2, 3)) + classes

    images = torch.zeros(2, 1, 2, 2)
    results = list(
        over_variants(run, lambda some: torch.stack([images + n for n in some]), 20, images, torch.arange(2))
    )
    assert seen[:3] == [32, 16, 8]
    assert torch.equal(torch.stack(results)[:, 1], 4.0 * torch.arange(20) + 1)


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


def difference(model: nn.Module, images: Tensor, *starts: Tensor) -> Tensor:
    """y_c(x) minus the mean of y_c(x') over the baselines x'."""
    scores = [model(x).gather(1, TARGETS[:, None])[:, 0] for x in (images, *starts)]
    return scores[0] - torch.stack(scores[1:]).mean(0)


def test_integrals_from_other_baselines_sum_to_the_difference_of_scores() -> None:
    model, images = seeded(DeepTail), pictures()
    found = exact(BlurredIntegratedGradients(400, 7, 2.0), model, images).sum((1, 2))
    blurred = make_fill("blur", images, kernel_size=7, sigma=2.0)
    assert torch.allclose(found, difference(model, images, blurred).detach(), atol=1e-4)
    black, white = (torch.full_like(images, value) for value in (-2.0, 3.0))
    found = exact(BlackWhiteIntegratedGradients(400, 0.4, 0.2), model, images).sum((1, 2))
    assert torch.allclose(found, difference(model, images, black, white).detach(), atol=1e-4)


def test_black_and_white_are_those_of_the_images_normalisation() -> None:
    given = BlackWhiteIntegratedGradients(mean=0.1).for_normalised([0.4] * 3, [0.2] * 3)
    assert describe(given) == describe(BlackWhiteIntegratedGradients(mean=0.1, std=[0.2] * 3))
    plain = Negated(BlackWhiteIntegratedGradients()).for_normalised(None, None)
    assert describe(plain) == describe(Negated(BlackWhiteIntegratedGradients(mean=0.0, std=1.0)))
    # `evaluate` explains again with the normalisation that it is given.
    model, images, name = seeded(DeepTail), pictures(), "integrated_gradients_bw"
    normalisation = {"mean": [0.4] * 3, "std": [0.2] * 3}
    maps = explain(model, images, name, TARGETS, **normalisation)
    settings = {"radius": 1e-9, "draws": 1, **normalisation}
    values = evaluate(model, images, maps, metrics=["max_sensitivity"], explainer=name, **settings)
    assert values["max_sensitivity"].max() < 1e-4


def test_a_test_takes_black_and_white_of_its_data(tmp_path: Path) -> None:
    module = Classifier("resnet18", num_classes=2)
    module.random_weights = ()  # as after training, without which a test is refused
    data = SyntheticFundus(n_train=4, n_val=2, n_test=2, image_size=48, mean=[0.4] * 3, std=[0.2] * 3)
    callback = ExplanationCallback({"bw": BlackWhiteIntegratedGradients(n_steps=2)})
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "inference_mode": False}
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[callback], accelerator="cpu", **options)
    trainer.test(module, data, verbose=False)
    explicit = BlackWhiteIntegratedGradients(2, [0.4] * 3, [0.2] * 3)
    assert callback.session.keys == {"bw": digest(describe(explicit), "label")}
    batch = next(iter(data.test_dataloader()))
    callback.session.results.refresh()
    stored = callback.session.results.maps("bw", callback.session.keys["bw"], batch["index"].tolist())
    found = torch.stack([stored[index] for index in batch["index"].tolist()])
    expected = explicit(module.network, batch["image"], batch["label"], batch["index"])
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_expected_gradients_of_a_linear_model_are_exact() -> None:
    """w (x - mean of the drawn references), whatever the points on the paths."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 20, 4)).double(), pictures()
    references = torch.stack([torch.full_like(images[0], value) for value in (0.0, 1.0)])
    found = exact(ExpectedGradients(references, 400), model, images)
    weights = model[1].weight[TARGETS].view_as(images)
    share = (images - found.new_tensor(0)) * weights
    drawn = ((share.sum(1) - found) / weights.sum(1)).detach()
    assert torch.allclose(drawn, drawn.mean((1, 2), keepdim=True).expand_as(drawn), atol=1e-9)
    assert (drawn.mean((1, 2)) - 0.5).abs().max() < 0.1


def test_expected_gradients_of_one_reference_are_integrated_gradients() -> None:
    """With a single reference only the points on the path are random, spread evenly over it."""
    model, images = seeded(DeepTail), pictures()
    found = exact(ExpectedGradients(torch.zeros_like(images[:1]), 800), model, images)
    expected = exact(IntegratedGradients(200), model, images)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_expected_gradients_depend_on_seed_and_index_alone() -> None:
    model, images = seeded(DeepTail), pictures()
    with explaining(model):
        both = ExpectedGradients(n_samples=3).attribute(model, images, TARGETS, torch.tensor([5, 9]))
        alone = ExpectedGradients(n_samples=3).attribute(model, images[1:], TARGETS[1:], torch.tensor([9]))
        other = ExpectedGradients(n_samples=3, seed=1).attribute(model, images[1:], TARGETS[1:], torch.tensor([9]))
    assert torch.allclose(both[1:], alone, atol=1e-12)
    assert not torch.allclose(alone, other)
    with pytest.raises(ValueError, match=r"references must be \(R, 3, 16, 20\) like the images"):
        exact(ExpectedGradients(torch.zeros(2, 3, 8, 8)), model, images)


class Functional(nn.Module):
    """ReLUs as functions and methods, in place and not, and as a module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(x))
        y = self.relu(self.second(x))
        z = torch.relu_(self.second(x[..., 1:, 1:]).clone())
        return self.head(y.mean((2, 3)) + z.mean((2, 3)).relu())


class Modules(nn.Module):
    """The same function with one `nn.ReLU` per call."""

    def __init__(self, other: Functional) -> None:
        super().__init__()
        self.first, self.second, self.head = other.first, other.second, other.head
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[0](self.first(x))
        y, z = self.relus[1](self.second(x)), self.relus[2](self.second(x[..., 1:, 1:]))
        return self.head(y.mean((2, 3)) + self.relus[3](z.mean((2, 3))))


@pytest.mark.parametrize("explainer", [GuidedBackpropagation(), Deconvnet()])
def test_relus_of_every_form_are_rectified(explainer: Explainer) -> None:
    torch.manual_seed(0)
    model, images = Functional().double().eval(), pictures()
    before = model(images).detach()
    found = exact(explainer, model, images)
    assert torch.allclose(found, exact(explainer, Modules(model).eval(), images), atol=1e-12)
    assert torch.equal(model(images), before)
    assert not torch.allclose(found, exact(Gradient(), model, images))


def test_rectified_gradients_by_hand() -> None:
    """y = 2 relu(a) - relu(-a) with a = x: guided keeps the paths of positive gradients with positive inputs."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    model[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    model[3].weight.data.copy_(torch.tensor([[2.0, 5.0]]))
    at, target = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0])
    with explaining(model):
        assert GuidedBackpropagation().attribute(model, at, target, None).item() == 2
        assert GuidedBackpropagation().attribute(model, -at, target, None).item() == -5
        assert Deconvnet().attribute(model, at, target, None).item() == 2 - 5


def test_a_network_without_relu_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 20, 4), nn.GELU())
    with pytest.raises(ValueError, match="changes the gradient of ReLUs, and Sequential calls none"):
        GuidedBackpropagation()(model, pictures().float(), TARGETS)


def test_sobel_maps_of_a_slope_and_a_flat_image() -> None:
    """A slope of s per pixel has the magnitude 8 s inside, in either direction."""
    x = torch.arange(6.0).expand(1, 3, 6, 6).double()
    found = exact(SobelMap(), nn.Identity(), torch.cat([0.5 * x, 0.5 * x.transpose(2, 3)]))
    assert torch.allclose(found[:, 1:-1, 1:-1], torch.full((2, 4, 4), 4.0).double())
    assert exact(SobelMap(), nn.Identity(), torch.full((1, 3, 5, 5), 0.7)).abs().max() < 1e-6
