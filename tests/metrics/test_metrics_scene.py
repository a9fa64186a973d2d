"""Importance of objects by drawing scenes again, and the metric `scene`."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from callbacks.checks import check_scorable
from datamodules import SyntheticFundus, SyntheticRelations
from labn import evaluate
from labn.errors import InputError
from labn.metrics import metric_by_name
from labn.metrics.functional import (
    object_importances,
    object_opinions,
    painted_importances,
    removal_design,
    scene_agreement,
    shapley_design,
)
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.scene import Scene

WEIGHTS = torch.tensor([0.5, -0.25, 2.0, 0.0, 1.0], dtype=torch.float64)


class Reader(nn.Module):
    """Logits (0, g(sums of the objects)) of an image in which object o is a block of 2 x 2 pixels."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        sums = nn.functional.avg_pool2d(x, 2).flatten(1)
        return torch.stack([torch.zeros_like(sums[:, 0]), self.function(sums)], 1)


def blocks(count: int) -> Scene:
    """Objects of 2 x 2 pixels in a row; a drawn object is white."""
    masks = torch.zeros(count, 2, 2 * count, dtype=torch.bool)
    for number in range(count):
        masks[number, :, 2 * number : 2 * number + 2] = True
    return Scene(
        tuple(f"block {n}" for n in range(count)),
        masks,
        lambda kept: (masks * kept.view(-1, 1, 1)).sum(0)[None].double(),
    )


def importances(function, count: int, **options) -> Tensor:
    scene = blocks(count)
    image = scene.draw(torch.ones(count, dtype=torch.bool))[None]
    (values,) = object_importances(
        Reader(function).double(), image, [scene], torch.tensor([1]), probability="logit", **options
    )
    return values


@pytest.mark.parametrize("importance", ["removal", "shapley"])
def test_importances_of_an_additive_network_are_its_weights(importance):
    values = importances(lambda sums: sums @ WEIGHTS + 3, 5, importance=importance)
    assert torch.allclose(values, WEIGHTS, atol=2e-6)
    assert values[3] == 0


def test_importances_of_a_conjunction():
    """Objects 0 and 1 count together alone: each takes all with it, and they share the Shapley value."""

    def both(sums):
        return sums[:, 0] * sums[:, 1]

    assert importances(both, 4).tolist() == [1, 1, 0, 0]
    assert torch.allclose(
        importances(both, 4, importance="shapley"), torch.tensor([0.5, 0.5, 0, 0]).double(), atol=2e-6
    )


def test_importances_of_a_disjunction():
    """Either of objects 0 and 1 suffices: neither removal changes anything, and the Shapley values see both."""

    def either(sums):
        return torch.maximum(sums[:, 0], sums[:, 1])

    assert importances(either, 4).tolist() == [0, 0, 0, 0]
    assert torch.allclose(
        importances(either, 4, importance="shapley"), torch.tensor([0.5, 0.5, 0, 0]).double(), atol=2e-6
    )


def brute_force(worth, n: int) -> list[float]:
    """Shapley values as the mean over all orders."""
    values = [0.0] * n
    for order in itertools.permutations(range(n)):
        for place, item in enumerate(order):
            values[item] += worth(frozenset(order[: place + 1])) - worth(frozenset(order[:place]))
    return [value / math.factorial(n) for value in values]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_exact_shapley_values_are_the_mean_over_all_orders(n):
    generator = torch.Generator().manual_seed(n)
    worths = {
        frozenset(c): float(torch.randn(1, generator=generator))
        for k in range(n + 1)
        for c in itertools.combinations(range(n), k)
    }
    design = shapley_design(n)
    outputs = torch.tensor([worths[frozenset(kept.nonzero().flatten().tolist())] for kept in design.kept])
    values = design.weights @ outputs.double()
    assert torch.allclose(values, torch.tensor(brute_force(worths.__getitem__, n)).double(), atol=1e-6)


