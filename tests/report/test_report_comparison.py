"""The page of a comparison: every network's own verdict, and curves under every name."""

import json
import re

import numpy as np
import pytest
from small_stage import CLASSES, make_stage

from labn.compare import compare_runs, open_runs
from labn.report import read_stage, render
from labn.report.comparison import comparison_report, merged_cards, merged_curves
from labn.results.reader import CARDS

COUNT = 8


def edit_cards(folder, change):
    path = folder / CARDS
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def swapped(cards):
    """The same pictures as another network sees them: what was right is wrong, probabilities are mirrored."""
    return [
        {**card, "prediction": 1 - card["prediction"], "probability": round(1 - card["probability"], 3)}
        for card in cards
    ]


@pytest.fixture
def two(tmp_path):
    """Two networks of two rows that agree on nothing."""
    for name in ("one", "two"):
        make_stage(tmp_path / name, COUNT)
    edit_cards(tmp_path / "two" / "test", swapped)
    return tmp_path


def compared(folder, *names):
    return compare_runs(open_runs([f"{name}={folder / name}" for name in names]))


def test_every_row_has_its_own_prediction(two):
    own = {name: read_stage(two / name / "test").cards for name in ("one", "two")}
    for place, card in enumerate(merged_cards(compared(two, "one", "two"))):
        assert card["verdicts"] == [
            {"network": name} | {k: own[name][place][k] for k in ("prediction", "target", "probability", "confidence")}
            for name in ("one", "two")
        ]
        assert not {"prediction", "probability"} & card.keys()


def test_a_page_speaks_of_seeds_only_where_there_are_several(two):
    for seed in (1, 2):
        make_stage(two / f"seed{seed}", COUNT, seed=seed)
    apart = render(comparison_report(compared(two, "one", "two")))
    merged = render(comparison_report(compare_runs(open_runs([str(two / f"seed{seed}") for seed in (1, 2)]))))
    shown = [page[: page.index('id="made-with"')] for page in (apart, merged)]
    assert ["over seeds" in page for page in shown] == [False, True]
    assert ["±" in page for page in shown] == [False, True]


def test_maps_and_verdict_of_a_row_are_of_one_of_its_seeds(tmp_path):
    for seed in (1, 2):
        make_stage(tmp_path / f"seed{seed}", COUNT, seed=seed)
    edit_cards(
        tmp_path / "seed1" / "test", lambda cards: [{**c, "maps": {"gradcam": c["maps"]["gradcam"]}} for c in cards[1:]]
    )
    edit_cards(tmp_path / "seed2" / "test", swapped)
    found = compare_runs(open_runs([str(tmp_path / f"seed{seed}") for seed in (1, 2)]))
    cards = {card["index"]: card for card in merged_cards(found)}
    # The first seed lacks picture 0, and on the others the second map: no card mixes the two.
    assert set(cards[0]["maps"]) == {"gradcam", "-lrp"}
    assert all(set(cards[index]["maps"]) == {"gradcam"} for index in range(1, COUNT))
    assert [len(card["verdicts"]) for card in cards.values()] == [1] * COUNT
    assert cards[0]["verdicts"][0]["prediction"] == 1
    assert cards[1]["verdicts"][0]["prediction"] == 1
    assert any(
        "every row are those of the first seed that has the picture" in n for n in comparison_report(found).caveats
    )


def test_the_methods_of_one_network_share_its_verdict(tmp_path):
    for name, explainer in (("a", "gradcam"), ("b", "-lrp")):
        make_stage(tmp_path / name, COUNT, explainers=(explainer,), checkpoint="c0ffee")
    found = compare_runs(open_runs([f"net={tmp_path / name}" for name in "ab"]))
    for card in merged_cards(found):
        assert set(card["maps"]) == {"gradcam", "-lrp"}
        assert [verdict["network"] for verdict in card["verdicts"]] == ["net"]


@pytest.mark.parametrize(("value", "asked"), [("id", "pid1"), ("mine", "mine")])
def test_curves_are_found_under_the_name_that_was_asked_for(tmp_path, value, asked):
    """The values of `pid1` are called `id` in the tables, its curves `pid1`; somebody's own metric has one name."""
    folder = make_stage(tmp_path / "run", COUNT)
    for name in ("scores.csv", "summary.csv", "paired.csv"):
        path = folder / name
        path.write_text(re.sub(r"\bpid16\b", value, path.read_text()))
    with np.load(folder / "curves.npz") as file:
        arrays = {name.replace("/pid16/", f"/{asked}/"): file[name] for name in file.files}
    np.savez(folder / "curves.npz", **arrays)
    curves = merged_curves(compare_runs(open_runs([str(tmp_path / "run")])))
    assert {f"{name}/{asked}/insertion" for name in ("gradcam", "-lrp")} <= curves.keys()


def test_the_page_filters_and_sorts_by_the_network_that_it_names(two, browser):
    path = two / "report.html"
    path.write_text(render(comparison_report(compared(two, "one", "two"))), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")

    def shown():
        return page.eval_on_selector_all("#cards .card", "cards => cards.map(card => Number(card.dataset.index))")

    right = [index for index in range(COUNT) if index % 2 == int(index % 3 > 0)]
    wrong = [index for index in range(COUNT) if index not in right]
    for label, expected in (
        ("correct (one)", right),
        ("wrong (one)", wrong),
        ("correct (two)", wrong),
        ("wrong (two)", right),
        ("all", list(range(COUNT))),
    ):
        page.select_option("#filter-correct", label=label)
        assert shown() == expected
    page.select_option("#sort-metric", "probability of the label (one)")
    assert shown() == list(range(COUNT))
    page.select_option("#sort-metric", "probability of the label (two)")
    assert shown() == list(range(COUNT))[::-1]
    head = page.inner_text("#cards .card[data-index='0'] .card-head")
    assert f"{CLASSES[0]} (probability 0.111 (one), 0.889 (two))" in head
    assert f"one: correct: predicted {CLASSES[0]}" in head
    assert f"two: wrong: predicted {CLASSES[1]}" in head
    assert complaints == []
    page.close()
