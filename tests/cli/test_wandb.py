"""Weights & Biases, offline: the maps are in the run; without it nothing else changes."""

import pytest
from command_line import run

pytestmark = pytest.mark.slow


def test_the_offline_run_holds_the_pictures_and_the_table(tmp_path):
    run("test", "--wandb=offline", run_dir=tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    pictures = list((folder / "files" / "media" / "images").rglob("*.png"))
    assert len(pictures) == 8
    tables = list((folder / "files" / "media" / "table").rglob("*.json"))
    assert len(tables) == 1
    assert "pid16" in tables[0].read_text()
    sent = {path.read_bytes() for path in pictures}
    kept = {path.read_bytes() for path in (tmp_path / "test" / "overlays").glob("*.png")}
    assert sent == kept


def test_without_wandb_the_results_are_the_same(tmp_path, monkeypatch):
    # A package of that name that cannot be imported stands for one that is missing or broken.
    blocked = tmp_path / "blocked" / "wandb"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('wandb is blocked')")
    run("test", run_dir=tmp_path / "plain")
    monkeypatch.setenv("PYTHONPATH", str(blocked.parent))
    done = run("test", "--wandb=offline", run_dir=tmp_path / "blocked_run")
    assert "Weights & Biases is not available" in done.stderr
    a, b = ((tmp_path / name / "test" / "scores.csv").read_text() for name in ("plain", "blocked_run"))
    assert a == b
