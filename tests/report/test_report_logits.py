"""Curves of logits: their range is that of the data, and nothing calls them probabilities."""

import json

import numpy as np
import pytest
from small_stage import CLASSES, PATCH, SIZE, make_stage

from labn.compare import compare_runs, open_runs
from labn.report import RunInfo, read_stage, render, run_report
from labn.report.caveats import caveats
from labn.report.charts import BOTTOM, HEIGHT, TOP
from labn.report.comparison import comparison_report
from labn.results.reader import StageResults, Total

PLAYER = {"metric": "pid16", "patch": PATCH, "size": [SIZE, SIZE]}
LINES = ("insertion", "deletion")


def scored(run_dir, probability="logit"):
    """A run whose curves are in logits from -3 to 9."""
    settings = {"fill": "black", "positives_only": False, "chunk_size": 8, "probability": probability}
    folder = make_stage(run_dir, 6, settings=settings)
    if probability == "logit":
        with np.load(folder / "curves.npz") as file:
            arrays = {n: 12 * file[n] - 3 if n.endswith(LINES) else file[n] for n in file.files}
        np.savez(folder / "curves.npz", **arrays)
    return folder


def page_of(folder):
    info = RunInfo("t", folder.parent, CLASSES, 6, {}, player=PLAYER)
    return run_report(read_stage(folder), info)


def test_lines_of_logits_stay_inside_their_frame_and_say_what_they_are(tmp_path):
    scored(tmp_path / "run")
    reports = [page_of(tmp_path / "run" / "test"), comparison_report(compare_runs(open_runs([str(tmp_path / "run")])))]
    for report in reports:
        for panel in report.curves["pid16"]:
            assert panel.y_label == "logit"
            assert panel.limits[1] == (-3.0, 9.0)
            points = [point.split() for line in panel.lines for point in line.path.strip("M").split("L")]
            assert all(TOP <= float(y) <= HEIGHT - BOTTOM for _, y in points)


def test_sigmoids_are_probabilities_too(tmp_path):
    report = page_of(scored(tmp_path / "run", "sigmoid"))
    assert {(panel.y_label, panel.y_range) for panel in report.curves["pid16"]} == {("probability", (0.0, 1.0))}
    assert report.player["quantity"] == "probability"
    assert report.player["ticks"] == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_the_player_has_one_scale_for_all_pictures(tmp_path):
    report = page_of(scored(tmp_path / "run"))
    assert (report.player["quantity"], report.player["limits"]) == ("logit", (-3.0, 9.0))
    text = render(report)
    assert "Insertion: logit" in text
    assert "Logit over the fraction of patches" in text
    assert "probability <output" not in text


def test_the_caveats_say_that_areas_are_in_logits(tmp_path):
    manifest = {"settings": {"probability": "logit"}}
    totals = {("a", "fill_probability"): Total(2, 9.0)}
    results = StageResults(tmp_path, {key: {} for key in totals}, totals, manifest=manifest)
    (note,) = caveats(results)
    assert "are logits of the class instead of probabilities" in note
    assert not caveats(StageResults(tmp_path, manifest={"settings": {"probability": "sigmoid"}}))


@pytest.mark.parametrize("probability", ["softmax", "logit"])
def test_the_players_chart_holds_its_lines(tmp_path, browser, probability):
    folder = scored(tmp_path / "run", probability)
    path = tmp_path / "report.html"
    path.write_text(render(page_of(folder)), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#player-chart path.line")
    paths = page.eval_on_selector_all("#player-chart path.line", "all => all.map(e => e.getAttribute('d'))")
    heights = [float(point.split()[1]) for path in paths for point in path.strip("M").split("L")]
    assert len(heights) == 10
    # A whole curve reaches from one end of the frame to the other, whatever its unit.
    assert (min(heights), max(heights)) == (TOP, HEIGHT - BOTTOM)
    shown = page.eval_on_selector_all("#player-chart text", "all => all.map(e => e.textContent)")
    data = json.loads(page.inner_text("#report-data") or page.text_content("#report-data"))
    assert shown[: len(data["player"]["ticks"])] == [f"{tick:g}" for tick in data["player"]["ticks"]]
    page.close()
