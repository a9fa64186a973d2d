"""Closed forms of the CAM family on networks that end in pooling and a linear layer, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import DeepTail, GapLinear, pictures, seeded
from torch import Tensor, nn

from labn.explainers import (
    CAM,
    AblationCAM,
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
from labn.explainers.cam.gradcam import ActivationMap
from labn.explainers.cam.network_tail import Tail
from labn.inference.modes import explaining

TARGETS = torch.tensor([1, 3])


def raw(explainer: ActivationMap, model: nn.Module, images: Tensor, targets: Tensor = TARGETS) -> Tensor:
    """The map at the layer's resolution and in float64, before resizing."""
    with explaining(model):
        return explainer.attribute(model, images, targets, None)


@pytest.fixture
def model() -> GapLinear:
    return seeded()


@pytest.fixture
def activations(model: GapLinear) -> Tensor:
    with torch.no_grad():
        return model.features(pictures())


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("bk,bkij->bij", weights, activations).relu()


def test_cam_equals_its_definition_by_class_weights(model: GapLinear, activations: Tensor) -> None:
    expected = weighted(model.head.weight[TARGETS], activations)
    assert torch.allclose(raw(CAM(), model, pictures()), expected, atol=1e-12)
    assert expected.max() > 0.01


@pytest.mark.parametrize("method", [GradCAM, XGradCAM])
def test_gradcam_and_xgradcam_equal_cam_divided_by_z(
    method: type[ActivationMap], model: GapLinear, activations: Tensor
) -> None:
    positions = activations[0, 0].numel()
    expected = raw(CAM(), model, pictures()) / positions
    assert torch.allclose(raw(method(), model, pictures()), expected, atol=1e-12)


def test_hirescam_and_layercam_equal_their_closed_forms(model: GapLinear, activations: Tensor) -> None:
    """Behind pooling and a linear layer the gradient is w_k / Z everywhere."""
    slope = model.head.weight[TARGETS] / activations[0, 0].numel()
    assert torch.allclose(raw(HiResCAM(), model, pictures()), weighted(slope, activations), atol=1e-12)
    assert torch.allclose(raw(LayerCAM(), model, pictures()), weighted(slope.relu(), activations), atol=1e-12)
    whole = raw(HiResCAM(relu=False), model, pictures()).sum((1, 2)) + model.head.bias[TARGETS]
    assert torch.allclose(whole, model(pictures()).gather(1, TARGETS[:, None])[:, 0], atol=1e-12)


@pytest.mark.parametrize("method", [HiResCAM, LayerCAM])
def test_maps_with_a_weight_per_position_multiply_before_they_sum(method: type[ActivationMap]) -> None:
    model, images = seeded(DeepTail), pictures()
    seen = gradient_features(model, method().layer(model, images), images, TARGETS)
    slopes = seen.slopes if method is HiResCAM else seen.slopes.relu()
    assert torch.allclose(raw(method(relu=False), model, images), (slopes * seen.activations).sum(1), atol=1e-12)
    assert seen.slopes.std((2, 3)).max() > 0


def test_finercam_weighs_the_class_against_its_neighbours(model: GapLinear, activations: Tensor) -> None:
    """Grad-CAM's weights of c minus the mean of those of the two nearest logits, weighted by their softmax."""
    logits, weights = model(pictures()).detach(), model.head.weight / activations[0, 0].numel()
    combined = []
    for scores, target in zip(logits, TARGETS.tolist()):
        order = sorted(
            (k for k in range(len(scores)) if k != target), key=lambda k: float((scores[k] - scores[target]).abs())
        )
        share = scores[order[:2]].softmax(0)
        combined.append(weights[target] - 0.6 * (share[:, None] * weights[order[:2]]).sum(0))
    found = raw(FinerCAM(alpha=0.6, n_similar=2), model, pictures())
    assert torch.allclose(found, weighted(torch.stack(combined), activations), atol=1e-12)
    assert torch.equal(raw(FinerCAM(alpha=0.0), model, pictures()), raw(GradCAM(), model, pictures()))
    all_others = raw(FinerCAM(n_similar=99), model, pictures())
    assert torch.equal(all_others, raw(FinerCAM(n_similar=logits.shape[1] - 1), model, pictures()))


