"""The page as text: numbers equal the tables, nothing comes from outside, names stay text."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from small_stage import CLASSES, EXPLAINERS, HOSTILE, METRICS, make_stage, value

from labn.metrics import describe_value
from labn.report import RunInfo, read_stage, render, run_report
from labn.report.cards import LEVELS, make_card, map_entry
from labn.report.detections import detection_card, detection_report
from labn.report.page import embed, thin

PLAYER = {"metric": "pid16", "patch": 16, "size": [64, 64]}


def info(run_dir, **options):
    facts = {"title": "run: test", "split_size": 30, "figures": {"test/accuracy": 0.875}, "player": PLAYER}
    return RunInfo(**{"run_dir": run_dir, "class_names": CLASSES, **facts, **options})


class Page(HTMLParser):
    """Cells by table, the embedded data, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.texts = [], {}, {}
        self._table = self._open = None
        self.feed(text)
        self.data = json.loads(self.texts["report-data"])

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self._open = found.get("id", tag)
        if tag == "table":
            self._table = found.get("id") or found.get("data-metric")
            self.tables[self._table] = []
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag == "span" and "data-value" in found:
            self.tables[self._table][-1].append(float(found["data-value"]))

    def handle_data(self, data):
        self.texts[self._open] = self.texts.get(self._open, "") + data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    folder = make_stage(run_dir)
    text = render(run_report(read_stage(folder), info(run_dir)))
    return folder, text, Page(text)


def test_the_summary_holds_the_means_of_scores_csv(made):
    folder, _, page = made
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, explainer in zip(page.tables["summary-table"][1:], EXPLAINERS, strict=True):
        for shown, metric in zip(row, METRICS, strict=True):
            values = [float(r["value"]) for r in rows if (r["explainer"], r["metric"]) == (explainer, metric)]
            assert shown == pytest.approx(np.mean(values), abs=1e-12)


def test_the_paired_table_holds_both_directions(made):
    folder, _, page = made
    with open(folder / "paired.csv", newline="") as file:
        first = next(row for row in csv.DictReader(file) if row["metric"] == "pid16")
    difference = float(first["difference"])
    assert page.tables["pid16"] == [[], [difference], [-difference]]


def test_every_score_of_the_gallery_is_that_of_scores_csv(made):
    folder, _, page = made
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 * len(EXPLAINERS) * len(METRICS)
    for row in rows:
        place = page.data["metrics"].index(row["metric"])
        assert page.data["scores"][row["name"]][row["explainer"]][place] == float(row["value"])


def test_hostile_names_are_escaped(made):
    _, text, page = made
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [found for tag, found in page.tags if tag == "img" or any(name.startswith("on") for name in found)]
    assert HOSTILE not in text
    assert [card["name"] for card in page.data["cards"]].count(HOSTILE) == 1
    assert page.data["classNames"] == CLASSES


def test_the_page_makes_no_requests(made):
    _, text, page = made
    links = [found.get(name) for _, found in page.tags for name in ("src", "href") if found.get(name)]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    policy = next(found["content"] for tag, found in page.tags if tag == "meta" and "http-equiv" in found)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_shows_caveats_configuration_and_metrics(made):
    _, text, _ = made
    assert "Only 24 of the 30 samples" in text
    assert "seed_everything: 42" in text
    assert "run42" in text or "d47a" in text
    for word in ("test/accuracy", "torch", "pid16: insertion", "loss"):
        assert word in text


def test_every_value_is_defined_where_it_stands_and_in_the_glossary(made):
    _, text, _ = made
    body = text[: text.index('id="report-data"')]
    sections = dict(re.findall(r'(?s)<section [^>]*id="(\w+)">(.*?)</section>', body))
    for section, names in {"summary": METRICS, "paired": METRICS, "curves": ["pid16"], "glossary": METRICS}.items():
        for name in names:
            assert str(describe_value(name)).replace("'", "&#39;") in sections[section]
    assert "share of correct predictions. Range [0, 1], higher is better." in body
    assert f">n&nbsp;{24}<" in sections["summary"]
    assert "seed" not in sections["summary"] + sections["caveats"] + sections["glossary"]


