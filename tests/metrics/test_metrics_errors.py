"""Error analysis: coverage, area and mass by counting pixels; one kind per failure; the same counts from the tables."""

import pytest
import torch
from scoring_models import Additive, even

from labn.metrics import ErrorAnalysis, PatchInsertionDeletion, metric_by_name
from labn.metrics.functional import KINDS, ErrorThresholds, count_errors, kinds_of_error, region_shares
from labn.results.store import ScoreShard
from labn.results.tables import Plan, collect, count_rows

BOX = torch.zeros(8, 8, dtype=torch.bool)
BOX[2:6, 2:6] = True


def area(rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


CASES = {
    "insufficient": (area(slice(2, 3), slice(2, 5)), 3 / 16, 0.0),
    "over": (area(slice(0, 8), slice(0, 8)), 1.0, 48 / 64),
    "wrong": (area(slice(0, 2), slice(0, 8)), 0.0, 1.0),
    "other": (area(slice(2, 6), slice(2, 4)), 0.5, 0.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_equals_a_count_of_pixels(kind):
    mask, coverage, outside = CASES[kind]
    shares = region_shares(mask[None], BOX[None])
    assert [float(share) for share in shares] == [coverage, outside]
    mass = (mask & BOX).sum() / mask.sum()
    found = kinds_of_error(*(torch.as_tensor([float(v)]) for v in (*shares, mass)), ErrorThresholds())
    assert KINDS[int(found)] == kind


def test_thresholds_are_strict_and_wrong_takes_precedence():
    t = ErrorThresholds()
    coverage, outside, mass = (
        torch.tensor(v) for v in ([0.25, 0.75, 1.0, 0.1, 1.0], [0.0, 1.0, 0.5, 0.0, 0.9], [1.0, 1.0, 0.25, 0.1, 0.1])
    )
    names = [KINDS[k] for k in kinds_of_error(coverage, outside, mass, t).tolist()]
    assert names == ["other", "other", "other", "wrong", "wrong"]
    assert KINDS[int(kinds_of_error(coverage[:1], outside[:1], mass[:1], ErrorThresholds(low_coverage=0.3)))] == (
        "insufficient"
    )


def test_failures_are_the_lowest_scores_of_samples_with_a_box():
    scores = torch.tensor([0.9, 0.1, 0.3, 0.2, -1.0])
    coverage = torch.tensor([0.0, 0.0, 1.0, 0.0, torch.nan])
    outside, mass = torch.tensor([0.0, 0.0, 0.9, 0.0, torch.nan]), torch.tensor([1.0, 1.0, 1.0, 0.0, torch.nan])
    counts = count_errors(scores, coverage, outside, mass, 3, ErrorThresholds())
    assert counts == {"failures": 3, "insufficient": 1, "over": 1, "wrong": 1, "other": 0}
    everything = count_errors(scores, coverage, outside, mass, 100, ErrorThresholds())
    assert everything == {"failures": 4, "insufficient": 2, "over": 1, "wrong": 1, "other": 0}


def samples():
    """White images, maps that are one inside their area, a model whose probability is the share of white pixels."""
    maps = torch.stack([mask.double() for mask, *_ in CASES.values()])
    maps[1, 2:6, 2:6] = 5.0
    maps[1] += torch.arange(64).view(8, 8) * 1e-3
    images = torch.ones(4, 1, 8, 8, dtype=torch.float64)
    return Additive(even(8, 8)), images, maps, torch.ones(4, dtype=torch.long), torch.arange(4)


def test_error_analysis_accepts_masks_or_boxes():
    model, images, maps, labels, indices = samples()
    metric = ErrorAnalysis(n_failures=4, n_steps=4, area_threshold="absolute", area_level=0.5)
    maps[1] += 0.5
    batch = (model, images, maps, labels, indices)
    boxes = torch.tensor([[[2.0, 2, 6, 6]]] * 4)
    values = metric.score(*batch, boxes=boxes)
    assert values["errors_coverage"].tolist() == [coverage for _, coverage, _ in CASES.values()]
    assert values["errors_outside"].tolist() == [outside for *_, outside in CASES.values()]
    plain = PatchInsertionDeletion(1, n_steps=4).score(*batch)["id"]
    assert torch.equal(values["errors_id"], plain)
    metric.update(*batch, masks=BOX.expand(4, 8, 8))
    assert {k: int(v) for k, v in metric.compute().items()} == {
        "failures": 4, "insufficient": 1, "over": 1, "wrong": 1, "other": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="metric 'errors' compares with ground truth: it needs masks= or boxes="):
        metric.score(*batch)


def test_area_is_the_pixels_above_the_mean_of_the_map():
    model, images, maps, labels, indices = samples()
    values = ErrorAnalysis(n_steps=2).score(model, images, maps, labels, indices, masks=BOX.expand(4, 8, 8))
    means = maps.mean((1, 2), keepdim=True)
    coverage = ((maps > means) & BOX).sum((1, 2)) / 16
    assert torch.allclose(values["errors_coverage"], coverage.double())


def test_error_counts_of_results_equal_those_of_the_metric():
    model, images, maps, labels, indices = samples()
    metric = metric_by_name("errors", n_steps=4, n_failures=2, mean=None, std=None)
    metric.update(model, images, maps, labels, indices, masks=BOX.expand(4, 8, 8))
    found, values = metric.per_sample()
    columns = {name: column.double().numpy() for name, column in values.items()}
    index = found.numpy()
    part = ScoreShard("a", "key", index, index, index, index, index / 4.0, columns, {"errors": "digest"})
    plan = Plan({"a": "key"}, {"errors": ("digest", metric.names)}, frozenset(range(4)), {"errors": metric.reduce})
    rows = list(count_rows(collect([part], plan), plan))
    assert rows == [("a", "errors", kind, int(count)) for kind, count in metric.compute().items()]
    assert rows[0][-1] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_failures": 0}, "n_failures is 0; it must be at least 1"),
        ({"low_mass": 25}, r"low_mass is 25; it is a share and must lie in \[0, 1\]"),
        ({"area_threshold": "median"}, "threshold='median' is not one of"),
    ],
)
def test_wrong_arguments_of_error_analysis_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ErrorAnalysis(**arguments)
