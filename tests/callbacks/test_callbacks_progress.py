"""The count of maps: a line of Lightning's bar in a terminal, which goes when the stage ends, else text."""

import io
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import Progress

from callbacks.explanation.progress import MapProgress, TextProgress


def trainer_with(is_terminal, first=True):
    bar = RichProgressBar()
    bar.progress = Progress(console=Console(file=io.StringIO(), force_terminal=is_terminal))
    return SimpleNamespace(progress_bar_callback=bar, is_global_zero=first), bar.progress


def test_a_terminal_shows_the_count_beside_lightnings_bar(capsys):
    trainer, live = trainer_with(True)
    shown = MapProgress(trainer, 10)
    shown.total *= 2
    assert live.tasks == []
    shown.update(3)
    shown.update(4)
    (task,) = live.tasks
    assert (task.description, task.completed, task.total) == ("Explaining", 7, 20)
    shown.close()
    assert live.tasks == []
    assert capsys.readouterr().err == ""


def test_a_bar_that_lightning_has_replaced_is_left_alone():
    trainer, live = trainer_with(True)
    shown = MapProgress(trainer, 10)
    shown.update(1)
    live.remove_task(live.task_ids[0])
    shown.update(1)
    shown.close()


@pytest.mark.parametrize("first", [True, False])
def test_a_log_file_has_text_of_rank_zero(first, capsys, monkeypatch):
    trainer, live = trainer_with(False, first)
    monkeypatch.setattr("callbacks.explanation.progress.SECONDS", 0)
    shown = MapProgress(trainer, 10)
    shown.update(5)
    shown.update(5)
    shown.close()
    assert live.tasks == []
    lines = ["explaining: 5 of 10 maps (50 %) in 0:00", "explaining: 10 of 10 maps (100 %) in 0:00"]
    # Neither a carriage return nor a line without an end, which would make one endless line of the log.
    assert capsys.readouterr().err == "".join(f"{line}\n" for line in lines) * first


SEEN = [(6, 50, "0:21"), (10, 83, "0:41"), (12, 100, "1:41")]


def test_a_log_file_has_a_line_every_twenty_seconds(capsys, monkeypatch):
    now = iter([0, 10, 19, 21, 40, 41, 101])
    monkeypatch.setattr("callbacks.explanation.progress.time.monotonic", lambda: next(now))
    shown = TextProgress(12)
    for _ in range(6):
        shown.update(2)
    said = [f"explaining: {count} of 12 maps ({share} %) in {time}" for count, share, time in SEEN]
    assert capsys.readouterr().err.splitlines() == said
