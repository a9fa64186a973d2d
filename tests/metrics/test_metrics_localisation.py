import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import Constant

from labn.metrics import MapAUROC, PointingGame, RelevanceMass, RelevanceRank
from labn.metrics.functional import (
    boxes_to_masks,
    map_auroc,
    otsu_iou,
    otsu_regions,
    pointing_game,
    relevance_mass,
    relevance_rank,
    topk_localisation,
)

MASK = torch.tensor([[[1, 1, 0], [0, 0, 0]]], dtype=torch.bool)


def cases(seed: int, levels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(-levels, levels, (3, 4, 5), generator=generator).double()
    masks = torch.rand(3, 4, 5, generator=generator) < 0.3
    masks[:, 0, 0], masks[:, 0, 1] = True, False
    return maps, masks


def test_pointing_game_is_the_share_of_maxima_inside():
    assert pointing_game(torch.tensor([[[5.0, 1, 2], [3, 4, 0]]]), MASK).item() == 1
    assert pointing_game(torch.tensor([[[4.0, 1, 2], [3, 5, 0]]]), MASK).item() == 0
    assert pointing_game(torch.tensor([[[5.0, 1, 5], [3, 5, 5]]]), MASK).item() == 0.25


def test_relevance_mass_counts_positive_values_only():
    assert relevance_mass(torch.tensor([[[2.0, -9, 1], [3, -4, 0]]]), MASK).item() == pytest.approx(2 / 6)
    assert relevance_mass(torch.full((1, 2, 3), -1.0), MASK).item() == 0
    assert relevance_mass(torch.ones(1, 2, 3), MASK).item() == pytest.approx(1 / 3)


def test_relevance_rank_is_the_hit_rate_among_the_top_pixels():
    assert relevance_rank(torch.tensor([[[5.0, 1, 2], [3, 4, 0]]]), MASK).item() == 0.5
    assert relevance_rank(torch.tensor([[[5.0, 4, 2], [3, 1, 0]]]), MASK).item() == 1
    assert relevance_rank(torch.ones(1, 2, 3), MASK).item() == pytest.approx(1 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_relevance_rank_with_ties_is_the_mean_over_random_orders(seed):
    maps, masks = cases(seed, 2)
    rng = np.random.default_rng(seed)
    hits = []
    for _ in range(400):
        order = np.lexsort((rng.random(20), -maps[0].flatten().numpy()))
        hits.append(masks[0].flatten().numpy()[order[: int(masks[0].sum())]].mean())
    assert relevance_rank(maps, masks)[0].item() == pytest.approx(np.mean(hits), abs=0.06)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_auroc_is_the_share_of_ordered_pairs(seed):
    maps, masks = cases(seed)
    for value, one, mask in zip(map_auroc(maps, masks), maps, masks):
        inside, outside = one[mask][:, None], one[~mask][None]
        expected = ((inside > outside).double() + (inside == outside).double() / 2).mean()
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_auroc_of_the_negated_map_is_the_complement(seed):
    maps, masks = cases(seed)
    assert torch.allclose(map_auroc(maps, masks) + map_auroc(-maps, masks), torch.ones(3).double())


@pytest.mark.parametrize("function", [pointing_game, relevance_mass, relevance_rank, map_auroc])
def test_samples_are_independent_and_empty_regions_left_out(function):
    maps, masks = cases(1)
    masks[1] = False
    together = function(maps, masks)
    assert together.isnan().tolist() == [False, True, False]
    assert torch.equal(function(maps[2:], masks[2:]), together[2:])
    with pytest.raises(ValueError, match="masks must be"):
        function(maps, masks[:, :2])


def test_auroc_of_a_region_that_fills_the_image_is_nan():
    assert map_auroc(torch.rand(1, 2, 3), torch.ones(1, 2, 3).bool()).isnan().all()


def test_boxes_cover_pixels_whose_centre_is_inside():
    boxes = [torch.tensor([[1.0, 0, 3, 2], [4, 3, 5, 4]]), torch.zeros(0, 4), torch.tensor([[0.4, 0.4, 1.6, 0.6]])]
    masks = boxes_to_masks(boxes, (4, 5))
    assert masks[0].int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert not masks[1].any()
    assert masks[2].nonzero().tolist() == [[0, 0], [0, 1]]
    padded = torch.tensor([[[1.0, 0, 3, 2], [4, 3, 5, 4]], [[1, 0, 3, 2], [0, 0, 0, 0]]])
    assert boxes_to_masks(padded, (4, 5)).sum((1, 2)).tolist() == [5, 4]


@pytest.mark.parametrize("metric", [RelevanceMass, PointingGame, RelevanceRank, MapAUROC])
def test_localisation_metrics_accept_masks_or_boxes(metric):
    maps, masks = cases(2)
    masks[1] = False
    model, images, ones = Constant([0.0, 1.0]), torch.zeros(3, 1, 4, 5), torch.ones(3, dtype=torch.long)
    one = metric()
    one.update(model, images, maps, ones, torch.arange(3), masks=masks)
    values = one.score(model, images, maps, ones, torch.arange(3), masks=masks)[metric.name]
    assert one.compute()[metric.name].item() == pytest.approx(values[[0, 2]].mean().item())
    boxes = torch.tensor([[[0.0, 0, 2, 2]]] * 3)
    boxed = one.score(model, images, maps, ones, torch.arange(3), boxes=boxes)[metric.name]
    filled = one.score(model, images, maps, ones, torch.arange(3), masks=boxes_to_masks(boxes, (4, 5)))[metric.name]
    assert torch.equal(boxed, filled)
    with pytest.raises(ValueError, match=f"metric '{metric.name}' compares with ground truth"):
        one.score(model, images, maps, ones, torch.arange(3))


def test_iou_by_hand():
    """Two of three region pixels are above the threshold, and one other pixel: 2 / 4."""
    maps = torch.tensor([[[0.9, 0.8, 0.1], [0.95, 0.0, 0.2]]])
    masks = torch.tensor([[[True, True, True], [False, False, False]]])
    assert otsu_iou(maps, masks).tolist() == [0.5]
    assert otsu_iou(masks.float(), masks).tolist() == [1.0]
    assert otsu_iou(torch.full_like(maps, 0.3), masks).tolist() == [0.5]  # the whole image
    assert otsu_iou(maps, torch.zeros_like(masks)).isnan().all()
    assert topk_localisation(masks.float(), masks).tolist() == [1.0]
    assert topk_localisation(-masks.float(), masks).tolist() == [0.0]


@pytest.mark.parametrize("seed", range(4))
def test_otsu_regions_are_the_best_of_all_thresholds(seed):
    values = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    values[0, 0, :3] = values[0, 1, 0]  # ties

    def between(above):
        share = above.double().mean()
        return share * (1 - share) * (values[above].mean() - values[~above].mean()) ** 2

    best = max((values > t for t in values.unique()[:-1]), key=between)
    assert torch.equal(otsu_regions(values), best)
    assert torch.equal(otsu_regions(1e-30 * values), best)
    assert torch.equal(otsu_regions(1e30 * values - 5), best)
