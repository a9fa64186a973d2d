"""Checkpoints on disk: written whole, the one before kept, damage found and said."""

import os
import shutil

import pytest
import torch

from callbacks.checkpoint import RunCheckpointIO, damage, find_checkpoint, has_last


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


def test_last_is_kept_as_previous_and_nothing_else_lies_around(saved):
    folder = saved / "checkpoints"
    assert {path.name: epoch_of(path) for path in folder.iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
        "best.ckpt": 1,
    }
    assert find_checkpoint(saved, "last") == str(folder / "last.ckpt")


@pytest.mark.parametrize("injure", [change_a_byte, truncate, empty, os.unlink], ids=lambda f: f.__name__)
def test_a_damaged_last_gives_way_to_the_one_before(saved, injure):
    last = saved / "checkpoints" / "last.ckpt"
    injure(last)
    with pytest.warns(UserWarning, match=r"last\.ckpt is (damaged \(.*\)|missing); going on from .*previous\.ckpt"):
        assert epoch_of(find_checkpoint(saved, "last")) == 1
    assert has_last(saved)


def test_a_damaged_file_never_takes_the_place_of_a_whole_one(saved):
    last, previous = (saved / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    truncate(last)
    RunCheckpointIO().save_checkpoint(state(3), last)
    assert (epoch_of(previous), epoch_of(last)) == (1, 3)


def test_all_damaged_is_an_error_that_says_so(saved):
    for path in (saved / "checkpoints").iterdir():
        truncate(path)
    for which in ("best", "last"):
        with pytest.raises(ValueError, match=rf"--ckpt_path {which}: .*{which}\.ckpt is damaged \(.*\); give another"):
            find_checkpoint(saved, which)


def test_none_at_all_is_another_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt does not exist; run fit"):
        find_checkpoint(tmp_path, "last")
    assert not has_last(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(saved, monkeypatch):
    last = saved / "checkpoints" / "last.ckpt"

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: No space left on device; free some space"):
        RunCheckpointIO().save_checkpoint(state(3), last)
    assert epoch_of(last) == 2
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_without_links_the_file_itself_is_renamed(saved, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    last = saved / "checkpoints" / "last.ckpt"
    RunCheckpointIO().save_checkpoint(state(3), last)
    assert (epoch_of(last.with_stem("previous")), epoch_of(last)) == (2, 3)


def test_every_truncation_is_found(saved, tmp_path):
    whole = (saved / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for size in range(0, len(whole), max(1, len(whole) // 200)):
        cut.write_bytes(whole[:size])
        assert damage(cut), size
    shutil.copy(saved / "checkpoints" / "last.ckpt", cut)
    assert damage(cut) is None