def test_a_zero_has_no_sign(tmp_path):
    folder = make_stage(tmp_path, count=4)
    lines = (folder / "paired.csv").read_text().splitlines()
    lines[1] = ",".join([*lines[1].split(",")[:3], "-1e-7", "-1e-4", "1e-4", "4"])
    (folder / "paired.csv").write_text("\n".join(lines) + "\n")
    text = render(run_report(read_stage(folder), info(tmp_path)))
    assert 'data-value="-1e-07">0.000</span> <span class="small"><span class="interval">[0.000, 0.000]' in text


def test_a_folder_with_pictures_only_has_a_page(tmp_path):
    folder = make_stage(tmp_path, count=4)
    for name in ("scores.csv", "summary.csv", "paired.csv", "curves.npz", "predictions.csv"):
        (folder / name).unlink()
    page = Page(render(run_report(read_stage(folder), info(tmp_path))))
    assert len(page.data["cards"]) == 4
    assert page.data["player"] is None
    assert page.tables == {}


def test_the_gallery_is_thinned_to_its_limit(tmp_path):
    folder = make_stage(tmp_path, count=12)
    report = run_report(read_stage(folder), info(tmp_path, max_bytes=60_000))
    assert 1 < len(report.cards) < 12
    assert sum(len(embed(card)) for card in report.cards) <= 60_000
    assert any(f"shows {len(report.cards)} of 12" in note for note in report.caveats)
    assert thin([], 10) == []


def test_500_images_and_8_methods_fit_in_40_mb():
    """Noise is the worst case of compression."""
    noise = np.random.default_rng(0)
    from small_stage import Picture

    picture = Picture(0, "a", 0, 0, 0, 0.5, 0.5, noise.random((224, 224, 3)).repeat(1, 0))
    maps = {f"method{n}": noise.standard_normal((224, 224)) for n in range(8)}
    assert len(embed(make_card(picture, maps))) * 500 < 40e6


def test_levels_stand_for_values_and_zero_is_exact():
    import base64

    import cv2

    heat = np.zeros((16, 16), dtype=np.float32)
    heat[:4, :4], heat[8:, 8:] = 2.0, -0.5
    entry = map_entry(heat, side=96)
    levels = cv2.imdecode(np.frombuffer(base64.b64decode(entry["data"].split(",")[1]), np.uint8), cv2.IMREAD_GRAYSCALE)
    back = entry["low"] + (entry["high"] - entry["low"]) * levels / LEVELS
    assert (entry["signed"], entry["low"], entry["high"]) == (True, -2.0, 2.0)
    assert np.abs(back - heat).max() <= 4.0 / LEVELS / 2 + 1e-6
    assert (levels[heat == 0] == LEVELS // 2).all()


def test_listed_values_are_distinct():
    assert len({value("gradcam", "pid16", index) for index in range(24)}) == 24


def test_a_card_of_a_detection_does_not_claim_correctness(browser, tmp_path):
    """A false detection of a class is no correct prediction of it."""
    row = {"index": 3, "name": "street", "detection": 0, "score": 0.75, "x1": 0.0, "y1": 0.0, "x2": 8.0, "y2": 8.0}
    made = detection_card(np.zeros((16, 16, 3)), row, 1, {"c": np.ones((16, 16))})
    path = tmp_path / "report.html"
    path.write_text(render(detection_report("t", [made], [], ["c"], ["background", "cat"])), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#cards .card-head").split("\n") == ["street #0", "cat (probability 0.750)"]
    assert not page.is_visible("#filter-correct")
    page.select_option("#sort-metric", "probability of the label")
    assert page.locator("#cards .card").count() == 1
    page.close()
