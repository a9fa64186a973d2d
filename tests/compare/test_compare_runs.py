"""Merging runs: closed forms over seeds and samples, and every refusal."""

import csv
import io
import json
import re
import statistics

import numpy as np
import pytest
from small_stage import HOSTILE, make_stage, value

from labn.commands import compare
from labn.compare import compare_runs, latex_table, markdown_table, open_runs, paired_csv, seeds_csv, table_csv
from labn.io.table_cells import unescaped_cell
from labn.report.comparison import comparison_report, merged_curves
from labn.report.curves import curve_panels


def rows(data):
    lines = csv.DictReader(io.StringIO(data.decode()))
    return [{name: unescaped_cell(text) for name, text in line.items()} for line in lines]


def edit_manifest(folder, **changes):
    path = folder / "maps" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def seeds(tmp_path):
    """Three seeds whose values are shifted by 0, .1 and .3."""
    for seed, shift in ((1, 0.0), (2, 0.1), (3, 0.3)):
        make_stage(tmp_path / f"seed{seed}", 8, shift, seed)
    return [str(tmp_path / f"seed{seed}") for seed in (1, 2, 3)]


def test_seeds_become_one_row_with_mean_and_deviation(seeds):
    found = compare_runs(open_runs(seeds))
    row = next(r for r in rows(table_csv(found)) if (r["explainer"], r["metric"]) == ("-lrp", "pid16"))
    own = [value("-lrp", "pid16", index) for index in range(8)]
    assert (row["run"], row["seeds"], row["n"]) == ("seed1", "3", "8")
    assert float(row["mean"]) == pytest.approx(np.mean(own) + 0.4 / 3, abs=1e-12)
    assert float(row["std"]) == pytest.approx(statistics.stdev([0.0, 0.1, 0.3]), abs=1e-12)
    assert float(row["ci_low"]) < float(row["mean"]) < float(row["ci_high"])


def test_the_values_of_every_seed_are_written(seeds):
    found = compare_runs(open_runs(seeds))
    lines = [r for r in rows(seeds_csv(found)) if (r["explainer"], r["metric"]) == ("-lrp", "pid16")]
    own = np.mean([value("-lrp", "pid16", index) for index in range(8)])
    assert [(line["run"], line["seed"], line["n"]) for line in lines] == [("seed1", str(n), "8") for n in (1, 2, 3)]
    assert [line["folder"] for line in lines] == [f"{folder}/test" for folder in seeds]
    assert [float(line["mean"]) - own for line in lines] == pytest.approx([0, 0.1, 0.3])
    assert any("over seeds (seed1: 3); intervals" in note for note in comparison_report(found).caveats)


def test_labels_keep_runs_apart(seeds):
    found = compare_runs(open_runs([f"a={seeds[0]}", f"b={seeds[1]}"]))
    assert {(row.label, row.seeds, row.std) for row in found.rows} == {("a", 1, None), ("b", 1, None)}
    difference = next(p for p in found.paired if p[:3] == ("a: -lrp", "b: -lrp", "pid16"))[3]
    assert difference.mean == pytest.approx(-0.1)
    assert (difference.low, difference.high) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert len(rows(paired_csv(found))) == 2 * 6


def test_other_settings_are_other_rows(seeds):
    folder = seeds[1]
    config = f"{folder}/fit.yaml"
    with open(config) as file:
        text = file.read()
    with open(config, "w") as file:
        file.write(text.replace("max_epochs: 3", "max_epochs: 4"))
    assert [run.label for run in open_runs(seeds)] == ["seed1", "seed2", "seed1"]


def test_methods_of_one_network_are_merged(tmp_path):
    make_stage(tmp_path / "one", 6, explainers=("gradcam",), checkpoint="c0ffee")
    make_stage(tmp_path / "two", 6, explainers=("-lrp",), checkpoint="c0ffee")
    found = compare_runs(open_runs([f"net={tmp_path / 'one'}", f"net={tmp_path / 'two'}"]))
    assert {(row.explainer, row.seeds) for row in found.rows} == {("gradcam", 1), ("-lrp", 1)}


