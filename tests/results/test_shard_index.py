"""Shards are found by their names: every one that could hold a sample, and no other."""

import os
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labn.io.atomic import write_atomically
from labn.io.memmap import BLOCK, blocks, temporary_memmap, write_npz
from labn.results.shard_index import LONGEST, ShardIndex, readable_name, shard_name
from labn.results.store import ResultStore, ScoreShard
from labn.results.tables import Plan, collect, write_results

INDICES = st.lists(st.sets(st.integers(0, 400), min_size=1, max_size=6), min_size=0, max_size=30)


@settings(max_examples=60, deadline=None)
@given(shards=INDICES, wanted=st.sets(st.integers(0, 420), max_size=10))
def test_look_ups_equal_a_scan_of_all_shards(tmp_path_factory, shards, wanted):
    folder = tmp_path_factory.mktemp("shards")
    names = {shard_name("a", "k", sorted(indices), f"{n}.r0.npz"): indices for n, indices in enumerate(shards)}
    for name in names:
        (folder / name).touch()
    expected = {n for n, i in names.items() if any(min(i) <= index <= max(i) for index in wanted)}
    found = ShardIndex(folder, ".npz")
    assert {path.name for path in found.holding("a", "k", wanted)} == expected
    assert {path.name for path in found.all()} == set(names)
    assert found.holding("a", "other", wanted) == found.holding("b", "k", wanted) == []


def test_files_that_are_no_shards_are_ignored(tmp_path):
    for name in (".a.k.0-1.r0.npz.1.tmp", "a.k.r0.npz", "manifest.json", "a.k.0-1.r0.safetensors", "a.k.5.r0.npz"):
        (tmp_path / name).touch()
    assert ShardIndex(tmp_path, ".npz").all() == []
    assert ShardIndex(tmp_path / "absent", ".npz").all() == []


def test_a_look_up_opens_only_the_shards_in_whose_range_the_samples_lie(tmp_path, monkeypatch):
    import labn.results.store

    store = ResultStore(tmp_path)
    for start in range(0, 400, 4):
        store.add_maps("a", "k", torch.arange(start, start + 4), torch.full((4, 2, 2), float(start)))
    opened = []
    real = labn.results.store.safe_open
    monkeypatch.setattr(
        labn.results.store, "safe_open", lambda path, **options: opened.append(path) or real(path, **options)
    )
    found = ResultStore(tmp_path).maps("a", "k", [40, 43, 44])
    assert len(opened) == 2
    assert {index: float(heat[0, 0]) for index, heat in found.items()} == {40: 40.0, 43: 40.0, 44: 44.0}


def part(indices, values, explainer="a", points=3):
    index = np.array(indices)
    curves = {"m/index": index, **{f"m/{line}": np.outer(index + 1.0, np.ones(points)) for line in ("x", "insertion")}}
    curves["m/deletion"] = np.outer(-index - 1.0, np.ones(points))
    return ScoreShard(
        *(explainer, "k", index, index % 2, index % 2, index % 3, index / 10),
        {"v": np.array(values)},
        {"m": "d"},
        curves,
    )


def plan(count, explainers=("a",)):
    return Plan(dict.fromkeys(explainers, "k"), {"m": ("d", ("v",))}, frozenset(range(count)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(allow_infinity=False, width=32)), max_size=40), st.booleans())
def test_a_table_holds_the_first_value_of_every_sample(tmp_path_factory, scored, on_disk):
    folder = tmp_path_factory.mktemp("table") if on_disk else None
    table = collect([part([i], [value]) for i, value in scored], plan(20), folder)
    expected = {}
    for index, value in scored:
        if index < 20 and not np.isnan(value):
            expected.setdefault(index, value)
    column = table.column("a", "v").tolist()
    assert {i: value for i, value in enumerate(column) if value == value} == expected
    assert np.flatnonzero(table.seen).tolist() == sorted({i for i, _ in scored if i < 20})
    assert folder is None or not list(folder.iterdir())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_empty_and_single_sample_splits_write_every_table(tmp_path, count):
    store = ResultStore(tmp_path)
    for explainer in ("a", "b"):
        for index in reversed(range(count)):
            store.add_scores(part([index], [index / 7], explainer))
    summary, _ = write_results(store, plan(count, ("a", "b")), "test", str, {})
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[1:] == [f"test,{i},{i},{i % 2},{i % 2},{e},v,{i / 7!r}" for i in range(count) for e in "ab"]
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + count
    assert (summary[("a", "v")].n if count else len(summary)) == count
    with np.load(tmp_path / "curves.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == ({f"{e}/m/{n}" for e in "ab" for n in ("index", *LINES)} if count else set())
        for explainer in "ab" if count else "":
            assert arrays[f"{explainer}/m/index"].tolist() == list(range(count))
            assert arrays[f"{explainer}/m/deletion"][:, 2].tolist() == [-i - 1.0 for i in range(count)]


LINES = ("x", "insertion", "deletion")


@settings(max_examples=30, deadline=None)
@given(
    value=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e308]), rows=st.integers(1, 3), width=st.integers(1, 5)
)
def test_streamed_archives_are_what_numpy_writes(tmp_path_factory, value, rows, width):
    held = temporary_memmap((rows, width), np.float64, tmp_path_factory.mktemp("scratch"))
    held[:] = value
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    with path.open("wb") as file:
        write_npz(file, [("a/b", held.shape, held.dtype, (held[block] for block in blocks(rows)))])
    with np.load(path, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["a/b"], np.asarray(held))


