"""What a command prints: configurations that can be given back, and the figures of the model."""

import logging
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from command_line import call_main
from lightning.pytorch.callbacks import RichProgressBar

from callbacks import BestCheckpoint, DetectionCallback, EvaluationCallback, ExplanationCallback, LastCheckpoint
from callbacks.logging.terminal import (
    RunProgressBar,
    no_noise,
    say_figures,
    say_fitted,
    with_progress_bar,
)
from cli import plain_warnings
from labn.explainers import explainer_by_name
from labn.metrics.statistics import Interval
from labn.results.tables import reading, summary_table


@pytest.fixture
def root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def printed(config, capsys):
    with pytest.raises(SystemExit):
        call_main(["fit", "--config", str(config), "--print_config", "--trainer.max_epochs=2"])
    return capsys.readouterr().out


@pytest.mark.usefixtures("root")
def test_a_printed_configuration_can_be_given_back_from_any_folder(tmp_path, capsys):
    first = printed("configs/quickstart.yaml", capsys)
    (tmp_path / "mine.yaml").write_text(first)
    assert "max_epochs: 2" in first
    assert printed(tmp_path / "mine.yaml", capsys) == first


@pytest.mark.parametrize("word", ["--include=x.yaml", "--include", "--include+=x.yaml"])
def test_include_on_the_command_line_is_refused_with_what_to_write(word):
    with pytest.raises(ValueError, match="on the command line, give the file with --config"):
        call_main(["fit", word, "x.yaml"])


def trainer_of(folder, first, *more):
    logged = {"test/accuracy": 0.75, "test/ap/RBC": 0.5, "test/gradcam/pid16": 0.1, "test/random/pid16": 0.0}
    shown = [ExplanationCallback(explainers={"gradcam": None}), EvaluationCallback(metrics=["pid16"])]
    return SimpleNamespace(
        callbacks=[*shown, *more],
        callback_metrics={name: torch.tensor(value) for name, value in {**logged, "val/accuracy": 0.5}.items()},
        default_root_dir=str(folder),
        fast_dev_run=False,
        is_global_zero=first,
        loggers=[],
    )


def test_figures_are_those_of_the_model_and_of_the_stage(tmp_path, capsys):
    say_figures(trainer_of(tmp_path, True), "test")
    assert capsys.readouterr().out.split("\n") == ["", "test: accuracy 0.75, ap/RBC 0.5", ""]


@pytest.mark.parametrize(("counts", "said"), [((30, 10), True), ((10, 10), False), ((40, 0), False)])
def test_an_accuracy_at_chance_is_called_so(tmp_path, capsys, counts, said):
    """.75 is the share of the larger class of 30 and 10 samples, and far above that of 10 and 10."""
    trainer = trainer_of(tmp_path, True)
    labels = torch.tensor([0] * counts[0] + [1] * counts[1])
    trainer.datamodule = SimpleNamespace(labels=lambda split: {"test": labels}[split])
    say_figures(trainer, "test")
    sentence = (
        "The accuracy of 0.750 is not clearly above 0.750, the share of the most frequent class among the 40 samples"
    )
    assert (sentence in capsys.readouterr().out) == said


def test_scores_of_a_method_with_a_slash_and_the_confusion_matrix_are_no_figures(tmp_path, capsys):
    trainer = trainer_of(tmp_path, True, ExplanationCallback(explainers={"lrp/c3": explainer_by_name("c3lrp")}))
    others = {"test/lrp/c3/pid16": torch.tensor(0.5), "test/confusion/0_1": torch.tensor(7.0)}
    trainer.callback_metrics = {"test/accuracy": torch.tensor(0.75), **others}
    say_figures(trainer, "test")
    assert capsys.readouterr().out.split("\n") == ["", "test: accuracy 0.75", ""]


def test_the_report_is_the_one_that_was_written(tmp_path, capsys):
    for name in ("test", "val/epoch=003", "detected"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.html").touch()
    say_figures(trainer_of(tmp_path, True), "test")
    assert "Report" not in capsys.readouterr().out, "of an earlier command"
    trainer, detector = trainer_of(tmp_path, True), DetectionCallback()
    for folder in ("val/epoch=003", "elsewhere"):
        trainer.callbacks[0]._session = SimpleNamespace(store=SimpleNamespace(folder=tmp_path / folder))
        say_figures(trainer, "val")
    detector._folder = tmp_path / "detected"
    say_figures(trainer_of(tmp_path, True, detector), "test")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Report")]
    assert said == [f"Report: {tmp_path / name / 'report.html'}" for name in ("val/epoch=003", "detected")]


def test_only_rank_zero_prints_the_metrics(tmp_path, capsys):
    say_figures(trainer_of(tmp_path, False), "test")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("try installing [litlogger](x)", False),
        ("TPU available: False, using: 0 TPU cores", False),
        ("GPU available: False, used: False", False),
        ("GPU available: True (cuda), used: True", True),
        ("Loaded model weights", True),
        ("`Trainer.fit` stopped: `max_epochs=2` reached.", False),
        ("`Trainer.fit` stopped: No training batches.", True),
    ],
)
def test_what_tells_nothing_is_left_out(text, kept):
    assert no_noise(logging.LogRecord("x", logging.INFO, "", 0, text, (), None)) is kept


