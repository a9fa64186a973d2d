"""Differences taken together and ranks: closed forms, Holm as an upper bound, and the error rate of many pairs."""

import itertools
import math

import pytest
import torch

from labn.metrics import bootstrap_mean, comparisons, paired_difference
from labn.metrics.comparisons import Value, compare_values, step_down
from labn.metrics.intervals import FEW
from labn.metrics.statistics import mean_table


def scores(n, methods, seed=0, shift=0.0):
    """Values (n, methods) with a common part per sample; method k is better than method 0 by k times `shift`."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(n, methods, generator=generator, dtype=torch.float64)
    return shared + own + shift * torch.arange(methods)


def compared(columns, better=1, groups=None, **options):
    return next(compare_values([Value(columns, better, groups)], **options))


def bounds(interval):
    return interval.mean, interval.low, interval.high, interval.n


@pytest.mark.parametrize("n", [12, FEW + 50])
@pytest.mark.parametrize("grouped", [False, True])
def test_complete_values_have_the_intervals_of_single_columns_and_differences(n, grouped):
    columns, groups = scores(n, 4), torch.arange(n) // 2 if grouped else None
    found = compared(columns, groups=groups)
    for column, interval in zip(columns.T, found.intervals):
        assert bounds(interval) == pytest.approx(bounds(bootstrap_mean(column, groups=groups)), abs=1e-9)
    assert list(found.differences) == list(itertools.combinations(range(4), 2))
    for (a, b), difference in found.differences.items():
        alone = bootstrap_mean(columns[:, a] - columns[:, b], groups=groups)
        assert bounds(difference) == pytest.approx(bounds(alone), abs=1e-9)
        assert difference.mean == alone.mean


def test_missing_values_leave_samples_out_of_the_means_and_pairs_that_lack_them():
    columns = scores(40, 3)
    columns[:25, 1] = math.nan
    columns[30:, 2] = math.nan
    found = compared(columns)
    assert [interval.n for interval in found.intervals] == [40, 15, 30]
    assert {pair: d.n for pair, d in found.differences.items()} == {(0, 1): 15, (0, 2): 30, (1, 2): 5}
    index = torch.arange(40)
    for (a, b), difference in found.differences.items():
        alone = paired_difference(index, columns[:, a], index, columns[:, b])
        assert difference.mean == alone.mean
        # All 40 samples are drawn here, those with both values there: the widths are close, not equal.
        assert difference.high - difference.low == pytest.approx(alone.high - alone.low, rel=0.3)
    # Ranks are over the five samples that all methods have.
    means = columns[25:30].mean(0)
    assert {rank.n for rank in found.ranks} == {5}
    assert [rank.rank for rank in found.ranks] == (means[:, None] < means).sum(1).add(1).tolist()


@pytest.mark.parametrize("n", [40, FEW + 40])
def test_pairs_with_the_same_missing_samples_need_no_column_of_their_own(n):
    """Methods 0 and 1 have all samples, 2 and 3 lack the same ones: pairs within are those of complete values."""
    columns = scores(n, 4)
    columns[::7, 2:] = math.nan
    (prepared,) = map(comparisons._Prepared, [Value(columns)])
    assert prepared.tables[0].sums.shape[1] == 4 + 4
    assert prepared.tables[0].sizes.shape[1] == 2
    found = compared(columns).differences
    complete = compared(columns[:, :2]).differences[0, 1]
    assert bounds(found[0, 1]) == pytest.approx(bounds(complete), abs=1e-12)
    assert found[0, 1].p == complete.p
    lacking = columns[~columns[:, 2].isnan()]
    for (a, b), difference in found.items():
        alone = bootstrap_mean(columns[:, a] - columns[:, b])
        assert (difference.mean, difference.n) == (alone.mean, alone.n)
        assert difference.high - difference.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert found[2, 3].n == len(lacking)


@pytest.mark.parametrize("k", [4, FEW - 1])
@pytest.mark.parametrize("grouped", [False, True])
def test_pairs_of_few_samples_beside_many_have_the_bounds_of_their_own_data(k, grouped):
    """Methods 2 and 3 have values of few of many samples: BCa reads the data of each pair, in or out of `apart`."""
    columns = scores(2 * FEW, 4, seed=3).exp()
    columns[k:, 2:] = math.nan
    groups = torch.arange(2 * FEW) // 2 * 2 if grouped else None
    for (a, b), difference in compared(columns, groups=groups).differences.items():
        values = columns[:, a] - columns[:, b]
        table = mean_table(values[:, None], groups)
        low, high = table.bounds(table.resampled(10_000, 0), 0.95)
        assert (difference.low, difference.high) == pytest.approx((float(low), float(high)), abs=1e-9)
        values = values[~values.isnan()]
        assert values.min() - 1e-9 <= difference.low <= difference.high <= values.max() + 1e-9


def test_samples_without_any_value_and_methods_without_values_change_nothing():
    columns = scores(20, 2)
    wide = torch.full((30, 3), math.nan, dtype=torch.float64)
    wide[5:25, ::2] = columns
    found, expected = compared(wide), compared(columns)
    assert found.intervals == [expected.intervals[0], None, expected.intervals[1]]
    assert found.ranks == [expected.ranks[0], None, expected.ranks[1]]
    assert found.differences == {(0, 2): expected.differences[0, 1]}
    assert compared(wide[:5]).intervals == [None] * 3
    assert compared(torch.empty(0, 0, dtype=torch.float64)).differences == {}


def test_values_do_not_depend_on_each_other_or_on_batches(monkeypatch):
    values = [Value(scores(n, 3, seed), 1) for seed, n in enumerate((12, 400, 12, 400))]
    values[1].columns[7, 2] = math.nan
    expected = [next(compare_values([value], n_resamples=500)) for value in values]
    assert list(compare_values(values, n_resamples=500)) == expected
    monkeypatch.setattr(comparisons, "_CELLS", 700)
    monkeypatch.setattr("labn.metrics.statistics.CELLS", 100)
    monkeypatch.setattr("labn.metrics.resampling._CELLS", 900)
    assert list(compare_values(values, n_resamples=500)) == expected


def test_one_pair_taken_together_with_none_is_the_pair_alone():
    for seed in range(5):
        (difference,) = compared(scores(15, 2, seed, shift=0.4)).differences.values()
        assert difference.p_adjusted == difference.p


def test_p_values_of_a_normal_difference_are_those_of_the_t_test():
    from scipy.stats import ttest_1samp

    for n in (60, 400):
        columns = scores(n, 2, seed=n, shift=2.0 / math.sqrt(n))
        (difference,) = compared(columns, n_resamples=40_000).differences.values()
        expected = ttest_1samp((columns[:, 0] - columns[:, 1]).numpy(), 0).pvalue
        assert difference.p == pytest.approx(expected, rel=0.15, abs=1e-3)


def holm(p):
    """Holm 1979: valid for any dependence, and never below the maximum over shared draws by more than its noise."""
    ordered = sorted(p, key=p.get)
    adjusted = {}
    for place, pair in enumerate(ordered):
        adjusted[pair] = min(1.0, max([*adjusted.values(), (len(p) - place) * p[pair]]))
    return adjusted


@pytest.mark.parametrize("n", [20, 500])
def test_adjusted_p_values_lie_between_those_alone_and_those_of_holm(n):
    found = compared(scores(n, 6, shift=0.9 / math.sqrt(n)), n_resamples=20_000).differences
    bound = holm({pair: difference.p for pair, difference in found.items()})
    for pair, difference in found.items():
        assert difference.p <= difference.p_adjusted <= bound[pair] * 1.1 + 1e-3
    # Ordered as the statistics are, and smaller than Holm's where pairs are correlated.
    assert sum(difference.p_adjusted for difference in found.values()) < 0.9 * sum(bound.values())


def test_step_down_equals_its_closed_form():
    """Two pairs and four resamples: the larger statistic meets the maximum of both, the smaller one its own column."""
    drawn = torch.tensor([[1.0, 3.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    spread = drawn.square().mean(0).sqrt()
    p, adjusted = step_down(torch.tensor([1.5, 0.9]) * spread, drawn, torch.tensor([1e9, 1e9]))
    # Statistics 1.5 and .9; columns 1, 1, 1, 1 and 1.73, .58, .58, .58.
    assert p.tolist() == pytest.approx([1 / 5, 2 / 5])
    assert adjusted.tolist() == pytest.approx([2 / 5, 2 / 5])


def test_equal_methods_have_p_one_and_a_constant_shift_the_smallest():
    columns = scores(10, 1).repeat(1, 3)
    columns[:, 2] += 0.25
    found = compared(columns, n_resamples=99).differences
    assert (found[0, 1].p, found[0, 1].p_adjusted) == (1.0, 1.0)
    assert found[0, 2].p == pytest.approx(0.01)
    assert found[0, 2].stands
    assert not found[0, 1].stands


@pytest.mark.parametrize("n", [9, 60])
def test_false_differences_are_rare_among_many_pairs(n):
    """Ten pairs of equal methods: at 5 %, some pair is significant alone in every third experiment."""
    values = (Value(scores(n, 5, seed)) for seed in range(300))
    found = [comparison.differences.values() for comparison in compare_values(values, n_resamples=1000)]
    alone = sum(any(d.p <= 0.05 for d in pairs) for pairs in found) / len(found)
    together = sum(any(d.stands for d in pairs) for pairs in found) / len(found)
    assert alone > 0.12
    assert together < 0.08


def test_ranks_and_the_probability_of_being_best():
    columns = scores(50, 3, shift=3.0)
    high, low = compared(columns, better=1).ranks, compared(columns, better=-1).ranks
    assert [(r.rank, r.low, r.high, r.p_best) for r in high] == [(3, 3, 3, 0), (2, 2, 2, 0), (1, 1, 1, 1)]
    assert [r.rank for r in low] == [1, 2, 3]
    assert compared(columns, better=0).ranks == [None] * 3
    # Equal methods share ranks and the probability.
    tied = compared(torch.cat([columns, columns[:, 2:]], dim=1)).ranks
    assert [(r.rank, r.p_best) for r in tied[2:]] == [(1.5, 0.5)] * 2
    undecided = compared(scores(50, 3)).ranks
    assert sum(rank.p_best for rank in undecided) == pytest.approx(1)
    assert any(rank.low < rank.high for rank in undecided)


def test_one_sample_or_group_decides_no_pair_and_no_rank():
    found = compared(scores(1, 2))
    assert math.isnan(found.differences[0, 1].p)
    assert not found.differences[0, 1].stands
    assert math.isnan(found.ranks[0].p_best)
    assert math.isnan(found.ranks[0].low)
    grouped = compared(scores(6, 2), groups=torch.zeros(6, dtype=torch.int64))
    assert math.isnan(grouped.differences[0, 1].p_adjusted)


def test_infinite_values_have_a_rank_and_neither_bounds_nor_differences():
    columns = scores(12, 3, shift=5.0)
    columns[4, 0] = math.inf
    found = compared(columns)
    assert [rank.rank for rank in found.ranks] == [1, 3, 2]
    assert [rank.p_best for rank in found.ranks] == [1, 0, 0]
    assert math.isnan(found.intervals[0].low)
    assert math.isnan(found.differences[0, 1].high)
    assert math.isnan(found.differences[0, 2].p_adjusted)
    assert bounds(found.differences[1, 2]) == pytest.approx(bounds(compared(columns[:, 1:]).differences[0, 1]))
    assert found.differences[1, 2].p_adjusted == found.differences[1, 2].p


def test_a_method_worse_on_every_sample_is_never_the_best():
    first = scores(40, 1)
    second = first + 0.01
    second[7] += 100
    ranks = compared(torch.cat([first, second], dim=1), better=-1).ranks
    assert [(r.rank, r.low, r.high, r.p_best) for r in ranks] == [(1, 1, 1, 1), (2, 2, 2, 0)]


def test_a_huge_method_ties_no_others_and_equal_counts_tie():
    columns = scores(50, 3, shift=3.0)
    huge = torch.cat([columns, torch.full((50, 1), 1e12, dtype=torch.float64)], dim=1)
    assert [r.rank for r in compared(huge, better=-1).ranks] == [1, 2, 3, 4]
    assert [r.p_best for r in compared(huge, better=-1).ranks] == [1, 0, 0, 0]
    # Resamples without a hit of either method are tied, although their means are 0 up to rounding only.
    hits = torch.zeros(12, 2, dtype=torch.float64)
    hits[0, 0] = hits[1, 1] = 1
    assert [r.p_best for r in compared(hits).ranks] == pytest.approx([0.5, 0.5], abs=0.02)
    assert all((r.low, r.high) == (1, 2) for r in compared(hits).ranks)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_equal_differences_of_few_samples_have_the_p_value_of_the_sign_test(n):
    columns = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(n, 1)
    (difference,) = compared(columns, n_resamples=2000).differences.values()
    assert difference.p == difference.p_adjusted == 2.0 ** (1 - n)


def test_fair_coins_of_few_samples_have_few_false_stars():
    for n in (2, 3, 4, 6):
        generator = torch.Generator().manual_seed(n)
        values = [Value(torch.randint(2, (n, 5), generator=generator).double()) for _ in range(200)]
        found = [c.differences.values() for c in compare_values(values, n_resamples=300)]
        assert sum(any(d.stands for d in pairs) for pairs in found) <= 0.06 * len(found)
