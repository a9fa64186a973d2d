import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from labn.metrics import bootstrap_mean, paired_difference, resampling, statistics
from labn.metrics.intervals import acceleration, bca_levels, bias, quantiles
from labn.metrics.resampling import resampled_sums
from labn.metrics.statistics import bootstrap_means, mean_table


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


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), grouped=st.booleans(), seed=st.integers(0, 9))
def test_bootstrap_means_equal_bootstrap_mean_of_each_column(sizes, grouped, seed):
    columns = [normal(size, seed + n) for n, size in enumerate(sizes)]
    for column in columns:
        column[column > 1.5] = math.nan
    groups = [torch.arange(size) // 3 if grouped else None for size in sizes]
    options = {"n_resamples": 40, "seed": seed}
    expected = [bootstrap_mean(c, groups=g, **options) for c, g in zip(columns, groups)]
    assert repr(list(bootstrap_means(zip(columns, groups), **options))) == repr(expected)


@pytest.mark.parametrize("cells", [1, 45, 90, 1000])
def test_bootstrap_means_do_not_depend_on_batches_or_blocks(monkeypatch, cells):
    columns = [(normal(size, size), None) for size in (5, 40, 40, 7, 40, 301)]
    expected = list(bootstrap_means(columns, n_resamples=50))
    monkeypatch.setattr(statistics, "CELLS", cells)
    monkeypatch.setattr(resampling, "_CELLS", cells)
    assert list(bootstrap_means(columns, n_resamples=50)) == expected


def test_percentiles_of_many_units_keep_their_recorded_digits():
    """Recorded with version 0.1, which added up drawn values one by one."""
    values = (torch.arange(1000, dtype=torch.float64) * 0.61803398875).frac()
    single, grouped = bootstrap_mean(values[:400]), bootstrap_mean(values, groups=(torch.arange(1000) * 7) % 333)
    assert (single.low, single.high) == pytest.approx((0.4719144431551655, 0.5285096670191493), rel=1e-13)
    assert (grouped.low, grouped.high) == pytest.approx((0.4842512662708532, 0.5156818945387576), rel=1e-12)


def test_bounds_of_few_units_keep_their_recorded_digits():
    values = (torch.arange(200, dtype=torch.float64) * 0.61803398875).frac()
    single, grouped = bootstrap_mean(values), bootstrap_mean(values, groups=torch.arange(200) // 7)
    assert (single.low, single.high) == pytest.approx((0.45866574345747035, 0.540384626960248), rel=1e-9)
    assert (grouped.low, grouped.high) == pytest.approx((0.4792722758821718, 0.5199144727087672), rel=1e-9)


def test_the_product_of_counts_equals_a_loop_over_resamples():
    sums = torch.stack([normal(60), normal(60, 1) * 1e-3 + 5, torch.arange(60).double()], dim=1)
    generator = torch.Generator().manual_seed(4)
    loop = torch.stack([sums[torch.randint(60, (60,), generator=generator)].sum(0) for _ in range(200)])
    found = resampled_sums(sums, 200, seed=4)
    assert torch.allclose(found, loop, rtol=1e-11, atol=1e-11)
    # Whole numbers are exact, so that a resample without any sample of a class has a count of 0.
    assert torch.equal(found[:, 2], loop[:, 2])


def test_resampled_sums_are_the_same_bits_for_any_number_of_threads_and_order_of_columns():
    sums = torch.stack([normal(500, seed) for seed in range(7)], dim=1)
    expected = resampled_sums(sums, 100, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(resampled_sums(sums.flip(1), 100, seed=0).flip(1), expected)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(resampled_sums(sums[:, [n]], 100, seed=0)[:, 0], expected[:, n]) for n in range(7))


def test_a_column_with_infinite_values_has_no_bounds_and_does_not_touch_others():
    sums = torch.tensor([[1.0, 1.0], [torch.inf, 2.0], [3.0, 4.0]], dtype=torch.float64)
    found = resampled_sums(sums, 50, seed=0)
    assert found[:, 0].isnan().all()
    assert torch.equal(found[:, 1], resampled_sums(sums[:, 1:], 50, seed=0)[:, 0])
    assert math.isnan(bootstrap_mean(sums[:, 0]).low)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_bca_without_bias_and_acceleration_is_the_percentile_interval(level):
    levels = bca_levels(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), level)
    assert levels.tolist() == [pytest.approx([(1 - level) / 2, (1 + level) / 2], abs=1e-12)] * 2
    # Many units: Student's t is the normal distribution.
    many = torch.tensor([1e9], dtype=torch.float64)
    wide = bca_levels(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), level, many)
    assert wide.tolist() == [pytest.approx(levels[0].tolist(), abs=1e-8)]


