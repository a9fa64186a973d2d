"""Ranks and pairs that stand, from the tables to the page."""

import csv
import math

import pytest
from small_stage import CLASSES, EXPLAINERS, make_stage

from labn.compare import compare_runs, open_runs, ranks_csv
from labn.metrics.comparisons import Rank
from labn.report import RunInfo, read_stage, render, run_report
from labn.report.comparison import comparison_report
from labn.report.ranking import LEFT, WIDTH, rankings, together


def rank(value, low=None, high=None, best=0.5):
    return Rank(value, value if low is None else low, value if high is None else high, best, 20)


def test_runs_of_methods_without_a_standing_pair_are_the_longest():
    pairs = {("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    both = pairs | {(b, a) for a, b in pairs}
    assert together("abcd", both) == ((0, 1), (1, 2))
    assert together("abcd", set()) == ((0, 3),)
    assert together("ab", {("a", "b"), ("b", "a")}) == ()


def test_a_ranking_is_in_order_and_inside_its_axis():
    ranks = {("b", "v"): rank(1, 1, 2, 0.9), ("a", "v"): rank(2, 1, 3, 0.1), ("c", "v"): rank(3, 2, 3, 0)}
    (found,) = rankings(["a", "b", "c"], ["v", "w"], ranks, {"v": {("b", "c"), ("c", "b")}})
    assert [(row.name, row.place, row.chance) for row in found.rows] == [
        ("b", 1, "90 %"),
        ("a", 0, "10 %"),
        ("c", 2, "0 %"),
    ]
    assert found.together == ((0, 1), (1, 2))
    assert [tick.text for tick in found.ticks] == ["1", "2", "3"]
    for row in found.rows:
        assert LEFT < row.low <= row.x <= row.high < WIDTH
    assert all(WIDTH < x < found.width and 0 < top < bottom < found.height for x, top, bottom in found.bars)
    assert rankings(["a"], ["v"], ranks, {}) == []


def test_long_names_are_cut_in_the_figure_only():
    ranks = {("a" * 40, "v"): rank(1), ("b", "v"): rank(2)}
    (found,) = rankings(["a" * 40, "b"], ["v"], ranks, {})
    assert found.rows[0].name == "a" * 40
    assert found.rows[0].label.endswith("a…")


def test_ranks_without_interval_have_none_on_the_page():
    ranks = {(name, "v"): Rank(n + 1.0, math.nan, math.nan, math.nan, 1) for n, name in enumerate("ab")}
    (found,) = rankings(["a", "b"], ["v"], ranks, {})
    assert [(row.bounded, row.chance, row.low == row.x == row.high) for row in found.rows] == [(False, "–", True)] * 2


def test_the_page_of_a_run_has_the_ranks_and_p_values_of_its_tables(tmp_path):
    folder = make_stage(tmp_path / "run", 24)
    with open(folder / "ranks.csv", newline="") as file:
        lines = {(row["explainer"], row["metric"]): row for row in csv.DictReader(file)}
    report = run_report(read_stage(folder), RunInfo("t", tmp_path / "run", CLASSES, 24, {}))
    assert [ranking.value for ranking in report.rankings] == ["pid16", "mass"]
    for ranking in report.rankings:
        assert {row.name for row in ranking.rows} == set(EXPLAINERS)
        for row in ranking.rows:
            assert row.rank.p_best == float(lines[row.name, ranking.value]["p_best"])
    with open(folder / "paired.csv", newline="") as file:
        paired = {row["metric"]: row for row in csv.DictReader(file)}
    for table in report.paired:
        ours = table.rows["gradcam"][table.columns.index("-lrp")]
        assert ours.p_adjusted == float(paired[table.caption]["p_adjusted"])
        assert ours.stands == table.rows["-lrp"][table.columns.index("gradcam")].stands
    page = render(report)
    assert page.count('<table class="ranks"') == 2
    assert '<a href="#ranking">' in page


def test_a_run_of_an_earlier_version_has_a_page_without_ranks(tmp_path):
    folder = make_stage(tmp_path / "run", 12)
    (folder / "ranks.csv").unlink()
    path = folder / "paired.csv"
    path.write_text("".join(f"{line.rsplit(',', 2)[0]}\n" for line in path.read_text().splitlines()))
    report = run_report(read_stage(folder), RunInfo("t", tmp_path / "run", CLASSES, 12, {}))
    assert report.paired
    assert report.rankings == []
    assert not any(cell.stands for table in report.paired for row in table.rows.values() for cell in row if cell)
    render(report)


def test_a_comparison_ranks_its_rows(tmp_path):
    for name, shift in (("a", 0.0), ("b", 3.0)):
        make_stage(tmp_path / name, 16, shift)
    found = compare_runs(open_runs([f"{name}={tmp_path / name}" for name in "ab"]))
    lines = list(csv.DictReader(ranks_csv(found).decode().splitlines()))
    best = {(row["row"], row["metric"]): float(row["p_best"]) for row in lines}
    assert best["a: gradcam", "mass"] == best["a: -lrp", "mass"] == 0
    assert best["b: gradcam", "mass"] + best["b: -lrp", "mass"] == pytest.approx(1)
    report = comparison_report(found)
    assert {row.name for row in report.rankings[0].rows} == {
        f"{run}: {method}" for run in "ab" for method in EXPLAINERS
    }
    shifted = next(t for t in report.paired if t.caption == "mass").rows["b: gradcam"]
    assert shifted[report.paired[0].columns.index("a: gradcam")].stands