def test_finercam_needs_other_classes() -> None:
    with pytest.raises(ValueError, match="n_similar must be at least 1"):
        FinerCAM(n_similar=0)
    single = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1)).double()
    with pytest.raises(ValueError, match="a single logit"):
        FinerCAM()(single, pictures(), torch.tensor([0, 0]))


def test_gradcam_plus_plus_equals_its_closed_form(model: GapLinear, activations: Tensor) -> None:
    positions = activations[0, 0].numel()
    slope = model.head.weight[TARGETS] / positions
    weights = positions * slope.relu() / (2 + slope * activations.sum((2, 3)))
    assert torch.allclose(raw(GradCAMPlusPlus(), model, pictures()), weighted(weights, activations), atol=1e-12)


@pytest.mark.parametrize("method", [GradCAMPlusPlus(), SmoothGradCAMPlusPlus(n_samples=2)])
def test_gradcam_plus_plus_is_exact_for_tiny_gradients_in_float32(model: GapLinear, method: ActivationMap) -> None:
    """g = 1e-15 makes g^3 underflow: the formula with a fixed epsilon would lose the map."""
    images = pictures()
    with torch.no_grad():
        model.head.weight.mul_(1e-15)
    exact = raw(method, model, images)
    single = raw(method, model.float(), images.float()).double()
    assert exact.max() > 0
    assert torch.allclose(single, exact, rtol=1e-3, atol=1e-3 * exact.max())


def test_scorecam_with_channels_uses_the_maps_that_vary_most(model: GapLinear, activations: Tensor) -> None:
    images, found = pictures(), raw(ScoreCAM(channels=2), model, pictures())
    for b, target in enumerate(TARGETS.tolist()):
        maps = activations[b]
        deviation = (maps - maps.mean((1, 2), keepdim=True)).square().mean((1, 2))
        chosen = deviation.argsort(descending=True)[:2]
        gains = []
        for k in chosen.tolist():
            unit = (maps[k] - maps[k].min()) / (maps[k].max() - maps[k].min())
            up = F.interpolate(unit[None, None], images.shape[-2:], mode="bilinear", align_corners=False)
            with torch.no_grad():
                gains.append((model(images[b : b + 1] * up) - model(torch.zeros_like(images[:1])))[0, target])
        expected = (torch.stack(gains).softmax(0)[:, None, None] * maps[chosen]).sum(0).relu()
        assert torch.allclose(found[b], expected, atol=1e-10)
    every = raw(ScoreCAM(channels=99), model, pictures())
    assert torch.equal(every, raw(ScoreCAM(), model, pictures()))
    assert not torch.allclose(found, every, atol=1e-3)


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"precision": "fp8"}])
def test_scorecam_refuses_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        ScoreCAM(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [GapLinear, DeepTail])
def test_smooth_without_noise_is_gradcam_plus_plus(network: type[nn.Module]) -> None:
    model = seeded(network)
    smooth = raw(SmoothGradCAMPlusPlus(n_samples=1, std=0.0), model, pictures())
    assert torch.allclose(smooth, raw(GradCAMPlusPlus(), model, pictures()), atol=1e-12)


