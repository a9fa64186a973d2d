"""Localisation, sparseness and region perturbation beside Quantus (Hedström et al., JMLR 2023)."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from labn.explainers import Gradient
from labn.metrics import IROF, MuFidelity, PatchInsertionDeletion, RandomLogit, ScoredBatch
from labn.metrics.functional import (
    gini_index,
    histogram_entropy,
    otsu_regions,
    pointing_game,
    relative_changes,
    relevance_mass,
    relevance_rank,
    topk_localisation,
)

quantus = pytest.importorskip("quantus", reason="quantus is not installed")
QUIET = {"disable_warnings": True, "display_progressbar": False}
SIZE = 12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 5)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def maps() -> Tensor:
    return torch.rand(4, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def masks() -> Tensor:
    drawn = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    for sample, (top, left, side) in enumerate([(0, 0, 6), (5, 5, 6), (2, 6, 3), (8, 0, 4)]):
        drawn[sample, top : top + side, left : left + side] = True
    return drawn


def theirs(metric, model: nn.Module, images: Tensor, maps: Tensor, masks: Tensor | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=np.arange(len(images)),
            a_batch=maps[:, None].numpy().copy(),
            s_batch=None if masks is None else masks[:, None].numpy(),
            device="cpu",
        )
    return np.asarray(scores, dtype=float)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("PointingGame", pointing_game),
        ("RelevanceMassAccuracy", relevance_mass),
        ("RelevanceRankAccuracy", relevance_rank),
    ],
)
def test_localisation_metrics_equal_those_of_quantus(
    name: str, ours, model: nn.Module, images: Tensor, maps: Tensor, masks: Tensor
) -> None:
    focused = maps + masks * torch.tensor([1.0, 0, 0.1, 1])[:, None, None]
    expected = theirs(getattr(quantus, name)(**QUIET), model, images, focused, masks)
    assert ours(focused, masks).numpy() == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 1


def test_pointing_game_where_quantus_is_wrong(model: nn.Module, images: Tensor, masks: Tensor) -> None:
    """Any tied maximum inside counts as a hit there, so that a map without information is perfect; the share of the
    maxima that are inside, what a random choice among them gives, is right."""
    # Other levels per image: equal values in the whole batch are refused there.
    constant = torch.arange(1.0, 5.0).view(4, 1, 1).expand(4, SIZE, SIZE)
    assert theirs(quantus.PointingGame(**QUIET), model, images, constant, masks).tolist() == [1, 1, 1, 1]
    share = masks.double().mean((1, 2))
    assert torch.allclose(pointing_game(constant, masks), share)


def test_sparseness_equals_that_of_quantus(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    signed = maps - 0.5
    metric = quantus.Sparseness(abs=True, normalise=False, **QUIET)
    expected = theirs(metric, model, images, signed)
    # 1e-7 is added to every value there, against division by zero.
    assert gini_index(signed).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("patch_size", [3, 4])
def test_region_perturbation_is_the_deletion_curve(
    patch_size: int, model: nn.Module, images: Tensor, maps: Tensor
) -> None:
    """Their curve is p(c | x) - p(c | d_n) for n = 1, 2, ..., over patches ordered by their sum."""
    patches = (SIZE // patch_size) ** 2
    metric = quantus.RegionPerturbation(
        patch_size=patch_size, regions_evaluation=patches, perturb_baseline=0.0, normalise=False, **QUIET
    )
    expected = theirs(metric, model, images, maps)
    ours = PatchInsertionDeletion(patch_size, step=1, pooling="sum", fill="mean")
    curve = ours.curves(model, images, maps, torch.arange(4), torch.arange(4)).deletion
    assert (curve[:, :1] - curve[:, 1:]).numpy() == pytest.approx(expected, abs=1e-5)


def test_black_of_quantus_is_not_black(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    """Its "black" is the smallest normalised value of the image itself over all channels; black is the pixel value 0
    in every channel."""
    found, lowest = (
        theirs(
            quantus.RegionPerturbation(
                patch_size=4, regions_evaluation=9, perturb_baseline=baseline, normalise=False, **QUIET
            ),
            model,
            images[:1],
            maps[:1],
        )
        for baseline in ("black", images[0].min().item())
    )
    assert found == pytest.approx(lowest, abs=1e-6)
    ours = PatchInsertionDeletion(4, step=1, pooling="sum", mean=[0.4, 0.5, 0.6], std=[0.25] * 3)
    zero = torch.zeros(1, dtype=torch.long)
    curve = ours.curves(model, images[:1], maps[:1], zero, zero)
    black = (torch.zeros(3) - torch.tensor([0.4, 0.5, 0.6])) / 0.25
    expected = model(black.view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)).softmax(1)[0, 0].item()
    assert curve.deletion[0, -1].item() == pytest.approx(expected, abs=1e-6)
    assert curve.deletion[0, 0].item() - expected != pytest.approx(found[0, -1], abs=1e-3)


def test_avg_and_max_sensitivity_have_quantus_definition(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    """The same norm of the same difference, of the same noise."""
    moved = maps + 0.1 * torch.rand(4, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    before, after = (values.double().flatten(1).numpy() for values in (maps, moved))
    expected = quantus.norm_func.fro_norm(after - before) / quantus.norm_func.fro_norm(before)
    assert relative_changes(maps, moved).numpy() == pytest.approx(expected, abs=1e-9)


def test_random_logit_equals_quantus_of_two_classes(images: Tensor) -> None:
    """With two classes the other one is the same in both; Quantus draws it from a global generator."""
    torch.manual_seed(0)
    two = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    targets, indices = torch.tensor([0, 1, 1, 0]), torch.arange(4)
    maps = Gradient()(two, images, targets)
    found = RandomLogit().score(two, images, maps, targets, indices, explainer=Gradient())["random_logit"]

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: object) -> np.ndarray:
        return Gradient()(model, torch.as_tensor(inputs), torch.as_tensor(targets))[:, None].numpy()

    def spearman(a: np.ndarray, b: np.ndarray, **_: object) -> np.ndarray:  # Quantus' own fails on single images
        return np.array([spearmanr(x, y)[0] for x, y in zip(a, b)])

    metric = quantus.RandomLogit(num_classes=2, similarity_func=spearman, abs=False, normalise=False, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = metric(
            model=two, x_batch=images.numpy(), y_batch=targets.numpy(), a_batch=maps[:, None].numpy().copy(),
            explain_func=explain, device="cpu",
        )  # fmt: skip
    assert found.numpy() == pytest.approx(np.asarray(expected, dtype=float), abs=1e-6)


def test_topk_localisation_follows_quantus_topk_intersection(
    model: nn.Module, images: Tensor, maps: Tensor, masks: Tensor
) -> None:
    """Quantus counts the share of the k highest pixels inside; with k the mask's size, the union follows from it."""
    focused = maps + masks * torch.tensor([1.0, 0, 0.1, 0.5])[:, None, None]
    for sample in range(4):
        one = slice(sample, sample + 1)
        metric = quantus.TopKIntersection(k=int(masks[sample].sum()), **QUIET)
        share = theirs(metric, model, images[one], focused[one], masks[one])
        assert topk_localisation(focused[one], masks[one]).numpy() == pytest.approx(share / (2 - share), abs=1e-6)


