import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch

from labn.inference.fingerprint import digest, weights_digest
from labn.io.atomic import check_writable, write_atomically
from labn.results.store import ResultStore, ScoreShard


def part(indices, explainer="labn", key="k", value=1.0):
    n = len(indices)
    return ScoreShard(
        explainer=explainer,
        key=key,
        index=np.array(indices),
        label=np.ones(n, dtype=np.int64),
        target=np.ones(n, dtype=np.int64),
        prediction=np.ones(n, dtype=np.int64),
        probability=np.full(n, 0.5),
        values={"pid16": np.full(n, value)},
        keys={"pid16": "m"},
        curves={"pid16/x": np.zeros((n, 3))},
    )


def test_saved_maps_are_read_by_sample_index(tmp_path):
    store = ResultStore(tmp_path)
    maps = torch.randn(3, 4, 5)
    store.add_maps("labn", "k", torch.tensor([7, 2, 9]), maps)
    for reader in (store, ResultStore(tmp_path)):
        found = reader.maps("labn", "k", [2, 3, 9])
        assert sorted(found) == [2, 9]
        assert torch.equal(found[2], maps[1])
    assert ResultStore(tmp_path).maps("labn", "other", [2]) == {}
    assert ResultStore(tmp_path).maps("-labn", "k", [2]) == {}


@pytest.mark.parametrize("name", ["gradcam++", "-labn", "rise.v2", "a/b", "with space"])
def test_any_explainer_name_is_a_file_name(tmp_path, name):
    store = ResultStore(tmp_path)
    store.add_maps(name, "k", torch.tensor([0]), torch.ones(1, 2, 2))
    store.add_scores(part([0], explainer=name))
    again = ResultStore(tmp_path)
    assert list(again.maps(name, "k", [0])) == [0]
    assert again.scored(name, "k", {"pid16": "m"}, [0]) == {"pid16": {0}}


def test_scores_resume_by_key_and_survive_ranks(tmp_path):
    ResultStore(tmp_path, rank=0).add_scores(part([0, 2]))
    ResultStore(tmp_path, rank=1).add_scores(part([1, 3]))
    store = ResultStore(tmp_path)
    assert store.scored("labn", "k", {"pid16": "m"}, range(9)) == {"pid16": {0, 1, 2, 3}}
    assert store.scored("labn", "k", {"pid16": "m", "id": "n"}, [1, 4]) == {"pid16": {1}, "id": set()}
    assert store.scored("labn", "k2", {"pid16": "m"}, range(9)) == {"pid16": set()}
    assert next(store.score_shards()).curves["pid16/x"].shape == (2, 3)


@pytest.mark.parametrize("kind", ["maps", "scores"])
def test_a_truncated_file_is_reported_and_ignored(tmp_path, kind):
    store = ResultStore(tmp_path)
    store.add_maps("labn", "k", torch.tensor([0]), torch.ones(1, 8, 8))
    store.add_scores(part([0]))
    (path,) = (tmp_path / kind).iterdir()
    path.write_bytes(path.read_bytes()[:40])
    again = ResultStore(tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        found = again.maps("labn", "k", [0]) if kind == "maps" else again.scored("labn", "k", {"pid16": "m"}, [0])
    assert found in ({}, {"pid16": set()})


def test_results_of_other_weights_are_moved_aside_not_lost(tmp_path):
    folder = tmp_path / "test"
    store = ResultStore(folder)
    store.prepare({"checkpoint": "a", "data": "d"})
    store.add_scores(part([0]))
    ResultStore(folder).prepare({"checkpoint": "a", "data": "d"})
    assert list(ResultStore(folder).score_shards())
    with pytest.warns(UserWarning, match="another checkpoint"):
        ResultStore(folder).prepare({"checkpoint": "b", "data": "d"})
    assert not list(ResultStore(folder).score_shards())
    assert list(ResultStore(tmp_path / "test.old-1").score_shards())
    assert json.loads((folder / "identity.json").read_text())["checkpoint"] == "b"


def test_writing_leaves_no_half_file(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomically(path, b"1")
    write_atomically(path, b"22")
    assert path.read_bytes() == b"22"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store, path = ResultStore(tmp_path), tmp_path / "b.json"
    ways = {
        "b.json": lambda: write_atomically(path, b"1"),
        "safetensors": lambda: store.add_maps("labn", "k", torch.tensor([0]), torch.zeros(1, 2, 2)),
        "npz": lambda: store.add_scores(part([0])),
    }
    for name, write in ways.items():
        with pytest.raises(OSError, match=rf"{name} cannot be written: No space left on device; free some space"):
            write()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--run_dir .*file/run cannot be written: .*; make the folder writable"):
        check_writable(tmp_path / "file" / "run", "--run_dir")
    check_writable(tmp_path / "new" / "run", "--run_dir")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_temporary_files_of_a_killed_process_are_ignored_and_removed(tmp_path):
    folder = tmp_path / "test"
    (folder / "maps").mkdir(parents=True)
    for path in (folder / ".identity.json.1.tmp", folder / "maps" / ".labn.k.0000000.r0.safetensors.1.tmp"):
        path.write_bytes(b"half")
    ResultStore(folder).prepare({"checkpoint": "a"})
    assert not (tmp_path / "test.old-1").exists()
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["identity.json"]


def test_shards_that_are_removed_meanwhile_raise_an_error_that_names_the_folder(tmp_path):
    store = ResultStore(tmp_path / "test")
    store.prepare({"checkpoint": "a"})
    store.add_scores(part([0]))
    shutil.rmtree(tmp_path / "test")
    for write in (
        lambda: store.add_scores(part([1])),
        lambda: store.add_maps("labn", "k", torch.tensor([1]), torch.zeros(1, 2, 2)),
        store.check_not_removed,
    ):
        with pytest.raises(OSError, match=r"identity\.json has been removed or moved while this command ran"):
            write()
    assert not (tmp_path / "test").exists()


def test_a_damaged_identity_moves_the_results_aside(tmp_path):
    folder = tmp_path / "test"
    ResultStore(folder).prepare({"checkpoint": "a"})
    (folder / "identity.json").write_text('{"check')
    with pytest.warns(UserWarning, match=r"they are in .*test\.old-1"):
        ResultStore(folder).prepare({"checkpoint": "a"})


def test_digests_depend_on_content():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    net = torch.nn.Linear(2, 2)
    before = weights_digest(net)
    assert before == weights_digest(net)
    with torch.no_grad():
        net.bias[0] += 1e-3
    assert weights_digest(net) != before
