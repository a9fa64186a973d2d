import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labn.metrics import bootstrap_mean, paired_difference, statistics
from labn.metrics.statistics import bootstrap_means


def normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_interval_of_many_samples_is_the_normal_one():
    values = normal(2000) * 3 + 1
    result = bootstrap_mean(values)
    error = values.std().item() / math.sqrt(2000)
    assert result.mean == pytest.approx(values.mean().item())
    assert result.low == pytest.approx(result.mean - 1.96 * error, abs=0.1 * error)
    assert result.high == pytest.approx(result.mean + 1.96 * error, abs=0.1 * error)
    assert result.n == 2000


def test_interval_has_its_nominal_coverage():
    covered = 0
    for seed in range(300):
        result = bootstrap_mean(normal(40, seed), n_resamples=500, seed=seed, level=0.9)
        covered += result.low <= 0 <= result.high
    assert 0.83 < covered / 300 < 0.95


def test_digits_depend_on_input_and_seed_alone():
    assert bootstrap_mean(normal(50), seed=1) == bootstrap_mean(normal(50).tolist(), seed=1)
    assert bootstrap_mean(normal(50), seed=1).low != bootstrap_mean(normal(50), seed=2).low


def test_interval_of_constant_single_and_missing_samples():
    single = bootstrap_mean([0.25])
    assert (single.mean, single.n) == (0.25, 1)
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    two = bootstrap_mean([0.0, 1.0])
    assert (two.low, two.high) == (0, 1)
    assert bootstrap_mean([math.nan, 2.0, math.nan]).n == 1
    nothing = bootstrap_mean([math.nan])
    assert math.isnan(nothing.mean)
    assert nothing.n == 0


def test_interval_of_groups_of_equal_values_is_that_of_one_value_per_group():
    values, groups = normal(30).repeat_interleave(20), torch.arange(30).repeat_interleave(20)
    plain, clustered = bootstrap_mean(values), bootstrap_mean(values, groups=groups)
    assert clustered.mean == pytest.approx(plain.mean)
    ratio = (clustered.high - clustered.low) / (plain.high - plain.low)
    assert ratio == pytest.approx(math.sqrt(20), rel=0.1)
    own = bootstrap_mean(values, groups=torch.arange(600))
    assert (own.low, own.high) == pytest.approx((plain.low, plain.high))


def test_paired_difference_matches_samples_by_index():
    shared = normal(100) * 10
    first, second = shared + 0.5 + 0.01 * normal(100, 1), shared
    shuffle = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    result = paired_difference(torch.arange(100), first, torch.arange(100)[shuffle], second[shuffle])
    assert 0.49 < result.low < 0.5 < result.high + 0.005
    assert result.high - result.low < 0.01
    assert result.n == 100


def test_paired_difference_counts_common_samples_only():
    result = paired_difference([1, 2, 3, 4], [1.0, 2.0, 3.0, math.nan], [4, 3, 2, 9], [0.0, 1.0, 1.5, 7.0])
    assert result.n == 2
    assert result.mean == pytest.approx((0.5 + 2.0) / 2)


def test_paired_difference_resamples_whole_groups():
    groups = {i: i // 10 for i in range(100)}
    steps = torch.tensor([groups[i] for i in range(100)]).double()
    wide = paired_difference(range(100), steps, range(100), torch.zeros(100), groups=groups)
    narrow = paired_difference(range(100), steps, range(100), torch.zeros(100))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), grouped=st.booleans(), seed=st.integers(0, 9))
def test_bootstrap_means_equal_bootstrap_mean_of_each_column(sizes, grouped, seed):
    columns = [normal(size, seed + n) for n, size in enumerate(sizes)]
    for column in columns:
        column[column > 1.5] = math.nan
    groups = [torch.arange(size) // 3 if grouped else None for size in sizes]
    options = {"n_resamples": 40, "seed": seed}
    expected = [bootstrap_mean(c, groups=g, **options) for c, g in zip(columns, groups)]
    assert repr(list(bootstrap_means(zip(columns, groups), **options))) == repr(expected)


def test_bootstrap_means_do_not_depend_on_the_batch_size(monkeypatch):
    columns = [(normal(size, size), None) for size in (5, 40, 40, 7, 40)]
    expected = list(bootstrap_means(columns, n_resamples=50))
    for block in (1, 45, 90, 1000):
        monkeypatch.setattr(statistics, "_BLOCK", block)
        assert list(bootstrap_means(columns, n_resamples=50)) == expected


def test_bootstrap_draws_keep_their_recorded_digits():
    values = (torch.arange(200, dtype=torch.float64) * 0.61803398875).frac()
    single, grouped = bootstrap_mean(values), bootstrap_mean(values, groups=torch.arange(200) // 7)
    assert (single.low, single.high) == pytest.approx((0.45891130063609803, 0.5394542746815661), rel=1e-14)
    assert (grouped.low, grouped.high) == pytest.approx((0.48085627508621115, 0.5180349187426405), rel=1e-14)