def test_sampled_shapley_values_sum_to_the_difference_and_come_near():
    """Ten objects, five of them in pairs: efficiency holds for every order; the error shrinks with the orders."""
    strengths = torch.linspace(0, 1, 10, dtype=torch.float64)

    def worth(kept: Tensor) -> Tensor:
        kept = kept.double()
        return kept @ strengths + kept[:, :5].sum(1) ** 2

    exact = strengths.clone()
    exact[:5] += 5  # the five share 25
    errors = []
    for permutations in (4, 256):
        design = shapley_design(10, permutations, seed=1, index=7)
        values = design.weights @ worth(design.kept)
        assert values.sum() == pytest.approx(float(exact.sum()), abs=1e-9)
        assert len(design.kept) == len(design.kept.unique(dim=0)) <= permutations * 9 + 2
        errors.append(float((values - exact).abs().max()))
    assert errors[1] < 0.6 < errors[0]
    other = shapley_design(10, 4, seed=1, index=8)
    assert not torch.equal(other.kept, shapley_design(10, 4, seed=1, index=7).kept)


def test_removal_needs_a_scene_per_object_and_the_image():
    assert removal_design(7).kept.shape == (8, 7)


@pytest.mark.parametrize(
    ("make", "importance"),
    [(SyntheticFundus, "removal"), (SyntheticRelations, "removal"), (SyntheticRelations, "shapley")],
)
def test_a_network_that_reads_one_object_gives_the_others_no_importance(make, importance):
    """The network sees the pixels of one object, which hides all others, through a nonlinear function."""
    data = make(n_test=4, image_size=48)
    for index in range(4):
        scene = data.scene("test", index)
        mask, image = scene.masks[-1], scene.draw(torch.ones(len(scene.names), dtype=torch.bool))[None]

        class One(nn.Module):
            def forward(self, x: Tensor, mask: Tensor = mask) -> Tensor:
                seen = (x * mask).sum((1, 2, 3))
                return torch.stack([seen.sin(), seen.cos()], 1)

        (values,) = object_importances(One(), image, [scene], torch.tensor([0]), importance=importance)
        assert values[-1] != 0
        assert (values[:-1] == 0).all()


@pytest.fixture(scope="module")
def fundus():
    """A batch of images with its scenes, and a network with random weights."""
    torch.manual_seed(0)
    data = SyntheticFundus(n_test=6, image_size=48, batch_size=6)
    batch = next(iter(data.test_dataloader()))
    layers = [nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 2)).eval()
    return data, batch["image"], batch["label"], [data.scene("test", i) for i in range(6)], model


@pytest.mark.parametrize("name", ["scene", "scene_logit", "scene@shapley"])
@pytest.mark.parametrize("opinion", ["sum", "mean"])
def test_a_map_painted_from_the_importances_scores_one(fundus, name, opinion):
    data, images, labels, scenes, model = fundus
    probability = "logit" if "logit" in name else "softmax"
    kind = "shapley" if "shapley" in name else "removal"
    truth = object_importances(model, images, scenes, labels, importance=kind, probability=probability, permutations=4)
    maps = painted_importances(truth, scenes, opinion)
    names = [
        name,
        name.replace("scene_logit", "scene_logit_top") if "logit" in name else name.replace("scene", "scene_top"),
    ]
    scores = evaluate(
        model,
        images,
        maps,
        labels,
        names,
        scenes=scenes,
        opinion=opinion,
        permutations=4,
        mean=data.mean,
        std=data.std,
    )
    for value in scores.values():
        assert value.tolist() == pytest.approx([1] * 6, abs=1e-9)
    reverse = evaluate(
        model, images, -maps, labels, [name], scenes=scenes, opinion=opinion, permutations=4, mean=None, std=None
    )
    assert reverse[name].tolist() == pytest.approx([-1] * 6, abs=1e-9)


def test_opinions_are_sums_or_means_over_the_objects():
    scene, maps = blocks(2), torch.tensor([[[1.0, 2.0, 5.0, 5.0], [3.0, 4.0, 5.0, 5.0]]])
    assert object_opinions(maps, [scene])[0].tolist() == [10, 20]
    assert object_opinions(maps, [scene], "mean")[0].tolist() == [2.5, 5]