def test_smooth_averages_derivatives_over_its_own_noise() -> None:
    from labn.explainers.gradient import gaussian_noise

    model, images = seeded(DeepTail), pictures()
    powers = []
    for draw in range(3):
        noisy = images + 0.2 * gaussian_noise(images, None, 0, range(draw, draw + 1))[0]
        maps = model.features(noisy).detach().requires_grad_()
        scores = model.head(model.pool(maps).flatten(1)).gather(1, TARGETS[:, None]).sum()
        (slope,) = torch.autograd.grad(scores, maps)
        powers.append(torch.stack([slope, slope**2, slope**3]))
    first, second, third = torch.stack(powers).mean(0)
    clean = model.features(images).detach()
    factor = torch.where(second > 0, second / (2 * second + clean.sum((2, 3), keepdim=True) * third), 0)
    expected = weighted((factor * first.relu()).sum((2, 3)), clean)
    found = raw(SmoothGradCAMPlusPlus(n_samples=3, std=0.2), model, images)
    assert torch.allclose(found, expected, atol=1e-12)
    # The paper's own numerator differs.
    printed = raw(SmoothGradCAMPlusPlus(n_samples=3, std=0.2, numerator="D1"), model, images)
    assert not torch.allclose(printed, expected, atol=1e-6)


def test_gradcam_equals_its_definition_with_a_deep_tail() -> None:
    model, images = seeded(DeepTail), pictures()
    maps = model.features(images).detach().requires_grad_()
    scores = model.head(model.pool(maps).flatten(1)).gather(1, TARGETS[:, None]).sum()
    (slope,) = torch.autograd.grad(scores, maps)
    assert torch.allclose(raw(GradCAM(), model, images), weighted(slope.mean((2, 3)), maps.detach()), atol=1e-12)


def test_xgradcam_sums_to_the_score_of_a_tail_without_bias() -> None:
    model, images = seeded(GapLinear, bias=False), pictures()
    signed = raw(XGradCAM(relu=False), model, images)
    scores = model(images).gather(1, TARGETS[:, None]).squeeze(1)
    assert torch.allclose(signed.sum((1, 2)), scores, atol=1e-12)


def test_relu_false_keeps_the_sign(model: GapLinear) -> None:
    signed = raw(GradCAM(relu=False), model, pictures())
    assert signed.min() < 0
    assert torch.equal(signed.relu(), raw(GradCAM(), model, pictures()))


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize("weighting", ["softmax", "gain", "score"])
def test_scorecam_equals_its_definition(model: GapLinear, activations: Tensor, score: str, weighting: str) -> None:
    images = pictures()
    read = {"logit": lambda y: y, "probability": lambda y: y.softmax(1)}[score]
    rows = []
    for b, target in enumerate(TARGETS.tolist()):
        maps = activations[b]
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        unit = torch.where(high > low, (maps - low) / (high - low), 0)
        up = F.interpolate(unit[None], images.shape[-2:], mode="bilinear", align_corners=False)[0]
        with torch.no_grad():
            gain = torch.stack([read(model((images[b] * mask)[None]))[0, target] for mask in up])
            baseline = read(model(torch.zeros_like(images[:1])))[0, target]
        rows.append({"softmax": (gain - baseline).softmax(0), "gain": gain - baseline, "score": gain}[weighting])
    if weighting == "softmax":
        assert torch.allclose(torch.stack(rows).sum(1), torch.ones(2, dtype=torch.float64))
    found = raw(ScoreCAM(score=score, weighting=weighting), model, images)
    assert torch.allclose(found, weighted(torch.stack(rows), activations), atol=1e-10)


@pytest.mark.parametrize("network", [GapLinear, DeepTail])
@pytest.mark.parametrize("closed_form", [True, False])
def test_ablationcam_equals_its_definition(network: type[nn.Module], closed_form: bool) -> None:
    model, images = seeded(network), pictures()
    activations = model.features(images).detach()
    rows = []
    for b, target in enumerate(TARGETS.tolist()):
        scores = []
        for k in range(activations.shape[1]):
            without = activations[b : b + 1].clone()
            without[:, k] = 0
            scores.append(model.head(model.pool(without).flatten(1))[0, target])
        whole = model(images[b : b + 1])[0, target]
        rows.append((whole - torch.stack(scores)) / whole)
    found = raw(AblationCAM(closed_form=closed_form, chunk_size=4), model, images)
    assert torch.allclose(found, weighted(torch.stack(rows).detach(), activations), atol=1e-10)


