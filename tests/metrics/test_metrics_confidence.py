"""Average drop, percent increase and percentage in, against their equations written out per sample."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hmean
from scoring_models import Additive, Constant, Wavy, distinct, even, white

from labn import evaluate
from labn.explainers import ConstantMap, RandomMap
from labn.inference.model_traits import traits_of
from labn.metrics import (
    ADCC,
    AverageDrop,
    FillProbability,
    PatchInsertionDeletion,
    PercentageIn,
    PercentIncrease,
    metric_by_name,
)
from labn.metrics.functional import adcc, confidence_drop, confidence_increase, percent_counts
from labn.perturbation.engine import PerturbationEngine

INDICES = torch.arange(3)
TARGETS = torch.tensor([0, 1, 2])
PCTIN = [f"pctin_{form}{q}" for form in ("prob", "logit", "ratio") for q in (5, 10, 20, 25, 50)]


def batch(seed: int = 0, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 1, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randn(3, size, size, generator=generator, dtype=torch.float64)


class Counted(Wavy):
    """Keeps every input that it sees."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.extend(x.detach().clone())
        return super().forward(x)


def test_drop_and_increase_are_in_percent():
    whole, shown = torch.tensor([0.5, 0.5, 0.2, 0.0]), torch.tensor([0.25, 0.75, 0.2, 0.1])
    assert confidence_drop(whole, shown).tolist() == [50, 0, 0, 0]
    assert confidence_increase(whole, shown).tolist() == [0, 100, 0, 100]


def test_increase_ignores_rounding_and_keeps_nan():
    whole = torch.tensor([0.5, 0.5, torch.nan, 0.5], dtype=torch.float64)
    shown = torch.tensor([0.5 + 1e-7, 0.5 + 1e-5, 0.5, torch.nan], dtype=torch.float64)
    assert confidence_increase(whole, shown).nan_to_num(-1).tolist() == [0, 100, -1, -1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["normalised", "pixel"]))
def test_average_drop_and_percent_increase_follow_their_definition(seed, mask_space):
    (images, maps), model, mean, std = batch(seed), Wavy(16, seed), 0.3, 0.6
    drops, rises = [], []
    for image, one, c in zip(images, maps, TARGETS):
        e = (one - one.min()) / (one.max() - one.min())
        shown = e * image if mask_space == "normalised" else (e * (image * std + mean) - mean) / std
        y, o = (model(x[None]).softmax(1)[0, c].item() for x in (image, shown))
        drops.append(100 * max(0.0, y - o) / y)
        rises.append(100.0 * (o > y))
    options = {"mask_space": mask_space, "mean": [mean], "std": [std]}
    drop, rise = AverageDrop(**options), PercentIncrease(**options)
    assert drop.score(model, images, maps, TARGETS, INDICES)["average_drop"].tolist() == pytest.approx(drops, abs=1e-8)
    rise.update(model, images, maps, TARGETS, INDICES)
    assert rise.compute()["percent_increase"].item() == pytest.approx(sum(rises) / 3)
    assert not drop.higher_is_better
    assert rise.higher_is_better


def test_a_small_map_does_not_underflow_for_images_in_half_precision():
    """Values of 1e-7 are no different from each other there."""
    images, maps = batch()
    model, maps = Wavy(16), 1e-7 * maps.float()
    half, single = (
        AverageDrop().score(copy.deepcopy(model).to(dtype), images.to(dtype), maps, TARGETS, INDICES)["average_drop"]
        for dtype in (torch.float16, torch.float32)
    )
    assert single.max() > 10
    assert torch.allclose(half, single, atol=1)


def test_drop_of_an_additive_model_is_the_hidden_relevance():
    weights = torch.tensor([[0.5, 0.25], [0.125, 0.125]])
    maps = torch.tensor([[[3.0, 2.0], [1.0, 1.0]]])  # E = 1, 1/2, 0, 0
    one = torch.ones(1, dtype=torch.long)
    drop = AverageDrop().score(Additive(weights), white(2, 2), maps, one, one)["average_drop"].item()
    assert drop == pytest.approx(100 * (1 - 0.5 - 0.125))