def test_blocks_cover_everything_once():
    assert [(b.start, b.stop) for b in blocks(2 * BLOCK + 1)] == [
        (0, BLOCK),
        (BLOCK, 2 * BLOCK),
        (2 * BLOCK, 2 * BLOCK + 1),
    ]
    assert list(blocks(0)) == []


@pytest.mark.parametrize("harm", ["index", "shape", "type", "more"])
def test_map_shards_with_inconsistent_arrays_are_computed_again(tmp_path, harm):
    from safetensors.torch import save_file

    store = ResultStore(tmp_path)
    store.add_maps("a", "k", torch.arange(2), torch.ones(2, 3, 3))
    (path,) = (tmp_path / "maps").iterdir()
    good = {"index": torch.arange(2), "maps": torch.ones(2, 3, 3)}
    changes = {
        "index": torch.arange(3),
        "shape": torch.ones(2, 3),
        "type": torch.ones(2, 3, 3).bool(),
        "more": torch.ones(1),
    }
    names = {"index": "index", "shape": "maps", "type": "maps", "more": "x"}
    save_file(good | {names[harm]: changes[harm]}, path)
    with pytest.warns(UserWarning, match=r"a\.k\..* is damaged .* computed again"):
        assert ResultStore(tmp_path).maps("a", "k", [0, 1]) == {}


@pytest.mark.parametrize("field", ["label", "value/v", "curve/m/x", "index"])
def test_score_shards_with_inconsistent_columns_are_computed_again(tmp_path, field):
    ResultStore(tmp_path).add_scores(part([0, 1], [0.5, 0.5]))
    (path,) = (tmp_path / "scores").iterdir()
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {field: arrays[field][:1] if field != "index" else arrays[field] / 2.0})
    with pytest.warns(UserWarning, match=r"is damaged .* computed again"):
        assert ResultStore(tmp_path).scored("a", "k", {"m": "d"}, [0, 1]) == {"m": set()}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    name=st.text(max_size=80) | st.text("眼底写真/", min_size=60, max_size=90) | st.binary(max_size=9).map(os.fsdecode)
)
def test_any_sample_name_gives_a_file_name(tmp_path_factory, name):
    folder, found = tmp_path_factory.mktemp("names"), readable_name(name)
    assert len(found.encode()) <= LONGEST
    assert found == readable_name(name) == readable_name(found)
    write_atomically(folder / f"000000-{found}.png", b"x")
    assert [path.name for path in folder.iterdir()] == [f"000000-{found}.png"]


def test_sample_names_stay_readable():
    assert readable_name("001.Heron/bird_4.jpg") == "001.Heron_bird_4.jpg"
    assert readable_name("糖尿病網膜症/右眼 1.jpg") == "糖尿病網膜症_右眼_1.jpg"
    assert readable_name("../a") == "_._a"
    long = "糖尿病網膜症/右眼_後極部カラー眼底写真_二〇二四年四月一日"
    assert readable_name(f"{long}_1.jpg").startswith(readable_name(long)[:25])
    assert readable_name(f"{long}_1.jpg") != readable_name(f"{long}_2.jpg")


def test_without_space_on_the_disk_an_array_stays_in_memory(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.warns(UserWarning, match=r"has no space for 8 MiB .* they stay in memory"):
            held = temporary_memmap((2**20,), np.float64, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    held[:] = 1
    assert held.sum() == 2**20
    assert not isinstance(held, np.memmap)
    assert not list(tmp_path.iterdir())


def test_the_space_of_an_array_is_taken_when_it_is_made(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(os, "posix_fallocate", lambda number, start, end: taken.append(end), raising=False)
    monkeypatch.setattr(np, "memmap", lambda file, dtype, mode, shape: np.zeros(shape, dtype))
    temporary_memmap((3, 4), np.float32, tmp_path)
    assert taken == [48]