def test_bca_levels_equal_their_formula():
    z0, a, z = 0.2, 0.05, NormalDist().inv_cdf(0.975)
    expected = [NormalDist().cdf(z0 + (z0 + s * z) / (1 - a * (z0 + s * z))) for s in (-1, 1)]
    found = bca_levels(torch.tensor([z0], dtype=torch.float64), torch.tensor([a], dtype=torch.float64), 0.95)
    assert found.tolist() == [pytest.approx(expected, abs=1e-12)]


def test_acceleration_of_a_mean_is_a_sixth_of_the_skewness_by_the_root_of_n():
    """Efron and Tibshirani 1993, eq. 14.15: for a mean the jackknife is linear in the values."""
    values = torch.tensor([0.0, 0.1, 0.3, 0.4, 2.0, 5.0], dtype=torch.float64)
    d = values - values.mean()
    skewness = d.pow(3).mean() / d.square().mean().pow(1.5)
    jackknife = (values.sum() - values) / 5
    assert acceleration(jackknife[:, None]).item() == pytest.approx(skewness.item() / 6 / math.sqrt(6), rel=1e-12)
    assert acceleration(torch.ones(4, 1, dtype=torch.float64)).item() == 0.0


def test_bca_agrees_with_scipy():
    values = normal(40).exp().numpy()
    found = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(0))
    deviations = mean_table(torch.from_numpy(values)[:, None]).resampled(20_000, seed=0)
    jackknife = torch.from_numpy((values.sum() - values) / 39)[:, None]
    levels = bca_levels(bias(deviations), acceleration(jackknife), 0.95)
    bounds = values.mean() + quantiles(deviations, levels)[0]
    assert bounds.tolist() == pytest.approx(list(found.confidence_interval), abs=0.02)


def test_the_bias_counts_ties_half_and_leaves_nan_out():
    drawn = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, math.nan], [0.0, math.nan]], dtype=torch.float64)
    assert bias(drawn).tolist() == [0.0, 0.0]
    low = torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]], dtype=torch.float64)
    assert bias(low).item() == pytest.approx(NormalDist().inv_cdf(0.75))


@settings(deadline=None)
@given(values=st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=1, max_size=12), place=st.floats(0, 1))
def test_quantiles_are_those_of_numpy_without_nan(values, place):
    column = np.array([math.nan if value is None else value for value in values])
    found = quantiles(torch.from_numpy(column)[:, None], torch.tensor([[place, 0.5]], dtype=torch.float64))[0]
    known = column[~np.isnan(column)]
    if len(known):
        assert found.tolist() == pytest.approx(np.quantile(known, [place, 0.5]).tolist(), abs=1e-12)
    else:
        assert found.isnan().all()


def test_bounds_of_few_units_stay_in_the_range_of_the_units():
    interval = bootstrap_mean([0.0, 1.0, 1.0])
    assert (interval.low, interval.high) == (0.0, 1.0)
    grouped = bootstrap_mean([0.0, 0.5, 1.0, 1.0], groups=[0, 0, 1, 2])
    assert (grouped.low, grouped.high) == (0.25, 1.0)


def test_skewed_samples_have_skewed_bounds():
    values = normal(30).exp()
    interval = bootstrap_mean(values)
    assert interval.high - interval.mean > 1.2 * (interval.mean - interval.low)


@pytest.mark.parametrize("grouped", [False, True])
def test_nine_skewed_units_are_covered(grouped):
    """The benchmark in small: percentiles cover the mean of beta(.3, 1.5) in 84 of 100 such samples."""
    beta = torch.distributions.Beta(torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64))
    torch.manual_seed(0)
    samples = beta.sample((400, 9))
    groups = torch.arange(9).repeat_interleave(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 3])) if grouped else None
    columns = ((s if groups is None else s[groups], groups) for s in samples)
    covered = [i.low <= 0.3 / 1.8 <= i.high for i in bootstrap_means(columns, n_resamples=2000)]
    assert 0.91 <= np.mean(covered) <= 0.97