def test_samples_are_matched_by_name(tmp_path):
    make_stage(tmp_path / "all", 8)
    make_stage(tmp_path / "some", 8, shift=0.5, checkpoint="other")
    path = tmp_path / "some" / "test" / "scores.csv"
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    kept = [line for line in lines[1:] if line[1] in ("2", "3", "5")]
    with path.open("w", newline="") as file:
        # Other positions, the same names.
        csv.writer(file).writerows([lines[0], *([r[0], str(7 - int(r[1])), *r[2:]] for r in kept)])
    found = compare_runs(open_runs([f"a={tmp_path / 'all'}", f"b={tmp_path / 'some'}"]))
    assert found.left_out == {"pid16": 5, "mass": 5}
    assert set(found.columns["a", "gradcam", "mass"]) == {"image_002", HOSTILE, "image_005"}
    means = {row.label: row.interval.mean for row in found.rows if (row.explainer, row.metric) == ("gradcam", "mass")}
    assert means["b"] - means["a"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "other"}, "differ in data: d47a and other"),
        ({"split": "val"}, "differ in split"),
        ({"target": "prediction"}, "differ in explained class: label and prediction"),
        ({"settings": {"fill": "blur", "positives_only": False}}, r"differ in protocol \(fill\): black and blur"),
        ({"explainers": {"gradcam": {"class": "gradcam", "layer": "x"}}}, "differ in arguments of gradcam"),
    ],
)
def test_runs_that_differ_in_data_or_protocol_raise(seeds, tmp_path, change, message):
    edit_manifest(tmp_path / "seed2" / "test", **change)
    with pytest.raises(ValueError, match=message):
        compare_runs(open_runs(seeds[:2]))