class Crossing(nn.Module):
    """A connection that passes the target layer, a functional step, and a module that runs twice."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join = join
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.target = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8 if join == "cat" else 4, 4, 1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = self.relu(self.stem(x) * 2)
        late = self.target(early)
        joined = torch.cat([early, late], 1) if self.join == "cat" else early + late
        return self.head(self.relu(self.last(joined)).amax((2, 3)))


@pytest.mark.parametrize(("join", "cut"), [("add", True), ("cat", False)])
def test_tail_gives_the_networks_own_logits(join: str, cut: bool) -> None:
    """With `cat` the records of one image do not fit many feature maps, and the whole network runs instead."""
    model, images = seeded(Crossing, join=join), pictures(1)
    with torch.no_grad():
        tail = Tail(model, model.target, images)
        changed = tail.activations * torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)[:, None, None, None]
        found = tail(changed)
        early = model.relu(model.stem(images) * 2).expand(4, -1, -1, -1)
        joined = torch.cat([early, changed], 1) if join == "cat" else early + changed
        expected = model.head(model.relu(model.last(joined)).amax((2, 3)))
    assert tail.cut is cut
    assert torch.allclose(found, expected, atol=1e-12)


def test_tail_does_not_run_the_trunk_again() -> None:
    model = seeded(DeepTail)
    calls = []
    explainer = AblationCAM(target_layer="features", closed_form=False)
    model.features[0].register_forward_hook(lambda *_: calls.append(1))
    raw(explainer, model, pictures(1), TARGETS[:1])  # looks at the model once: its target layer, two equal calls
    calls.clear()
    raw(explainer, model, pictures(1), TARGETS[:1])
    assert len(calls) == 1


def test_ablationcam_is_class_weights_times_mean_over_score(model: GapLinear, activations: Tensor) -> None:
    scores = model(pictures()).gather(1, TARGETS[:, None])
    weights = model.head.weight[TARGETS] * activations.mean((2, 3)) / scores
    assert torch.allclose(raw(AblationCAM(), model, pictures()), weighted(weights.detach(), activations), atol=1e-12)


def test_cam_refuses_a_deep_tail() -> None:
    with pytest.raises(ValueError, match="global average pooling and one linear layer"):
        CAM()(seeded(DeepTail), pictures(), TARGETS)


def test_an_inplace_relu_after_the_layer_changes_nothing() -> None:
    plain, inplace = seeded(GapLinear), seeded(GapLinear, inplace=True)
    for layer in ("features.3", "features"):
        a, b = (raw(GradCAM(layer), m, pictures()) for m in (plain, inplace))
        assert torch.equal(a, b)
        assert a.max() > 0


def test_the_map_of_a_layer_equals_that_of_its_channels_last_twin() -> None:
    """A network that keeps (B, h, w, K), as Swin does, gives the map of the same network with (B, K, h, w)."""

    class Permuted(GapLinear):
        def __init__(self) -> None:
            super().__init__(channels=12)
            self.turn = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            maps = self.turn(self.features(x).permute(0, 2, 3, 1) * 1.0)
            return self.head(maps.mean((1, 2)))

    model = seeded(Permuted)
    for method in (GradCAM, GradCAMPlusPlus, AblationCAM):
        assert torch.allclose(raw(method("turn"), model, pictures()), raw(method("features"), model, pictures()))


@pytest.mark.parametrize(
    ("explainer", "arguments", "message"),
    [
        (ScoreCAM, {"score": "odds"}, "score must be one of"),
        (ScoreCAM, {"weighting": "none"}, "weighting must be one of"),
        (SmoothGradCAMPlusPlus, {"n_samples": 0}, "n_samples must be at least 1"),
        (SmoothGradCAMPlusPlus, {"std": -1.0}, "std must not be negative"),
        (SmoothGradCAMPlusPlus, {"numerator": "D3"}, "numerator must be one of"),
    ],
)
def test_bad_arguments_are_refused(explainer: type[ActivationMap], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explainer(**arguments)
