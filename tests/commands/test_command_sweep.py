import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import call_main

from labn.commands.sweep import STATE, Sweep, run_all
from labn.launch.config_include import expand_includes


class Recorder:
    """Stands for the command line: keeps the words, leaves a checkpoint, fails or stops where told to."""

    def __init__(self, folder, fails=(), stops=()):
        self.folder, self.calls, self.fails, self.stops = folder, [], list(fails), list(stops)

    def __call__(self, words, log):
        self.calls.append(words)
        place = (words[0], int(log.parent.name.removeprefix("seed=")))
        if words[0] == "fit":
            (log.parent / "checkpoints").mkdir(exist_ok=True)
            (log.parent / "checkpoints" / "last.ckpt").touch()
        if place in self.stops:
            self.stops.remove(place)
            raise KeyboardInterrupt
        return 1 if place in self.fails else 0


@pytest.fixture
def sweep(tmp_path):
    files = {name: str(tmp_path / f"{name}.yaml") for name in ("a", "short", "score")}
    for path in files.values():
        Path(path).write_text("model: {}\n")
    alone = (files["a"],), (files["short"],), (files["score"],)
    return Sweep(*alone, (38, 39), tmp_path / "runs", ("--x=1",))


def test_every_seed_is_trained_and_tested_in_its_own_folder(sweep):
    recorder = Recorder(sweep.folder)
    run_all(sweep, recorder)
    assert [call[0] for call in recorder.calls] == ["fit", "test", "fit", "test"]
    fit, test = recorder.calls[2:]
    assert {"--seed_everything=39", "--data.init_args.seed=39", f"--run_dir={sweep.folder / 'seed=39'}", "--x=1"} < set(
        fit
    )
    read = [[Path(word).stem for word in call if word.startswith("--config")] for call in (fit, test)]
    assert read == [["a", "short"], ["a", "score"]]
    assert "--ckpt_path=best" in test
    assert "--ckpt_path=last" not in fit


def test_the_command_that_it_offers_can_be_pasted_into_a_shell(sweep, tmp_path, capsys):
    spaced = replace(sweep, folder=tmp_path / "my runs")
    run_all(spaced, Recorder(spaced.folder))
    line = capsys.readouterr().out.splitlines()[-1]
    words = line.partition(": ")[2].replace("python cli.py compare", "printf '%s\\n'")
    found = subprocess.run(words, shell=True, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [str(spaced.run_dir(seed)) for seed in (38, 39)]


def test_an_interrupted_sweep_resumes_at_its_step(sweep):
    recorder = Recorder(sweep.folder, stops=[("fit", 39)])
    with pytest.raises(KeyboardInterrupt):
        run_all(sweep, recorder)
    again = Recorder(sweep.folder)
    run_all(sweep, again)
    assert [(call[0], "--ckpt_path=last" in call) for call in again.calls] == [("fit", True), ("test", False)]
    third = Recorder(sweep.folder)
    run_all(sweep, third)
    assert third.calls == []


def test_a_failed_command_names_its_log_and_is_tried_again(sweep):
    with pytest.raises(ChildProcessError, match=r"test of .*seed=38 ended with status 1; .*test\.log"):
        run_all(sweep, Recorder(sweep.folder, fails=[("test", 38)]))
    again = Recorder(sweep.folder)
    run_all(sweep, again)
    assert [call[0] for call in again.calls] == ["test", "fit", "test"]


def test_other_settings_are_not_mixed_into_a_trained_folder(sweep, tmp_path):
    run_all(sweep, Recorder(sweep.folder))
    (tmp_path / "score.yaml").write_text("other: {}\n")
    again = Recorder(sweep.folder)
    run_all(sweep, again)
    assert [call[0] for call in again.calls] == ["test", "test"]
    (tmp_path / "a.yaml").write_text("model: {lr: 1}\n")
    with pytest.raises(ValueError, match="seed=38 was trained with other arguments or configuration files"):
        run_all(sweep, Recorder(sweep.folder))


@pytest.fixture
def with_includes(tmp_path):
    """Words of a sweep over a file that includes another, with a test file that does so too."""
    append = "trainer: {callbacks+: [{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]}\n"
    files = {"more": append, "a": "include: [more.yaml]\n", "tested": "trainer: {limit_test_batches: 1}\n"}
    for name, text in {**files, "test": "include: [tested.yaml]\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [f"--config={tmp_path / 'a.yaml'}", f"--test_config={tmp_path / 'test.yaml'}"]
    return ["sweep", *files, "--seeds", "1", f"--run_dir={tmp_path / 'runs'}"]


def started(words, monkeypatch):
    """The words of what a sweep starts."""
    recorder = Recorder(None)
    monkeypatch.setattr("labn.commands.sweep.run_all", lambda sweep: run_all(sweep, recorder))
    call_main(words)
    return recorder.calls


def test_included_files_are_read_once(with_includes, monkeypatch):
    fit, test = started(with_includes, monkeypatch)
    read = [[Path(word).stem for word in expand_includes(words) if word.endswith(".yaml")] for words in (fit, test)]
    assert read == [["more", "a"], ["more", "a", "tested", "test"]]


def test_a_seed_is_tested_again_after_an_included_file_has_changed(with_includes, tmp_path, monkeypatch):
    assert [words[0] for words in started(with_includes, monkeypatch)] == ["fit", "test"]
    assert started(with_includes, monkeypatch) == []
    (tmp_path / "tested.yaml").write_text("trainer: {limit_test_batches: 3}\n")
    assert [words[0] for words in started(with_includes, monkeypatch)] == ["test"]
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 1}\n")
    with pytest.raises(SystemExit):
        started(with_includes, monkeypatch)


def test_a_missing_file_is_named_before_anything_is_run(with_includes, tmp_path, monkeypatch, capsys):
    (tmp_path / "tested.yaml").unlink()
    with pytest.raises(SystemExit):
        started(with_includes, monkeypatch)
    assert f"{tmp_path / 'tested.yaml'}, which is not a file" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_files_among_the_options_are_part_of_the_signature(sweep, tmp_path):
    more = tmp_path / "more.yaml"
    sweep = replace(sweep, options=(f"--config={more}",))
    signatures = []
    for text in ("a: 1\n", "a: 2\n"):
        more.write_text(text)
        signatures.append(sweep.signature("test", 38))
    assert signatures[0]["words"] == signatures[1]["words"] == sweep.words("test", 38)
    assert signatures[0] != signatures[1]


def test_the_state_file_lists_finished_steps(sweep):
    run_all(sweep, Recorder(sweep.folder))
    state = json.loads((sweep.run_dir(38) / STATE).read_text())
    assert state["fit"]["done"]
    assert state["test"]["signature"]["words"] == sweep.words("test", 38)


def test_the_folder_is_named_after_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overlays").mkdir()
    for name in ("exp.yaml", "overlays/reduced.yaml"):
        (tmp_path / name).write_text("{}\n")
    seen = []
    monkeypatch.setattr("labn.commands.sweep.run_all", seen.append)
    files = ["--config", "exp.yaml", "--config", "overlays/reduced.yaml"]
    call_main(["sweep", *files, "--seeds", "1", "2", "--", "--trainer.max_epochs=1"])
    (sweep,) = seen
    assert str(sweep.folder) == "runs/exp"
    assert sweep.seeds == (1, 2)
    assert sweep.options == ("--trainer.max_epochs=1",)