def test_otsu_regions_equal_opencvs_on_grey_values(maps: Tensor) -> None:
    """OpenCV's threshold is one of 256 grey values; between two neighbouring values any threshold is the same."""
    grey = (maps**3 * 255).round().to(torch.uint8)
    for image, region in zip(grey, otsu_regions(grey.float())):
        _, expected = cv2.threshold(image.numpy(), 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        assert np.array_equal(region.numpy(), expected.astype(bool))


def test_mu_fidelity_equals_quantus_faithfulness_correlation(maps: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sets of single pixels, in place of those that Quantus draws from a global generator."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(150, 5)).eval()
    images = torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    ours = MuFidelity(draws=10, share=0.25, grid=SIZE, fill="mean")
    targets = torch.arange(4)
    found = ours.score(model, images, maps, targets, targets)["mufidelity"]
    size = SIZE * SIZE // 4
    sets = ours._ranks(targets, SIZE * SIZE).argsort(-1)[..., :size]  # (samples, draws, size)
    drawn = iter(sets.transpose(0, 1).flatten(0, 1).numpy())
    monkeypatch.setattr(np.random, "choice", lambda *_args, **_kwargs: next(drawn))
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=10, subset_size=size, perturb_baseline=0.0, abs=False, normalise=False, return_aggregate=False, **QUIET
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = metric(
            model=model, x_batch=images.numpy(), y_batch=targets.numpy(), a_batch=maps[:, None].numpy().copy(),
            softmax=False, device="cpu",
        )  # fmt: skip
    assert found.numpy() == pytest.approx(np.asarray(expected, dtype=float), abs=1e-4)


def test_irof_is_that_of_quantus_with_the_whole_image(
    model: nn.Module, images: Tensor, maps: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their curve lacks the image itself, and so the first interval: over L intervals it has the area of L - 1. The
    segments are those of this project in both."""
    ours, targets = IROF(n_segments=9), torch.arange(4)
    segments = iter(ours.segments(images).numpy())
    # Its own replacement wants a mask per channel, which its curve does not give it, and its area np.trapz.
    if not hasattr(np, "trapz"):
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    monkeypatch.setattr(
        "quantus.metrics.faithfulness.irof.utils.get_superpixel_segments", lambda **_kwargs: next(segments)
    )
    metric = quantus.IROF(
        perturb_func=lambda arr, mask, **_: np.where(mask, 0, arr),
        abs=False,
        normalise=False,
        return_aggregate=False,
        **QUIET,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_ = metric(
            model=model, x_batch=images.numpy(), y_batch=targets.numpy(), a_batch=maps[:, None].numpy().copy(),
            device="cpu",
        )  # fmt: skip
    batch = ScoredBatch(model, images, maps, targets, targets)
    x, p = ours._curve(batch, targets)
    count = 1 / x[:, 1]  # no two segments of a map without ties leave together
    first = (1 + p[:, 1] / p[:, 0]) / 2
    found = ours.score(model, images, maps, targets, targets)["irof"]
    assert (found * count + first).numpy() == pytest.approx(np.asarray(theirs_, dtype=float), abs=1e-4)


def test_the_entropy_of_emprt_equals_that_of_quantus(maps: Tensor) -> None:
    expected = [quantus.complexity_func.discrete_entropy(a=m.double().numpy(), x=m.numpy(), n_bins=50) for m in maps]
    assert histogram_entropy(maps, 50).numpy() == pytest.approx(np.array(expected), abs=1e-9)
