"""States in the checkpoints of strangers, and of runs that were moved: no file outside of the run folder is touched."""

import json
import shutil
import warnings

import pytest
import torch
from command_line import TINY, call_main

from callbacks.checkpoint import BestCheckpoint, RunCheckpointIO, without_paths

CHECKPOINTS = [{"class_path": "callbacks.BestCheckpoint"}, {"class_path": "callbacks.LastCheckpoint"}]
STOCK = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "val/loss", "save_top_k": 1, "filename": "stock-{epoch}"},
}


def fit(run_dir, epochs, *more, callbacks=CHECKPOINTS):
    words = ["--config", "configs/quickstart.yaml", *TINY, f"--trainer.callbacks={json.dumps(callbacks)}"]
    call_main(["fit", *words, f"--run_dir={run_dir}", f"--trainer.max_epochs={epochs}", "--wandb=disabled", *more])


@pytest.fixture
def root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def evil(victim):
    """The state of a checkpoint callback that wants `victim` removed, in all ways in which it can be written."""
    return {
        "monitor": "val/loss",
        "best_model_score": torch.tensor(1e9),
        "best_model_path": str(victim),
        "current_score": torch.tensor(1e9),
        "best_k_models": {str(victim): torch.tensor(1e9)},
        "kth_best_model_path": str(victim),
        "kth_value": torch.tensor(1e9),
        "last_model_path": str(victim),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize("spelling", ["relative", "absolute"])
def test_the_checkpoint_of_a_stranger_removes_nothing(tmp_path, kind, spelling):
    callbacks = CHECKPOINTS if kind == "ours" else [*CHECKPOINTS, STOCK]
    run, victim = tmp_path / "run", tmp_path / "victim"
    fit(run, 1, callbacks=callbacks)
    victim.mkdir()
    (victim / "precious.txt").write_text("precious")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    named = run / "checkpoints" / ".." / ".." / "victim" if spelling == "relative" else victim
    content["callbacks"] = {name: evil(named) for name in content["callbacks"]}
    stranger = tmp_path / "stranger.ckpt"
    torch.save(content, stranger)
    others = [path for path in listing(tmp_path) if not path.startswith("run/")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(run, 2, f"--ckpt_path={stranger}", callbacks=callbacks)
    assert [path for path in listing(tmp_path) if not path.startswith("run/")] == others
    assert (victim / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "state",
    [
        {"path": "/etc/passwd"},
        {"deep": [{"files": ("../x", "a/b")}]},
        {"best_model_path": "name_without_folder", "best_k_models": {"name": 1.0}},
        {"dirpath": None, "windows": "C:\\x", "up": ".."},
    ],
    ids=lambda state: next(iter(state)),
)
def test_no_path_outside_of_the_run_folder_stays_in_a_state(state):
    def texts(thing):
        if isinstance(thing, dict):
            return [t for pair in thing.items() for part in pair for t in texts(part)]
        if isinstance(thing, (list, tuple)):
            return [t for item in thing for t in texts(item)]
        return [thing] if isinstance(thing, str) else []

    cleared = without_paths(state, lambda path: False)
    assert not [text for text in texts(cleared) if "/" in text or "\\" in text or text in ("..", "name")]
    assert "name_without_folder" not in texts(cleared)


def test_numbers_and_words_of_a_state_are_kept():
    state = {"wait_count": 3, "best_score": torch.tensor(0.5), "mode": "min", "seconds": 1.5, "names": ["a", "b"]}
    assert without_paths(state, lambda path: False) == state


def test_a_checkpoint_io_removes_checkpoints_of_its_own_folders_only(tmp_path):
    mine, other = tmp_path / "run" / "a.ckpt", tmp_path / "other.ckpt"
    folder = tmp_path / "run" / "folder.ckpt"
    folder.mkdir(parents=True)
    for path in (mine, other):
        path.write_bytes(b"x")
    link = tmp_path / "run" / "link.ckpt"
    link.symlink_to(other)
    io = RunCheckpointIO([tmp_path / "run"])
    io.remove_checkpoint(mine)
    for path in (other, folder, link, tmp_path / "run" / ".." / "other.ckpt", tmp_path / "run"):
        with pytest.warns(UserWarning, match="is no checkpoint of this run and is not removed"):
            io.remove_checkpoint(path)
    assert not mine.exists()
    assert other.exists()
    assert folder.is_dir()
    assert link.is_symlink()


def make_unbeatable(folder):
    """Let the checkpoints of a run say that its best validation loss is -1, which no epoch reaches."""
    for path in folder.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        for name, state in content["callbacks"].items():
            if name.startswith("BestCheckpoint"):
                state["best_model_score"] = torch.tensor(-1.0)
        torch.save(content, path)


@pytest.mark.slow
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("place", ["copied", "linked", "moved aside"])
def test_a_fit_that_goes_on_elsewhere_keeps_the_best_epoch(tmp_path, place):
    first, run, source = tmp_path / "first", tmp_path / "second", "{run}/checkpoints/last.ckpt"
    fit(first, 1)
    make_unbeatable(first / "checkpoints")
    best = (first / "checkpoints" / "best.ckpt").read_bytes()
    if place == "copied":
        shutil.copytree(first, run)
    elif place == "linked":
        run.symlink_to(first)
    else:
        run, source = first, "{run}/fit.old-1/checkpoints/last.ckpt"
        fit(run, 1)
        shutil.rmtree(run / "checkpoints")
    fit(run, 2, f"--ckpt_path={source.format(run=run)}")
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == best
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_a_best_checkpoint_is_as_good_as_its_file_says(tmp_path):
    callback = BestCheckpoint()
    callback.dirpath = str(tmp_path)
    state = {"best_model_score": torch.tensor(0.25)}
    torch.save({"state_dict": {}, "callbacks": {callback.state_key: state}}, tmp_path / "best.ckpt")
    callback.load_state_dict({"best_model_score": torch.tensor(-9.0), "best_model_path": "/elsewhere/best.ckpt"})
    assert callback.best_model_path == str(tmp_path / "best.ckpt")
    assert callback.best_model_score == callback.kth_value == 0.25
    assert "path" not in " ".join(callback.state_dict())
