"""The contrast of CRP for classifiers: closed forms at the last feature layer, discrimination on a trained network."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from labn import explain
from labn.explainers import ContrastiveLRP
from labn.explainers.base import top_k
from labn.lrp import Config, Contrast, backward, forward
from labn.lrp.initial import rivals
from labn.metrics.functional.detection import map_similarity
from labn.models import load_backbone


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 4),
        )
        .double()
        .eval()
    )  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_start_is_the_contrast_of_normalised_shares(net, images):
    """R_i = R_i[k*] - mean R_i[k] with R_i[k] = a_i w+_ik / sum a w+_k, propagated by the ordinary rules."""
    targets = torch.tensor([0, 3, 1])
    with torch.no_grad():
        a = net[:7](images)
        contributions = a[:, None] * net[7].weight.clamp(min=0)
        shares = contributions / contributions.sum(2, keepdim=True)
        own = shares[torch.arange(3), targets]
        contrast = own - (shares.sum(1) - own) / 3
    assert contrast.sum(1).abs().max() < 1e-12
    trace = forward(net, images, Config())
    expected = backward(trace, {"6": contrast}).sum(1)
    maps = ContrastiveLRP()(net, images, targets)
    torch.testing.assert_close(maps, expected.float(), rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
    assert float((expected.sum((1, 2)) / expected.abs().sum((1, 2))).abs().max()) < 1e-6


def test_the_maps_of_all_classes_cancel(net, images):
    maps = [ContrastiveLRP()(net, images, torch.full((3,), k)) for k in range(4)]
    assert float(sum(maps).abs().max()) < 1e-5 * float(maps[0].abs().max())


def test_rivals_are_all_the_most_probable_or_listed_classes():
    logits, targets = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0, 2])
    assert rivals(logits, targets, "all").tolist() == [[False, True, True, True], [True, True, False, True]]
    assert rivals(logits, targets, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert rivals(logits, targets, [2, 3]).tolist() == [[False, False, True, True], [False, False, False, True]]
    assert rivals(logits, targets, 1, background=0).tolist() == [[False, True, False, False]] * 2
    start = Contrast(2)(logits, targets)
    torch.testing.assert_close(start, torch.tensor([[1.0, -0.5, -0.5, 0.0], [-0.5, -0.5, 1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.3"):
        rivals(logits, targets, [4])
    with pytest.raises(ValueError, match="leaves a class without any other class"):
        rivals(logits, torch.tensor([1]), [1])


def test_the_softmax_contrast_is_the_direction_of_the_log_probability():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 4])
    log_probability = logits.log_softmax(1).gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_probability, logits)
    own = gradient.gather(1, targets[:, None])
    torch.testing.assert_close(Contrast("softmax")(logits.detach(), targets), gradient / own)


@pytest.mark.parametrize("others", [0, -1, "most", [], ["cat"]])
def test_bad_others_are_refused(others):
    with pytest.raises(ValueError, match=r"others is .* it must be 'all', 'softmax', a number of classes >= 1, or a"):
        ContrastiveLRP(others=others)


@pytest.mark.slow
@pytest.mark.data
def test_maps_of_two_classes_differ_on_a_trained_network(data_root):
    model = torchvision.models.resnet50()
    load_backbone(model, data_root / "imagenet" / "resnet50.safetensors")
    model.eval()
    files = sorted((data_root / "imagenet" / "images").iterdir())[::50]
    transform = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    images = torch.stack(
        [transform(torchvision.io.read_image(str(f), torchvision.io.ImageReadMode.RGB)) for f in files]
    )
    first, second = top_k(model, images, 2).T
    similarity = {
        method: map_similarity(*(explain(model, images, method, targets=k).maps for k in (first, second)))
        for method in ("lrp", "contrastive_lrp")
    }
    assert float(similarity["lrp"].min()) > 0.9
    assert bool((similarity["contrastive_lrp"] < similarity["lrp"] - 0.1).all())
