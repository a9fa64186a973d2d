"""Checkpoints on disk: written whole, the one before kept, damage found and said."""

import os
import pickle
import shutil

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, TensorDataset

from callbacks.checkpoint import BestCheckpoint, LastCheckpoint, RunCheckpointIO, damage, find_checkpoint, has_last
from labn.modules.optim import on_plateau


@pytest.fixture
def saved(tmp_path):
    """A run folder after epochs 0, 1 and 2."""
    folder = tmp_path / "checkpoints"
    for epoch in range(3):
        RunCheckpointIO().save_checkpoint(state(epoch), folder / "last.ckpt")
    RunCheckpointIO().save_checkpoint(state(1), folder / "best.ckpt")
    return tmp_path


def state(epoch):
    return {"epoch": epoch, "weights": torch.full((1000,), float(epoch))}


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"]


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    place = content.rindex(torch.full((4,), 2.0).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def test_last_becomes_previous_and_no_temporary_file_stays(saved):
    folder = saved / "checkpoints"
    assert {path.name: epoch_of(path) for path in folder.iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
        "best.ckpt": 1,
    }
    assert find_checkpoint(saved, "last") == str(folder / "last.ckpt")


@pytest.mark.parametrize("injure", [change_a_byte, truncate, empty, os.unlink], ids=lambda f: f.__name__)
def test_a_damaged_last_is_replaced_by_previous(saved, injure):
    last = saved / "checkpoints" / "last.ckpt"
    injure(last)
    with pytest.warns(UserWarning, match=r"last\.ckpt is (damaged \(.*\)|missing); resuming from .*previous\.ckpt"):
        assert epoch_of(find_checkpoint(saved, "last")) == 1
    assert has_last(saved)


def test_a_damaged_last_does_not_become_previous(saved):
    last, previous = (saved / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    truncate(last)
    RunCheckpointIO().save_checkpoint(state(3), last)
    assert (epoch_of(previous), epoch_of(last)) == (1, 3)


def test_damaged_last_and_previous_raise_an_input_error(saved):
    for path in (saved / "checkpoints").iterdir():
        truncate(path)
    for which in ("best", "last"):
        with pytest.raises(ValueError, match=rf"--ckpt_path {which}: .*{which}\.ckpt is damaged \(.*\); give another"):
            find_checkpoint(saved, which)


def test_a_run_without_checkpoints_raises_a_missing_file_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt does not exist; run fit"):
        find_checkpoint(tmp_path, "last")
    assert not has_last(tmp_path)


def test_a_failed_write_keeps_the_existing_checkpoints(saved, monkeypatch):
    last = saved / "checkpoints" / "last.ckpt"

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: No space left on device; free some space"):
        RunCheckpointIO().save_checkpoint(state(3), last)
    assert epoch_of(last) == 2
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_without_hard_links_the_file_is_renamed(saved, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    last = saved / "checkpoints" / "last.ckpt"
    RunCheckpointIO().save_checkpoint(state(3), last)
    assert (epoch_of(last.with_stem("previous")), epoch_of(last)) == (2, 3)


def test_every_truncation_is_detected(saved, tmp_path):
    whole = (saved / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for size in range(0, len(whole), max(1, len(whole) // 200)):
        cut.write_bytes(whole[:size])
        assert damage(cut), size
    shutil.copy(saved / "checkpoints" / "last.ckpt", cut)
    assert damage(cut) is None


class Falling(pl.LightningModule):
    """A validation loss that never improves after the first epoch, and the rate that the schedule makes of it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rates = []

    def training_step(self, batch, batch_idx):
        return (self.weight * batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        return on_plateau(torch.optim.SGD(self.parameters(), lr=1.0), factor=0.5, patience=0, min_lr=0.0)


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def train(folder, epochs, *callbacks, **options):
    module, loader = Falling(), DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    trainer = pl.Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=[LastCheckpoint(), *callbacks], **QUIET)
    trainer.fit(module, loader, loader, **options)
    return module.rates


def test_a_resumed_fit_applies_the_pending_scheduler_step(tmp_path):
    undisturbed = train(tmp_path / "whole", 5)
    assert undisturbed == [1.0, 1.0, 0.5, 0.25, 0.125]
    for cut in (1, 2, 3, 4):
        folder = tmp_path / str(cut)
        before = train(folder, cut)
        assert before + train(folder, 5, ckpt_path=find_checkpoint(folder, "last")) == undisturbed


def test_a_fit_that_had_stopped_early_stops_again_after_a_resume(tmp_path):
    assert len(train(tmp_path, 9, EarlyStopping("val/loss", patience=2))) == 3
    last = find_checkpoint(tmp_path, "last")
    assert train(tmp_path, 9, EarlyStopping("val/loss", patience=2), ckpt_path=last) == []
    # Lightning takes the patience from the checkpoint; without the callback nothing stops it.
    assert len(train(tmp_path, 5, ckpt_path=last)) == 2


def test_a_fresh_fit_is_not_stopped_by_the_count_of_an_earlier_one(tmp_path):
    stopping = EarlyStopping("val/loss", patience=2)
    assert len(train(tmp_path / "first", 9, stopping)) == 3
    # Lightning goes on counting, so that the first epoch without an improvement ends the second fit.
    assert len(train(tmp_path / "second", 9, stopping)) == 1
    # A checkpoint that was saved without early stopping says nothing about its count.
    train(tmp_path / "without", 1)
    last = find_checkpoint(tmp_path / "without", "last")
    assert len(train(tmp_path / "without", 9, stopping, ckpt_path=last)) == 1


def test_a_fresh_fit_does_not_apply_the_scheduler_step_of_a_tested_checkpoint(tmp_path):
    train(tmp_path, 2)
    callback, loader = LastCheckpoint(), DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=1, callbacks=[callback], **QUIET)
    trainer.validate(Falling(), loader, ckpt_path=find_checkpoint(tmp_path, "last"), verbose=False)
    module = Falling()
    trainer.fit(module, loader, loader)
    assert module.optimizers().param_groups[0]["lr"] == 1.0


class Scored(Falling):
    """A model whose validation loss is given, and which remembers the loss of the checkpoint that it has loaded."""

    def __init__(self, loss):
        super().__init__()
        self.register_buffer("loss", torch.tensor(loss))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss)

    test_step = validation_step


def fit_scored(folder, loss, callbacks, epochs=1, **options):
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    trainer = pl.Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(Scored(loss), loader, loader, **options)
    return trainer


def loss_in(path):
    return float(torch.load(path, weights_only=True)["state_dict"]["loss"])


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.ckpt")}


def test_a_second_fit_with_the_same_callbacks_writes_to_the_folder_of_its_own_trainer(tmp_path):
    best, last = callbacks = [BestCheckpoint(), LastCheckpoint()]
    first, second = tmp_path / "first", tmp_path / "second"
    fit_scored(first, 0.25, callbacks)
    written = files_of(first)
    # The second fit is worse and has as many steps as the first, and both of its checkpoints are saved nevertheless.
    trainer = fit_scored(second, 0.75, callbacks)
    assert files_of(first) == written
    saved = second / "checkpoints"
    assert {path.name: loss_in(path) for path in saved.iterdir()} == {"best.ckpt": 0.75, "last.ckpt": 0.75}
    assert (best.best_model_path, float(best.best_model_score)) == (str(saved / "best.ckpt"), 0.75)
    assert (last.best_model_path, last.path) == (str(saved / "last.ckpt"), saved / "last.ckpt")
    # The same trainer still knows its best epoch, in a test and when it goes on.
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    assert trainer.test(dataloaders=loader, ckpt_path="best", verbose=False) == [{"val/loss": 0.75}]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Scored(1.0), loader, loader)
    assert (loss_in(saved / "best.ckpt"), loss_in(saved / "last.ckpt")) == (0.75, 1.0)


def test_a_folder_that_the_user_gives_is_kept_for_every_trainer(tmp_path):
    given, set_later = BestCheckpoint(dirpath=tmp_path / "given"), LastCheckpoint()
    set_later.dirpath = str(tmp_path / "later")
    for name, loss in (("first", 0.25), ("second", 0.75)):
        fit_scored(tmp_path / name, loss, [given, set_later])
    assert loss_in(tmp_path / "given" / "best.ckpt") == loss_in(tmp_path / "later" / "last.ckpt") == 0.75
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_used_callback_that_forgets_is_like_a_new_one(tmp_path, mode):
    used = BestCheckpoint(mode=mode)
    fit_scored(tmp_path, 0.25, [used])
    used.forget()
    new = vars(BestCheckpoint(mode=mode))
    assert {name: vars(used)[name] for name in new} == new


def test_a_used_callback_can_be_pickled(tmp_path):
    used = BestCheckpoint()
    trainer = fit_scored(tmp_path, 0.25, [used])
    assert pickle.loads(pickle.dumps(used)).best_model_path == used.best_model_path
    assert used._fitted_by() is trainer


def resume(source, folder, epochs):
    best = BestCheckpoint()
    fit_scored(folder, 9.0, [best, LastCheckpoint()], epochs, ckpt_path=source / "checkpoints" / "last.ckpt")
    return best


@pytest.fixture
def two_fits(tmp_path):
    """Run folders of two fits, of which the second is better."""
    folders = tmp_path / "mine", tmp_path / "other"
    for folder, loss in zip(folders, (0.5, 0.25)):
        fit_scored(folder, loss, [BestCheckpoint(), LastCheckpoint()])
    return folders


def test_a_resumed_fit_sets_the_best_checkpoint_of_another_fit_aside(two_fits, recwarn):
    mine, other = two_fits
    own, foreign = ((folder / "checkpoints" / "best.ckpt").read_bytes() for folder in two_fits)
    saved = other / "checkpoints"
    with pytest.warns(
        UserWarning, match=r"best\.ckpt is of another fit than .*last\.ckpt; it is now .*best\.old-1\.ckpt"
    ):
        best = resume(mine, other, epochs=2)
    assert float(best.best_model_score) == 0.5
    recwarn.clear()
    # The fit owns the folder from now on, whichever of its checkpoints it resumes from.
    for source in (other, mine):
        resume(source, other, epochs=3)
        assert (saved / "best.ckpt").read_bytes() == own
    assert (saved / "best.old-1.ckpt").read_bytes() == foreign
    assert not [str(w.message) for w in recwarn if "another fit" in str(w.message)]
    assert sorted(path.name for path in saved.iterdir()) == [
        "best.ckpt",
        "best.old-1.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]


def test_without_its_best_checkpoint_a_resumed_fit_counts_from_its_next_epoch(two_fits):
    mine, other = two_fits
    (mine / "checkpoints" / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"best\.ckpt is of another fit"):
        resume(mine, other, epochs=2)
    assert epoch_of(other / "checkpoints" / "best.ckpt") == 1


def test_a_best_checkpoint_without_an_identity_stays_with_a_warning(two_fits, recwarn):
    mine, other = two_fits
    for path in (*mine.rglob("*.ckpt"), *other.rglob("*.ckpt")):
        content = torch.load(path, weights_only=True)
        del content["fit_identity"]
        torch.save(content, path)
    foreign = (other / "checkpoints" / "best.ckpt").read_bytes()
    with pytest.warns(
        UserWarning, match=r"best\.ckpt stays the best checkpoint, but may be of another fit than .*last"
    ):
        resume(mine, other, epochs=2)
    assert (other / "checkpoints" / "best.ckpt").read_bytes() == foreign
    recwarn.clear()
    resume(other, other, epochs=3)
    resume(mine, mine, epochs=2)
    assert not [str(w.message) for w in recwarn if "another fit" in str(w.message)]


def test_a_trial_run_moves_no_checkpoint(two_fits):
    mine, other = two_fits
    before = files_of(other)
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    options = {**QUIET, "fast_dev_run": True, "default_root_dir": other}
    trainer = pl.Trainer(callbacks=[BestCheckpoint(), LastCheckpoint()], **options)
    trainer.fit(Scored(1.0), loader, loader, ckpt_path=mine / "checkpoints" / "last.ckpt")
    assert files_of(other) == before


def test_weights_that_spawned_processes_hand_over_are_read_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder, elsewhere = tmp_path / "tmp123", tmp_path / "run" / "deep"
    for each in (folder, elsewhere):
        each.mkdir(parents=True)
        torch.save({"layer.weight": torch.ones(2)}, each / ".temp.ckpt")
    io = RunCheckpointIO([tmp_path / "other"])
    assert io.load_checkpoint(folder / ".temp.ckpt")["layer.weight"].tolist() == [1.0, 1.0]
    io.remove_checkpoint(folder / ".temp.ckpt")
    with pytest.warns(UserWarning, match="is not removed"):
        io.remove_checkpoint(elsewhere / ".temp.ckpt")
    assert not (folder / ".temp.ckpt").exists()
    assert (elsewhere / ".temp.ckpt").exists()