def test_agreement_by_hand():
    truth = torch.tensor([3.0, 1.0, 2.0, 0.0])
    same = scene_agreement([truth * 2, -truth, torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 1.0])], [truth] * 4)
    assert same["scene"][:3].tolist() == pytest.approx([1, -1, 0])
    # Opinion ranks 3, 1, 3, 3 and importance ranks 4, 2, 3, 1: covariance .5, variances 3 and 5.
    assert float(same["scene"][3]) == pytest.approx(1 / math.sqrt(15), abs=1e-9)
    assert same["scene_top"].tolist() == pytest.approx([1, 0, 1 / 4, 1 / 3])


def test_samples_without_a_truth_are_left_out():
    few, flat = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(5)
    scores = scene_agreement([few, torch.arange(5.0)], [few, flat])
    assert scores["scene"].isnan().all()
    assert scores["scene_top"].isnan().all()


def test_scenes_run_once_for_all_maps_and_readings(fundus):
    data, images, labels, scenes, model = fundus
    engine = PerturbationEngine.for_model(model, images)
    index, more = torch.arange(6), {"scenes": scenes, "cache": engine}
    metric = metric_by_name("scene", mean=data.mean, std=data.std)
    objects = sum(len(scene.names) for scene in scenes)
    for seed in range(3):
        maps = torch.rand(6, 48, 48, generator=torch.Generator().manual_seed(seed))
        metric.score(model, images, maps, labels, index, **more)
        assert engine.forwards == objects + 6


def test_scores_do_not_depend_on_batch_and_chunk(fundus):
    data, images, labels, scenes, model = fundus
    maps = torch.rand(6, 48, 48, generator=torch.Generator().manual_seed(0))
    options = {"mean": data.mean, "std": data.std, "permutations": 4}
    names = ["scene", "scene_logit_top", "scene@shapley"]
    whole = evaluate(model, images, maps, labels, names, scenes=scenes, indices=torch.arange(6), **options)
    for i in range(6):
        one = slice(i, i + 1)
        own = {"scenes": scenes[one], "indices": torch.tensor([i]), "chunk_size": 3}
        alone = evaluate(model, images[one], maps[one], labels[one], names, **own, **options)
        for name in names:
            assert float(alone[name]) == pytest.approx(float(whole[name][i]), abs=1e-9)


def test_inputs_that_do_not_fit_raise(fundus):
    data, images, labels, scenes, model = fundus
    options = {"mean": data.mean, "std": data.std}
    maps = torch.rand(6, 48, 48)
    with pytest.raises(InputError, match=r"metric 'scene' draws .* needs scenes="):
        evaluate(model, images, maps, labels, ["scene"], **options)
    with pytest.raises(InputError, match=r"scenes must have one entry per image \(6,\), got 5"):
        evaluate(model, images, maps, labels, ["scene"], scenes=scenes[:5], **options)
    with pytest.raises(InputError, match="drawing scene 0 does not give its image"):
        evaluate(model, images, maps, labels, ["scene"], scenes=scenes[::-1], **options)
    with pytest.raises(InputError, match="importance must be one of"):
        object_importances(model, images, scenes, labels, importance="banzhaf")
    with pytest.raises(InputError, match="opinion must be one of"):
        object_opinions(maps, scenes, "max")
    with pytest.raises(InputError, match=r"masks must be \(1, H, W\) bool"):
        Scene(("a",), torch.zeros(2, 4, 4, dtype=torch.bool), lambda kept: kept)
    with pytest.raises(InputError, match="at most 62 objects"):
        shapley_design(63)


def test_data_without_scenes_is_refused_before_anything_is_explained(monkeypatch):
    monkeypatch.setattr(SyntheticFundus, "has_scenes", lambda self, split: False)
    with pytest.raises(InputError, match="test split of SyntheticFundus was not drawn from objects"):
        check_scorable({"scene": metric_by_name("scene")}, SyntheticFundus(n_test=2), "test")