def test_average_drop_of_a_constant_map_is_100_and_of_a_constant_model_0():
    one, model = torch.ones(1, dtype=torch.long), Additive(even(4, 4), 0.0)
    hidden = AverageDrop().score(model, white(4, 4), torch.ones(1, 4, 4), one, one)["average_drop"]
    assert hidden.item() == pytest.approx(100)  # a constant map is brought to 0 and shows nothing
    for metric in (AverageDrop(), PercentIncrease()):
        assert metric.score(Constant([0.3, 1.0]), white(4, 4), distinct(0, 4, 4), one, one)[metric.names[0]].item() == 0


def test_score_class_chooses_target_label_or_prediction():
    (images, maps), model = batch(), Wavy(16)
    labels, predicted = torch.tensor([2, 0, 0]), model(images).argmax(1)

    def score(score_class, targets):
        metric = AverageDrop(score_class=score_class)
        return metric.score(model, images, maps, targets, INDICES, labels=labels)["average_drop"]

    default = AverageDrop().score(model, images, maps, TARGETS, INDICES, labels=labels)["average_drop"]
    assert torch.equal(default, score("target", TARGETS))
    assert torch.equal(score("label", TARGETS), score("target", labels))
    assert torch.equal(score("predicted", TARGETS), score("target", predicted))
    assert not torch.equal(default, score("label", TARGETS))


def test_percent_counts_are_rounded_and_at_least_one():
    assert percent_counts(224 * 224, (5, 10, 20, 25, 50)).tolist() == [2509, 5018, 10035, 12544, 25088]
    assert percent_counts(9, (5, 100)).tolist() == [1, 9]
    with pytest.raises(ValueError, match=r"percents must be above 0 and at most 100, got \[10, 101\]"):
        PercentageIn([10, 101])
    with pytest.raises(ValueError, match="forms must be one of"):
        PercentageIn(forms=["odds"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999))
def test_percentage_in_shows_the_top_pixels_on_black(seed):
    (images, maps), model = batch(seed), Wavy(16, seed)
    found = PercentageIn(mean=[0.3], std=[0.6]).score(model, images, maps, TARGETS, INDICES)
    assert list(found) == PCTIN
    for row, (image, one, c) in enumerate(zip(images, maps, TARGETS)):
        whole = model(image[None]).softmax(1)[0, c].item()
        for q in (5, 10, 20, 25, 50):
            top = one.flatten().argsort(descending=True)[: max(1, round(q * 16 / 100 + 1e-9))]
            shown = torch.full((16,), -0.3 / 0.6, dtype=torch.float64)
            shown[top] = image.flatten()[top]
            logits = model(shown.view(1, 1, 4, 4))[0]
            probability = logits.softmax(0)[c].item()
            assert found[f"pctin_prob{q}"][row].item() == pytest.approx(probability, abs=1e-9)
            assert found[f"pctin_logit{q}"][row].item() == pytest.approx(logits[c].item(), abs=1e-9)
            assert found[f"pctin_ratio{q}"][row].item() == pytest.approx(probability / whole, abs=1e-9)


def test_percentage_in_values_are_points_of_the_insertion_curve():
    (images, maps), model = batch(), Wavy(16)
    full = PercentageIn([100]).score(model, images, maps, TARGETS, INDICES)
    logits = model(images)
    assert torch.allclose(full["pctin_logit100"], logits[INDICES, TARGETS])
    assert torch.allclose(full["pctin_prob100"], logits.softmax(1)[INDICES, TARGETS])
    assert full["pctin_ratio100"].tolist() == [1, 1, 1]
    curve = PatchInsertionDeletion(1, step=4).curves(model, images, maps, TARGETS, INDICES)
    quarters = PercentageIn([25, 50]).score(model, images, maps, TARGETS, INDICES)
    assert torch.allclose(quarters["pctin_prob25"], curve.insertion[:, 1])
    assert torch.allclose(quarters["pctin_prob50"], curve.insertion[:, 2])