DAYS = {index: 736000 + index // 6 for index in range(24)}


def bounds(lines, key):
    return {tuple(r[k] for k in key): (float(r["ci_low"]), float(r["ci_high"])) for r in lines}


def test_whole_groups_are_drawn_as_in_the_tables_of_the_run(tmp_path):
    folder = make_stage(tmp_path / "run", groups=DAYS)
    found = compare_runs(open_runs([str(tmp_path / "run")]))
    summary, paired = (rows((folder / f"{name}.csv").read_bytes()) for name in ("summary", "paired"))
    assert bounds(rows(table_csv(found)), ("explainer", "metric")) == bounds(summary, ("explainer", "metric"))
    ours = bounds(rows(paired_csv(found)), ("row_a", "row_b", "metric"))
    theirs = bounds(paired, ("explainer_a", "explainer_b", "metric"))
    assert ours == {pair: pytest.approx(interval) for pair, interval in theirs.items()}
    make_stage(tmp_path / "single")
    single = compare_runs(open_runs([str(tmp_path / "single")]))
    assert all(a.interval.low != b.interval.low for a, b in zip(found.rows, single.rows))


def test_the_page_draws_bands_and_says_intervals_over_groups(tmp_path):
    for seed in (1, 2):
        make_stage(tmp_path / f"seed{seed}", seed=seed, groups=DAYS)
    found = compare_runs(open_runs([str(tmp_path / f"seed{seed}") for seed in (1, 2)]))
    curves = merged_curves(found)
    assert curves["gradcam/pid16/group"].tolist() == list(DAYS.values())
    # A day has every kind of curve twice: whole days are all alike, single samples are not.
    insertion, _ = curve_panels(curves, ["gradcam"], "pid16")
    assert np.allclose(insertion.series[0].high, insertion.series[0].low)
    notes = comparison_report(found).caveats
    assert any("based on 4 groups of samples" in note for note in notes)
    assert any("bootstrap intervals over whole groups of samples" in note for note in notes)
    assert any("intervals of the mean over seeds are over whole groups of samples" in note for note in notes)


def test_runs_that_disagree_on_groups_are_refused(tmp_path):
    make_stage(tmp_path / "days", groups=DAYS)
    make_stage(tmp_path / "none")
    make_stage(tmp_path / "other", groups=DAYS | {3: 1})
    with pytest.raises(ValueError, match=r"differ in the column 'group' of predictions\.csv: present and missing"):
        compare_runs(open_runs([str(tmp_path / "days"), str(tmp_path / "none")]))
    with pytest.raises(ValueError, match=r"is in group 1, but in group 736000"):
        compare_runs(open_runs([str(tmp_path / "days"), str(tmp_path / "other")]))


def test_speed_settings_do_not_matter(seeds, tmp_path):
    edit_manifest(tmp_path / "seed2" / "test", settings={"fill": "black", "positives_only": False, "chunk_size": 64})
    assert compare_runs(open_runs(seeds)).rows


def test_any_two_seeds_are_held_against_each_other_without_the_speed_of_their_methods(seeds, tmp_path):
    for seed, layer in ((2, "x"), (3, "y")):
        own = {"class": "own", "inner": [{"layer": layer, "chunk_size": seed, "fold": seed == 2}]}
        edit_manifest(tmp_path / f"seed{seed}" / "test", explainers={"own": own})
    with pytest.raises(
        ValueError, match=r"seed2/test and .*seed3/test cannot be compared, they differ in arguments of own"
    ):
        compare_runs(open_runs(seeds))
    own["inner"][0]["layer"] = "x"
    edit_manifest(tmp_path / "seed3" / "test", explainers={"own": own})
    assert compare_runs(open_runs(seeds)).rows


def test_one_network_scored_differently_is_refused(tmp_path):
    make_stage(tmp_path / "one", 4, checkpoint="c0ffee")
    make_stage(tmp_path / "two", 4, shift=0.2, checkpoint="c0ffee")
    with pytest.raises(ValueError, match="another folder of the same network"):
        compare_runs(open_runs([f"net={tmp_path / 'one'}", f"net={tmp_path / 'two'}"]))


def test_a_run_without_scores_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no test/scores\.csv"):
        open_runs([str(tmp_path)])


def test_the_tables_are_markdown_and_latex(seeds):
    found = compare_runs(open_runs([f"a_b & c={seeds[0]}", f"d|e={seeds[1]}"]))
    markdown = markdown_table(found).splitlines()
    assert markdown[0] == "| run | method | seeds | pid16 | mass |"
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown}) == 1
    latex = latex_table(found)
    assert r"a\_b \& c" in latex
    assert latex.count(r"\\") == 5
    assert latex.startswith(r"\begin{tabular}{llrrr}")


def test_the_caveats_of_equally_named_folders_are_all_there(tmp_path):
    runs = [tmp_path / name / "seed=38" for name in ("a", "b")]
    for run, network in zip(runs, ("x", "y")):
        make_stage(run, 4, checkpoint=network)
    path = runs[0] / "test" / "summary.csv"
    path.write_text(path.read_text().replace(",4\n", ",3\n"))
    notes = comparison_report(compare_runs(open_runs([str(run) for run in runs]))).caveats
    few = "Some values are based on {} samples: intervals of so few are too narrow."
    assert f"a/seed=38 (seed=38): {few.format(3)}" in notes
    assert f"b/seed=38 (seed=38): {few.format(4)}" in notes


def test_the_command_writes_everything(seeds, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    compare.run(parser.parse_args([*seeds, "--out", str(tmp_path / "out")]))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "paired.csv",
        "ranks.csv",
        "report.html",
        "seeds.csv",
        "table.csv",
        "table.md",
        "table.tex",
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "± 0.153" in page
    assert HOSTILE not in page
    assert "pid16: insertion" in page
    assert "| seed1 | gradcam | 3 |" in capsys.readouterr().out
