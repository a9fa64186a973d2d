"""The report that a trainer writes."""

import csv
import json
import re

import pytest
from test_callbacks import data, network, trainer

from callbacks import EvaluationCallback, ExplanationCallback, MapLogger, ReportCallback

EXPLAINERS = {"gradcam": None, "random": None}


def page_data(folder):
    text = (folder / "report.html").read_text()
    return json.loads(re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_every_sample_with_its_scores(tmp_path):
    score = EvaluationCallback(["pid16", "auroc"], metric_options={"step": 3}, positives_only=True)
    # Before the scores in the list: its page is written when the tables are there all the same.
    callbacks = [ExplanationCallback(EXPLAINERS), ReportCallback(), score, MapLogger(max_images=1)]
    trainer(tmp_path, *callbacks).test(network(), data(), verbose=False)
    found = page_data(tmp_path / "test")
    assert [card["index"] for card in found["cards"]] == list(range(7))
    assert found["metrics"][:2] == ["pid16", "auroc"]
    with open(tmp_path / "test" / "scores.csv", newline="") as file:
        for row in csv.DictReader(file):
            place = found["metrics"].index(row["metric"])
            assert found["scores"][row["name"]][row["explainer"]][place] == float(row["value"])
    playable = {card["index"] for card in found["cards"] if "curves" in card}
    assert playable == {card["index"] for card in found["cards"] if card["label"] == 1}
    assert found["player"]["metric"] == "pid16"
    assert not (tmp_path / "test" / "cards").exists()


def test_a_report_callback_alone_writes_a_page_within_its_limit(tmp_path):
    trainer(tmp_path, ReportCallback(explainers=EXPLAINERS, max_images=3)).test(network(), data(), verbose=False)
    found = page_data(tmp_path / "test")
    assert [card["index"] for card in found["cards"]] == [0, 3, 6]
    assert found["player"] is None
    assert set(found["cards"][0]["maps"]) == set(EXPLAINERS)


def test_every_validation_writes_its_own_page(tmp_path):
    callback = ReportCallback(explainers={"random": None}, val_images=2)
    trainer(tmp_path, callback, max_epochs=2, num_sanity_val_steps=1).fit(network(), data())
    assert [len(page_data(tmp_path / "val" / f"epoch=00{n}")["cards"]) for n in (0, 1)] == [2, 2]


def test_limits_of_0_or_less_raise():
    with pytest.raises(ValueError, match="max_images is 0"):
        ReportCallback(max_images=0)


@pytest.mark.slow
@pytest.mark.parametrize("metrics", [["insertion16", "deletion16"], ["pid1"], ["pid16@official", "pid16"]], ids=str)
def test_the_player_uses_any_available_insertion_deletion_metric(tmp_path, metrics):
    """Curves are kept under the name that was asked for, which need not be that of the difference."""
    score = EvaluationCallback(metrics, metric_options={"n_steps": 3})
    callbacks = [ExplanationCallback(EXPLAINERS, test_images=2), score, ReportCallback()]
    trainer(tmp_path, *callbacks).test(network(), data(), verbose=False)
    found = page_data(tmp_path / "test")
    assert found["player"]["metric"] == ("pid16" if "pid16" in metrics else metrics[0])
    assert all(set(card["curves"]) >= set(EXPLAINERS) for card in found["cards"])
    assert 'id="player"' in (tmp_path / "test" / "report.html").read_text()


def test_adaptive_curves_in_logits_are_labelled_as_logits_and_their_errors_are_stored(tmp_path):
    score = EvaluationCallback(["pid16"], metric_options={"n_steps": 3, "probability": "logit", "steps": "auto"})
    callbacks = [ExplanationCallback({"gradcam": None}, test_images=2), score, ReportCallback()]
    trainer(tmp_path, *callbacks).test(network(), data(), verbose=False)
    assert page_data(tmp_path / "test")["player"]["quantity"] == "logit"
    assert "are logits of the class instead of probabilities" in (tmp_path / "test" / "report.html").read_text()
    assert ",pid16@error," in (tmp_path / "test" / "scores.csv").read_text()


@pytest.mark.parametrize("given", [".", "../run"])
def test_the_title_names_the_resolved_run_folder(tmp_path, monkeypatch, given):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    callback = ReportCallback(explainers={"random": None}, test_images=1)
    trainer(given, callback).test(network(), data(), verbose=False)
    assert "<title>run: test</title>" in (tmp_path / "run" / "test" / "report.html").read_text()