def test_percentage_in_takes_tied_pixels_in_raster_order():
    one, model = torch.ones(1, dtype=torch.long), Additive(even(4, 5), 0.0)
    found = PercentageIn().score(model, white(4, 5), torch.ones(1, 4, 5), one, one)
    assert [found[f"pctin_prob{q}"].item() for q in (5, 10, 20, 25, 50)] == pytest.approx([0.05, 0.1, 0.2, 0.25, 0.5])


def test_pctin_with_a_percentage_is_the_logit():
    (images, maps), model = batch(), Wavy(16)
    found = evaluate(model, images, maps, TARGETS, ["pctin10", "pctin_logit10"], mean=None, std=None)
    assert list(found) == ["pctin10", "pctin_logit10"]
    assert torch.equal(found["pctin10"], found["pctin_logit10"])
    assert metric_by_name("pctin10").names == ("pctin10",)
    family = evaluate(model, images, maps, TARGETS, ["pctin"], mean=None, std=None, percents=[10], forms=["logit"])
    assert list(family) == ["pctin_logit10"]
    assert list(evaluate(model, images, maps, TARGETS, ["pctin"], mean=None, std=None)) == PCTIN


def test_confidence_metrics_share_their_forwards():
    (images, maps), model = batch(7, size=16), Counted(256)  # seed 0 draws the probe of `prepare`
    names = ["id", "pid16", "pctin", "average_drop", "percent_increase", "fill_probability"]
    traits_of(model, images)  # two equal calls, once per model
    model.seen.clear()
    evaluate(model, images, maps, None, names, mean=None, std=None, step=4)
    seen = torch.stack(model.seen)
    assert [int((seen == image).flatten(1).all(1).sum()) for image in images] == [1, 1, 1]

    engine = PerturbationEngine.for_model(model, images, fold=False)
    forwards = []
    for name in names:
        metric_by_name(name, fill="black", step=4).score(model, images, maps, TARGETS, INDICES, cache=engine)
        forwards.append(engine.forwards)
    pixel_steps = 256 // 4 - 1
    assert forwards[0] == 3 + 1 + 3 * 2 * pixel_steps  # images, the bare fill, both curves in between
    assert forwards[1] == forwards[0]  # one patch: all or nothing
    assert forwards[2] - forwards[1] == 3 * 3  # 25 and 50 % of the pixels are points of the curve, 5, 10, 20 % not
    assert forwards[3] - forwards[2] == 3
    assert forwards[5] == forwards[3]


def test_positives_only_leaves_samples_out_without_a_forward():
    (images, maps), model = batch(), Wavy(16)
    labels = torch.tensor([0, 1, 0])
    for metric in (AverageDrop(positives_only=True), PercentageIn(positives_only=True)):
        engine = PerturbationEngine.for_model(model, images, fold=False)
        found = metric.score(model, images, maps, TARGETS, INDICES, labels=labels, cache=engine)
        assert all(values.isnan().tolist() == [True, False, True] for values in found.values())
        assert engine.forwards == (2 if isinstance(metric, AverageDrop) else 6)
        nobody = metric.score(model, images, maps, TARGETS, INDICES, labels=labels * 0)
        assert all(values.isnan().all() for values in nobody.values())


def seen_twice(model, images, targets, indices):
    """An explainer: the squares of the pixels plus the sample's target and index times their cubes."""
    return ((images**2) + (targets + indices).view(-1, 1, 1, 1) * images**3)[:, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["normalised", "pixel"]))
