"""What a stage leaves in its folder: what the present command has made, and maps and scores of earlier ones."""

import json
import warnings

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_callbacks import Counted, data, network, rows, trainer

from callbacks import EvaluationCallback, ExplanationCallback, MapLogger, ReportCallback
from labn.store import ResultStore

STEP = {"metric_options": {"step": 3}}


def run(folder, *callbacks, batch_size=3, **options):
    trainer(folder, *callbacks, **options).test(network(), data(batch_size=batch_size), verbose=False)


def everything():
    """Callbacks that leave every kind of file."""
    score = EvaluationCallback(["errors", "pid16"], metric_options={"step": 3, "n_failures": 5})
    return ExplanationCallback({"counted": Counted()}), score, MapLogger(max_images=3), ReportCallback()


def made(stage):
    """Name -> content of what is made of maps and scores."""
    files = [path for path in stage.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {str(p.relative_to(stage)): p.read_bytes() for p in files if p.parent.name != "parts"}


def kept(stage):
    return {p: p.stat().st_mtime_ns for kind in ("maps/*.safetensors", "parts/*") for p in stage.glob(kind)}


def test_a_second_test_leaves_no_table_and_picture_of_the_first_and_loses_no_map_and_score(tmp_path):
    stage = tmp_path / "test"
    run(tmp_path, *everything())
    first, computed = made(stage), kept(stage)
    assert {"counts.csv", "curves.npz", "scores.csv"} < first.keys()
    assert len(computed) == 3 * 3 * 2
    few = ExplanationCallback({"counted": Counted()}, test_images=2)
    run(tmp_path, few, MapLogger(max_images=1), ReportCallback())
    second = made(stage)
    names = {"cards.json", "identity.json", "maps/manifest.json", "report.html", "overlays/000000-test_00000.png"}
    assert second.keys() == names
    assert b"pid16" not in second["report.html"]
    assert kept(stage) == computed
    callbacks = everything()
    run(tmp_path, *callbacks)
    assert made(stage) == first
    assert kept(stage) == computed
    assert callbacks[0].explainers["counted"]._seen == []


def test_no_process_writes_before_the_first_has_removed(tmp_path, monkeypatch):
    happened = []

    def noted(owner, name, event):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: happened.append(event) or real(*given, **named))

    noted(ResultStore, "remove_derived", "removed")
    noted(SingleDeviceStrategy, "barrier", "barrier")
    noted(ResultStore, "add_maps", "written")
    run(tmp_path, ExplanationCallback({"counted": Counted()}))
    events = [event for event, before in zip(happened, ["", *happened]) if event != before]
    assert events[events.index("removed") :][:3] == ["removed", "barrier", "written"]


def test_what_made_the_maps_is_written_without_scores_too(tmp_path):
    explain = ExplanationCallback({"gradcam": None}, target="prediction")
    run(tmp_path / "alone", explain)
    run(tmp_path / "scored", explain, EvaluationCallback(["pid16"], baselines=False, **STEP))
    alone, scored = (
        json.loads((tmp_path / n / "test" / "maps" / "manifest.json").read_text()) for n in ("alone", "scored")
    )
    assert alone["explainers"]["gradcam"]["class"] == "labn.explainers.cam.GradCAM"
    assert alone["target"] == "prediction"
    assert {"checkpoint", "network", "data", "split", "class_names", "versions"} < alone.keys()
    assert scored.keys() - alone.keys() == {"metrics", "settings", "positive_classes", "samples"}
    assert {name: scored[name] for name in alone} == alone


def test_it_is_there_from_the_beginning(tmp_path):
    class Looks(Counted):
        def attribute(self, *arguments):
            assert (tmp_path / "test" / "maps" / "manifest.json").is_file()
            return super().attribute(*arguments)

    run(tmp_path, ExplanationCallback({"looks": Looks()}))


def test_scored_samples_that_the_tables_lack_are_warned_about(tmp_path, monkeypatch):
    add = ResultStore.add_scores

    def elsewhere(store, part):
        """As another process does that has other settings."""
        if part.index[0] >= 3:
            part.keys = dict.fromkeys(part.keys, "another")
        add(store, part)

    monkeypatch.setattr(ResultStore, "add_scores", elsewhere)
    score = EvaluationCallback(["pid16"], explainers={"random": None}, baselines=False, **STEP)
    with pytest.warns(UserWarning, match="the tables lack 4 of 7 scored samples"):
        run(tmp_path, score)
    assert {row["index"] for row in rows(tmp_path / "test")} == {"0", "1", "2"}


def test_samples_that_nobody_was_to_score_are_not_warned_about(tmp_path):
    def score(**options):
        return EvaluationCallback(["pid16", "mass"], explainers={"random": None}, baselines=False, **options)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the tables lack")
        run(tmp_path, score(**STEP))
        run(tmp_path, score(**STEP, positives_only=True))
        run(tmp_path, score(**STEP, fill="mean", test_images=2))
        run(tmp_path, score(**STEP, fill="blur"), limit_test_batches=1)
        run(tmp_path, score(metric_options={"step": 5}), batch_size=2)
        trainer(tmp_path, score(val_metrics=[]), max_epochs=1).fit(network(), data())


def test_nothing_is_said_to_come_from_disk_where_nothing_is_scored(tmp_path, caplog):
    score = EvaluationCallback(["pid16"], val_metrics=[], explainers={"random": None})
    with caplog.at_level("INFO"):
        trainer(tmp_path, score, max_epochs=1).fit(network(), data())
    assert "from disk" not in caplog.text


def test_no_picture_of_a_killed_test_with_other_settings_stays(tmp_path, monkeypatch):
    def cards(folder, fill, batch_size):
        score = EvaluationCallback(["pid16"], explainers={"gradcam": None}, fill=fill, baselines=False, **STEP)
        run(folder, score, ReportCallback(), batch_size=batch_size)
        return folder / "test" / "cards.json"

    with monkeypatch.context() as patched:
        patched.setattr(ReportCallback, "_write", lambda self, trainer: None)
        assert not cards(tmp_path / "killed", "black", 2).exists()
    assert list((tmp_path / "killed" / "test" / "cards").iterdir())
    again, undisturbed = (cards(tmp_path / name, "mean", 4).read_bytes() for name in ("killed", "whole"))
    assert again == undisturbed