def test_the_progress_bar_is_that_of_the_configuration_or_one_without_the_loggers_version():
    best, own = BestCheckpoint(), RichProgressBar(leave=True)
    assert with_progress_bar(best, False) == [best]
    assert with_progress_bar([best, own], True) == [best, own]
    first, bar = with_progress_bar([best], True)
    assert (first, type(bar)) == (best, RunProgressBar)
    trainer = SimpleNamespace(loggers=[SimpleNamespace(version="2y7n")], progress_bar_metrics={"val/loss": 0.5})
    assert "v_num" in RichProgressBar().get_metrics(trainer, None)
    assert bar.get_metrics(trainer, None) == {"val/loss": 0.5}


def test_warnings_have_no_path_of_a_source_file(monkeypatch):
    monkeypatch.delenv("LABN_TRACEBACK", raising=False)
    before = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("a thing\x1b", UserWarning, "file.py", 3) == "Warning: a thing\\x1b\n"
    assert warnings.formatwarning is before
    monkeypatch.setenv("LABN_TRACEBACK", "1")
    with plain_warnings():
        assert "file.py:3" in warnings.formatwarning("a thing", UserWarning, "file.py", 3)


def test_fit_ends_with_the_best_checkpoint_and_the_command_that_tests_it(tmp_path, capsys):
    best = BestCheckpoint()
    best.best_model_path, best.best_model_score = str(tmp_path / "best.ckpt"), torch.tensor(0.25)
    last = LastCheckpoint()
    last.best_model_path = str(tmp_path / "last.ckpt")  # Lightning's name for the last one
    metrics = {"val/accuracy": torch.tensor(0.5)}
    trainer = SimpleNamespace(
        checkpoint_callbacks=[last, best], is_global_zero=True, loggers=[], callback_metrics=metrics
    )
    say_fitted(trainer, ["fit", "--config", "a b.yaml", "--ckpt_path", "last", "--run_dir", "fit"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "",
        f"Best checkpoint: {tmp_path / 'best.ckpt'} ({best.monitor} 0.25)",
        "Next: python cli.py test --config 'a b.yaml' --run_dir fit --ckpt_path best",
    ]
    trainer.datamodule = SimpleNamespace(labels=lambda split: {"val": torch.tensor([0, 1, 1])}[split])
    say_fitted(trainer, ["fit"])
    assert "The accuracy of 0.500 is not clearly above 0.667, the share" in capsys.readouterr().out
    trainer.is_global_zero = False
    say_fitted(trainer, ["fit"])
    assert capsys.readouterr().out == ""


INTERVALS = {
    ("labn", "pid16"): (0.5, 0.4, 0.6),
    ("random", "pid16"): (0.01, -0.1, 0.1),
    ("labn", "mass"): (0.3, 0.2, 0.4),
}


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ((0.4, 0.6), "labn is best with 0.500 and beats random by 0.490 [0.400, 0.600]."),
        ((-0.1, 0.6), "no method beats random: labn, the best, differs from it by 0.490 [-0.100, 0.600]."),
        ((math.nan, math.nan), "too few samples"),
    ],
)
def test_a_table_says_what_zero_is_and_whether_the_best_method_beats_random(bounds, told):
    summary = {key: Interval(*values, 20) for key, values in INTERVALS.items()}
    said = reading(summary, {("labn", "random", "pid16"): Interval(0.49, *bounds, 20)}, "pid16")
    assert said.startswith("pid16: a map without information gets 0 (random: 0.010 [-0.100, 0.100]); ")
    assert told in said
    assert reading(summary, {}, "mass") == ""


def test_a_lead_on_few_samples_is_not_called_a_victory():
    summary = {key: Interval(*values, 8) for key, values in INTERVALS.items()}
    said = reading(summary, {("labn", "random", "pid16"): Interval(0.49, 0.4, 0.6, 8)}, "pid16")
    assert said.endswith("ahead of random by 0.490 [0.400, 0.600]; 8 samples are too few to be sure.")


@pytest.mark.parametrize(
    ("best", "difference", "is_small"),
    [(0.001, 0.0005, True), (0.3, 0.009, True), (0.3, 0.2, False), (-0.004, math.nan, True), (0.01, 0.01, False)],
)
def test_the_sentence_about_a_table_says_where_a_lead_is_next_to_nothing(best, difference, is_small):
    """The interval may exclude 0 all the same: many samples of a network at chance."""
    summary = {("gradcam", "id"): Interval(best, -1, 1, 99), ("random", "id"): Interval(-0.0002, -0.0004, 0.1, 99)}
    said = reading(summary, {("gradcam", "random", "id"): Interval(difference, 0.0001, 0.9, 99)}, "id")
    assert ("next to nothing" in said) == is_small
    assert ("flat curves" in said) == (best < 0.01)
    assert "-0.000" not in said + summary_table(summary, ["id"])


def test_a_table_that_is_wider_than_the_terminal_has_means_only():
    means = {("gradcam", name): Interval(0.25, 0.125, 0.5, 20) for name in ("pid16", "mass")}
    whole = summary_table(means, ["pid16", "mass"])
    assert "0.250 [0.125, 0.500]" in whole
    width = max(map(len, whole.splitlines()))
    assert summary_table(means, ["pid16", "mass"], width) == whole
    assert summary_table(means, ["pid16", "mass"], width - 1).split() == ["pid16", "mass", "gradcam", "0.250", "0.250"]
