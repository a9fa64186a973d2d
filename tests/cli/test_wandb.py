"""Weights & Biases: an offline run read back holds pictures and numbers; without it nothing else changes."""

import csv
import json
import struct
from pathlib import Path

import pytest
from command_line import one_step, run, run_anew
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return one_step(tmp_path_factory.mktemp("fit"))


def journal(data, block=32768):
    """Records of a `.wandb` file: LevelDB's log format behind a header of seven bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        piece = data[place + 7 : place + 7 + length]
        place += 7 + length
        # 1: whole; 2, 3, 4: first, middle and last part.
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            yield whole


def records(folder):
    """History of an offline run, key -> last value, and the files of its tables, name -> path: what is synced."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    found, files = {}, {}
    for data in journal(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        files |= {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
    return found, files


def summary(run_dir):
    with open(run_dir / "test" / "summary.csv", newline="") as file:
        return {f"test/{r['explainer']}/{r['metric']}": float(r["mean"]) for r in csv.DictReader(file)}


def test_the_offline_run_holds_pictures_and_numbers(tmp_path, checkpoint):
    # The package writes its last records when the interpreter ends, which children of a server do not reach.
    run_anew("test", checkpoint, "--wandb=offline", run_dir=tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    found, files = records(folder)
    for key, mean in summary(tmp_path).items():
        assert found[key] == pytest.approx(mean, abs=1e-6)
    assert found["maps/test/count"] == 8
    assert {f"curves/test/pid16{variant}/count" for variant in ("", "@stable", "@official")} <= found.keys()
    for path in (folder / "files" / "media" / "images").rglob("*.png"):
        with Image.open(path) as picture:
            assert max(picture.size) <= 1600
    assert found["samples/test/nrows"] == 8
    table = json.loads(files["samples/test.table.json"].read_text())
    assert len(table["data"]) == 8
    columns = {name: place for place, name in enumerate(table["columns"])}
    with open(tmp_path / "test" / "scores.csv", newline="") as file:
        scores = {(int(r["index"]), r["explainer"], r["metric"]): float(r["value"]) for r in csv.DictReader(file)}
    for row in table["data"]:
        picture = files[row[columns["maps"]]["path"]]
        assert picture.is_relative_to(tmp_path)
        with Image.open(picture) as shown:
            assert min(shown.size) > 100
        assert row[columns["labn/auroc"]] == scores.get((row[0], "labn", "auroc"))


def blocked(folder):
    """A package of that name that cannot be imported stands for one that is missing or broken."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text("raise ImportError('wandb is blocked')")
    return {"PYTHONPATH": str(folder)}


def unreachable(folder):
    """A server that is not there, with a key that looks like one."""
    return {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}


def forbidden(folder):
    """No key, and nobody to ask for one."""
    return {"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(folder), "NETRC": "/nowhere"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, checkpoint):
    """Results without Weights & Biases."""
    folder = tmp_path_factory.mktemp("plain")
    run("test", checkpoint, "--trainer.limit_test_batches=1", run_dir=folder)
    return folder


@pytest.mark.parametrize("trouble", [blocked, unreachable, forbidden], ids=lambda trouble: trouble.__name__)
def test_without_wandb_the_results_are_the_same(tmp_path, monkeypatch, trouble, checkpoint, plain):
    for name, value in trouble(tmp_path / "blocked").items():
        monkeypatch.setenv(name, value)
    mode = "--wandb=offline" if trouble is blocked else "--wandb=online"
    words = ["test", checkpoint, mode, "--trainer.limit_test_batches=1"]
    # The server of `run` has already imported the package.
    output = run_anew(*words, run_dir=tmp_path) if trouble is blocked else run(*words, run_dir=tmp_path).output
    assert "Weights & Biases is not available" in output
    a, b = ((folder / "test" / "scores.csv").read_text() for folder in (plain, tmp_path))
    assert a == b
    assert (tmp_path / "test" / "report.html").is_file()
