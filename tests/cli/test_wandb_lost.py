"""Weights & Biases that fails in the middle of a run: the run goes on, and its results are the same."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
from command_line import ROOT, call_main
from run_contents import contents, differences

pytestmark = pytest.mark.slow
WORDS = ["--config", str(ROOT / "tests/faults/small.yaml"), "--trainer.max_epochs=2"]


class Service:
    """A package `wandb` whose service goes away: `fails` says how many calls of a kind it answers."""

    def __init__(self, **fails):
        self.left, self.calls, self.config = fails, {}, SimpleNamespace(update=self.kind("config"))
        self.id = self.name = "run"

    def kind(self, name):
        def call(*_, **__):
            self.calls[name] = self.calls.get(name, 0) + 1
            if self.calls[name] > self.left.get(name, 1_000_000):
                raise ConnectionResetError(f"the {name} service has gone\nand more")

        return call

    def package(self):
        def made(name):
            return type(name, (), {"__init__": lambda _, *a, **k: self.kind(name)(*a, **k)})

        self.log = self.kind("log")
        modules = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}
        wandb = modules["wandb"]
        wandb.run, wandb.init, wandb.Table, wandb.Image = None, lambda **_: self, made("Table"), made("Image")
        modules["wandb.sdk.lib"].RunDisabled = modules["wandb.wandb_run"].Run = type("Run", (), {})
        return modules


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Fit or test in this process with such a package."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    # What the logger sets for the real package.
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))

    def start(step, run_dir, service, *words):
        for name, module in service.package().items():
            monkeypatch.setitem(sys.modules, name, module)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call_main([step, *WORDS, f"--run_dir={run_dir}", "--wandb=offline", *words])
        return [str(w.message) for w in caught if "Weights & Biases" in str(w.message)]

    return start


def test_a_wandb_failure_is_one_warning_and_changes_no_result(command, tmp_path):
    plain = tmp_path / "plain" / "run"
    assert command("fit", plain, Service()) == command("test", plain, Service(), "--ckpt_path=best") == []
    expected = contents(plain)
    run_dir = tmp_path / "troubled" / "run"
    service = Service(log=3)
    said = command("fit", run_dir, service)
    assert service.calls["log"] == 4
    assert said == [
        "Weights & Biases has failed (the log service has gone) and receives nothing more; the run continues, and all "
        f"results are in {run_dir}."
    ]
    for trouble in ("config", 0), ("log", 0), ("Image", 0), ("Image", 2), ("Table", 0):
        said = command("test", run_dir, Service(**dict([trouble])), "--ckpt_path=best")
        assert len(said) == 1, trouble
        assert f"the {trouble[0]} service has gone" in said[0], trouble
        assert differences(contents(run_dir), expected) == [], trouble
