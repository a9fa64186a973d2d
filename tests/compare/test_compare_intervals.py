"""One sample, or one group, has no interval, and decides nothing."""

import csv
import math

import pytest
from small_stage import CLASSES, make_stage

from labn.compare import compare_runs, latex_table, markdown_table, open_runs, paired_csv, table_csv
from labn.metrics import bootstrap_mean
from labn.report import RunInfo, read_stage, render, run_report
from labn.report.caveats import caveats
from labn.report.comparison import comparison_report

ONE = [(1, None), (6, dict.fromkeys(range(6), 7))]
"""Samples and groups of which nothing can be drawn."""


def test_one_sample_or_group_has_no_interval():
    assert math.isnan(bootstrap_mean([0.5]).low)
    assert bootstrap_mean([0.5]).mean == 0.5
    assert math.isnan(bootstrap_mean([0.5, 0.7], groups=[3, 3]).high)
    assert bootstrap_mean([0.5]).bracketed == ""
    # Equal values are an interval without width: they are known, and not only one of them.
    assert bootstrap_mean([0.5, 0.5]).bracketed == " [0.500, 0.500]"


@pytest.mark.parametrize(("count", "groups"), ONE)
def test_one_sample_or_group_has_no_interval_in_any_table(tmp_path, count, groups):
    for seed, shift in ((1, 0.0), (2, 0.3)):
        make_stage(tmp_path / f"seed{seed}", count, shift, seed, groups=groups)
    found = compare_runs(open_runs([f"a={tmp_path / 'seed1'}", f"b={tmp_path / 'seed2'}"]))
    for text in (table_csv(found), paired_csv(found)):
        assert {(row["ci_low"], row["ci_high"]) for row in csv.DictReader(text.decode().splitlines())} == {
            ("nan", "nan")
        }
    assert "[" not in markdown_table(found)
    assert "[" not in latex_table(found)
    page = render(comparison_report(found))
    assert "decided" not in page.partition("<body>")[2].replace("is decided", "")
    assert 'class="interval"' not in page
    assert "nan" not in page.partition("<main")[2].partition("<script")[0]


@pytest.mark.parametrize(("count", "groups"), ONE)
def test_one_sample_or_group_decides_no_difference_in_a_report(tmp_path, count, groups):
    results = read_stage(make_stage(tmp_path / "run", count, groups=groups))
    report = run_report(results, RunInfo("t", tmp_path / "run", CLASSES, count, {}))
    cells = [cell for table in report.paired for row in table.rows.values() for cell in row if cell]
    assert cells
    assert not any(cell.decided or cell.bounded for cell in cells)
    assert not any(cell.bounded for row in report.summary.rows.values() for cell in row)
    assert 'class="interval"' not in render(report)
    one = "sample" if groups is None else "group of samples"
    assert f"Some values are based on one {one} alone: they have no interval and decide no difference." in (
        caveats(results)
    )


def test_two_samples_or_groups_can_decide_a_difference(tmp_path):
    report = run_report(read_stage(make_stage(tmp_path / "run", 24)), RunInfo("t", tmp_path / "run", CLASSES, 24, {}))
    cells = [cell for table in report.paired for row in table.rows.values() for cell in row if cell]
    assert all(cell.bounded for cell in cells)