def test_adcc_equals_an_independent_computation(seed, mask_space):
    (images, _), model, mean, std = batch(seed), Wavy(16, seed), 0.3, 0.6
    indices = torch.tensor([4, 0, 2])
    maps = seen_twice(model, images, TARGETS, indices)
    metric = ADCC(mask_space=mask_space, mean=[mean], std=[std])
    found = metric.score(model, images, maps, TARGETS, indices, explainer=seen_twice)
    drops = AverageDrop(mask_space=mask_space, mean=[mean], std=[std]).score(model, images, maps, TARGETS, indices)
    for k, (image, one) in enumerate(zip(images, maps)):
        e = (one - one.min()) / (one.max() - one.min())
        shown = e * image if mask_space == "normalised" else (e * (image * std + mean) - mean) / std
        again = seen_twice(model, shown[None], TARGETS[k : k + 1], indices[k : k + 1])[0]
        coherency = (1 + np.corrcoef(e.flatten(), again.flatten())[0, 1]) / 2
        drop = drops["average_drop"][k].item() / 100
        assert found["adcc_coherency"][k].item() == pytest.approx(coherency, abs=1e-9)
        assert found["adcc_complexity"][k].item() == pytest.approx(e.mean().item())
        assert found["adcc"][k].item() == pytest.approx(hmean([coherency, 1 - e.mean().item(), 1 - drop]), abs=1e-9)


def test_maps_that_ignore_the_image_have_coherency_one():
    (images, _), model = batch(), Wavy(16)
    for explainer, complexity in ((RandomMap(), 0.5), (ConstantMap(), 0.0)):
        maps = explainer(model, images, TARGETS, INDICES)
        found = ADCC().score(model, images, maps, TARGETS, INDICES, explainer=explainer)
        assert torch.allclose(found["adcc_coherency"], torch.ones(3, dtype=torch.float64))
        assert found["adcc_complexity"].mean().item() == pytest.approx(complexity, abs=0.1)
        assert ((found["adcc"] >= 0) & (found["adcc"] <= 1)).all()
    assert adcc(torch.tensor(0.0), torch.tensor(0.5), torch.tensor(0.5)) == 0
    assert adcc(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0)) == 1


def test_adcc_of_a_sample_does_not_depend_on_the_others():
    (images, _), model = batch(), Wavy(16)
    maps = seen_twice(model, images, TARGETS, INDICES)
    labels, more = torch.tensor([1, 0, 1]), {"explainer": seen_twice}
    whole = ADCC().score(model, images, maps, TARGETS, INDICES, labels=labels, **more)
    part = ADCC(positives_only=True).score(model, images, maps, TARGETS, INDICES, labels=labels, **more)
    for name, values in part.items():
        assert values.isnan().tolist() == [False, True, False]
        assert torch.allclose(values[::2], whole[name][::2])
    with pytest.raises(ValueError, match="'adcc' explains the images seen through their maps: it needs explainer="):
        ADCC().score(model, images, maps, TARGETS, INDICES)


def test_correct_only_leaves_out_wrong_predictions():
    (images, maps), model = batch(), Wavy(16)
    labels = torch.tensor([0, 1, 2])
    right = model(images).argmax(1) == labels
    assert 0 < right.sum() < 3
    for metric in (AverageDrop(correct_only=True), PercentageIn(correct_only=True), FillProbability(correct_only=True)):
        found = metric.score(model, images, maps, TARGETS, INDICES, labels=labels)
        assert all(values.isfinite().tolist() == right.tolist() for values in found.values())


@pytest.mark.parametrize("name", ["average_drop", "percent_increase", "pctin_ratio20"])
def test_scores_of_a_batch_equal_those_of_its_samples(name):
    (images, maps), model = batch(size=8), Wavy(64)
    together = metric_by_name(name).score(model, images, maps, TARGETS, INDICES)[name]
    for i in range(3):
        one = slice(i, i + 1)
        alone = metric_by_name(name).score(model, images[one], maps[one], TARGETS[one], INDICES[one])[name]
        assert torch.allclose(alone, together[one], atol=1e-12)


def test_a_class_out_of_range_is_an_error():
    images, maps = batch()
    with pytest.raises(ValueError, match="must be from 0 to 2, as the model has 3 classes; got 0 to 3"):
        evaluate(Wavy(16), images, maps, [0, 1, 3], ["average_drop"], mean=None, std=None)
