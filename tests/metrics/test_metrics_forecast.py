import math

import pytest
import torch
from sklearn.metrics import brier_score_loss, confusion_matrix

from labn.metrics import ForecastSkill, bootstrap_mean, bootstrap_sums
from labn.metrics.functional import forecast
from labn.metrics.intervals import FEW
from labn.metrics.resampling import resampled_sums


def drawn(n=60, classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator), torch.arange(n)


def filled(logits, labels, indices, groups=None, **options):
    metric = ForecastSkill(logits.shape[1], **options)
    metric.update(logits, labels, indices, groups)
    return metric


def test_tss_equals_its_closed_form():
    # 3 of 4 events hit, 1 of 5 non-events a false alarm
    labels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0])
    said = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0])
    logits = torch.nn.functional.one_hot(said, 2).double()
    values = filled(logits, labels, torch.arange(9)).compute()
    assert values["tss"].item() == pytest.approx(3 / 4 - 1 / 5, abs=1e-15)
    assert values["confusion"].tolist() == [[4, 1], [1, 3]]


@pytest.mark.parametrize("said", [0, 1])
def test_constant_and_climatological_forecasts_have_skill_zero(said):
    _, labels, indices = drawn()
    constant = torch.zeros(60, 2, dtype=torch.float64)
    constant[:, said] = 5.0
    assert filled(constant, labels, indices).compute()["tss"].item() == 0.0
    share = labels.double().mean()
    climate = torch.stack([1 - share, share]).log().expand(60, 2)
    assert filled(climate, labels, indices).compute()["brier_skill"].item() == pytest.approx(0.0, abs=1e-12)
    perfect = 1000.0 * torch.nn.functional.one_hot(labels, 2).double()
    values = filled(perfect, labels, indices).compute()
    assert (values["tss"].item(), values["brier_skill"].item()) == (1.0, 1.0)


def test_confusion_and_brier_score_equal_scikit_learn():
    logits, labels, indices = drawn()
    values = filled(logits, labels, indices).compute()
    probabilities = logits.softmax(1)[:, 1]
    base = labels.double().mean().expand(60)
    skill = 1 - brier_score_loss(labels, probabilities) / brier_score_loss(labels, base)
    assert values["brier_skill"].item() == pytest.approx(skill, abs=1e-12)
    logits, labels, indices = drawn(classes=4)
    values = filled(logits, labels, indices, positive=(2, 3)).compute()
    table = confusion_matrix(labels, logits.argmax(1))
    assert values["confusion"].tolist() == table.tolist()
    tss = table[2:, 2:].sum() / table[2:].sum() - table[:2, 2:].sum() / table[:2].sum()
    assert values["tss"].item() == pytest.approx(tss, abs=1e-12)


def test_skill_of_labels_of_one_class_is_nan():
    values = filled(torch.randn(5, 2), torch.zeros(5, dtype=torch.long), torch.arange(5)).compute()
    assert math.isnan(values["tss"])
    assert math.isnan(values["brier_skill"])


def test_skill_does_not_depend_on_order_batches_or_repeats():
    logits, labels, indices = drawn()
    whole = filled(logits, labels, indices).compute()
    parts = ForecastSkill(2)
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(7):
        parts.update(logits[rows], labels[rows], indices[rows])
    parts.update(logits[:9], labels[:9], indices[:9])
    values = parts.compute()
    assert all(torch.equal(values[name], whole[name]) for name in whole)


def test_intervals_resample_whole_days():
    """Frames of a day that are copies of one frame carry one frame's information."""
    logits, labels, _ = drawn(40)
    alone = filled(logits, labels, torch.arange(40), n_resamples=4000).compute()
    copies = torch.arange(40).repeat_interleave(24)
    hourly = (logits[copies], labels[copies], torch.arange(960))
    by_day = filled(*hourly, copies, n_resamples=4000).compute()
    by_frame = filled(*hourly, n_resamples=4000).compute()
    for name in ("tss", "brier_skill"):
        assert by_day[name].item() == pytest.approx(alone[name].item(), abs=1e-12)
        for bound in ("low", "high"):
            assert by_day[f"{name}_{bound}"].item() == pytest.approx(alone[f"{name}_{bound}"].item(), abs=1e-6)
        width = by_day[f"{name}_high"] - by_day[f"{name}_low"]
        assert width > 3 * (by_frame[f"{name}_high"] - by_frame[f"{name}_low"])


def test_bootstrap_sums_of_values_and_counts_equal_bootstrap_mean():
    values = torch.randn(FEW, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    columns = torch.stack([values, torch.ones(FEW, dtype=torch.float64)], dim=1)
    sums, mean = bootstrap_sums(columns, lambda s: s[:, 0] / s[:, 1]), bootstrap_mean(values)
    # The percentiles are the same; the bounds of means of fewer samples are widened as well.
    assert (sums.mean, sums.low, sums.high) == pytest.approx((mean.mean, mean.low, mean.high), abs=1e-12)


def test_few_sums_have_bca_bounds_without_widening():
    """At least as wide as percentiles of this symmetric sample, and inside the range of the resamples."""
    values = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], dtype=torch.float64)
    columns = torch.stack([values, torch.ones(6, dtype=torch.float64)], dim=1)
    interval = bootstrap_sums(columns, lambda s: s[:, 0] / s[:, 1])
    drawn = resampled_sums(columns, 10_000, seed=0)
    low, high = torch.quantile(drawn[:, 0] / 6, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert -2 <= interval.low < low < 0 < high < interval.high <= 2


def test_resamples_with_nan_are_left_out_of_the_interval():
    columns = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    interval = bootstrap_sums(columns, lambda s: s[:, 0] / s[:, 1], n_resamples=50)
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_brier_terms_of_perfect_forecasts_are_zero():
    terms = forecast.brier_terms(torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0, 1]))
    assert terms.tolist() == [0.0, 0.5, 2.0]
