"""Checkpoints of strangers: nothing that they name runs, and one sentence says so."""

import os
import pickle
import zipfile

import pytest
import torch
from command_line import TINY, call_main

import labn.inference.fingerprint
from labn.models.checkpoints import own_dataclasses, read_checkpoint
from labn.modules.guidance import SaliencyGuidance
from labn.modules.map_teacher import MapTeacher
from labn.modules.plain_checkpoints import PlainCheckpointIO, check_own_classes
from labn.modules.restore import restore

QUICKSTART = ["--config", "configs/quickstart.yaml", *TINY]


class Touch:
    """Makes a file when it is unpickled: a stand-in for harm."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class OwnFunction:
    """Calls a function of this package."""

    def __reduce__(self):
        return labn.inference.fingerprint.digest, ("harm",)


def save(payload, path):
    """A Lightning checkpoint with a payload."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 1, "hyper_parameters": {"x": payload}}, path)


@pytest.mark.parametrize("read", [read_checkpoint, restore, PlainCheckpointIO().load_checkpoint])
def test_no_reader_runs_code_of_a_pickle(tmp_path, read):
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    save(Touch(marker), path)
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read .*names code to run \(posix\.mkdir\), .*refused"):
        read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload is none"


def test_functions_of_this_package_are_not_called_by_a_pickle(tmp_path, monkeypatch):
    called = []

    def digest(*things):
        called.append(things)

    digest.__module__, digest.__qualname__ = "labn.inference.fingerprint", "digest"
    monkeypatch.setattr(labn.inference.fingerprint, "digest", digest)
    save(OwnFunction(), tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"names code to run \(labn\.inference\.fingerprint\.digest\)"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not called
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert called == [("harm",)], "the payload is none"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "test", "fit last"])
def test_no_command_runs_code_of_a_checkpoint(tmp_path, monkeypatch, request, command):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "checkpoints").mkdir()
    path, marker = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "marker"
    save(Touch(marker), path)
    command, _, named = command.partition(" ")
    with pytest.raises(ValueError, match=r"last\.ckpt .* names code to run"):
        call_main([command, *QUICKSTART, f"--run_dir={tmp_path}", f"--ckpt_path={named or path}"])
    assert not marker.exists()


def test_hyper_parameters_cannot_instantiate_a_foreign_class(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    harm = {"class_path": "logging.FileHandler", "init_args": {"filename": str(tmp_path / "marker")}}
    arguments = {"_class_path": "labn.modules.LABN", "network_options": {"deep": [harm]}}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": arguments}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt asks for the class logging\.FileHandler, which neither"):
        call_main(["test", *QUICKSTART, f"--run_dir={tmp_path}", f"--ckpt_path={path}"])
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance": "evil_module.Evil"},
        {"guidance": " evil_module.Evil"},
        {"guidance": "{class_path: evil_module.Evil}"},
        {"guidance": '{"class\\x5fpath": evil_module.Evil}'},
        {"guidance": "settings.yaml"},
        {"guidance": "settings"},
        {"guidance": {"class_path": "labn.modules.SaliencyGuidance", "init_args": {"fill": "settings.yaml"}}},
        {"guidance": {"class_path": "evil_module.Evil"}},
        {"guidance.class_path": "evil_module.Evil"},
        {"network_options": "{a: {class_path: evil_module.Evil}}"},
        {"network_options": {"a": "{class_path: evil_module.Evil}"}},
        {"network_options": {"weights": "{class_path: evil_module.Evil}"}},
        {"network_options": {"a": [["class_path:\n  evil_module.Evil"]]}},
    ],
    ids=str,
)
def test_no_text_of_a_checkpoint_imports_a_module(tmp_path, monkeypatch, request, arguments):
    (tmp_path / "evil_module.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('marker').touch()\nclass Evil: pass\n"
    )
    for name in ("settings", "settings.yaml"):
        (tmp_path / name).write_text("class_path: evil_module.Evil\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "last.ckpt"
    config = str(request.config.rootpath / "configs" / "quickstart.yaml")
    saved = {"_class_path": "labn.modules.LABN", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": saved | arguments}, path)
    monkeypatch.chdir(tmp_path)  # where the files of settings are
    with pytest.raises(ValueError, match=r"last\.ckpt (asks for the class evil_module|has the text)"):
        call_main(["test", "--config", config, f"--run_dir={tmp_path / 'run'}", f"--ckpt_path={path}"])
    assert not (tmp_path / "marker").exists()


def test_classes_that_a_module_of_this_package_only_imports_are_foreign():
    content = {
        "hyper_parameters": {"_class_path": "labn.modules.LABN", "guidance": {"class_path": "labn.io.atomic.Path"}}
    }
    with pytest.raises(ValueError, match=r"asks for the class labn\.io\.atomic\.Path"):
        check_own_classes("a.ckpt", content, ())


def test_names_of_networks_files_and_options_are_texts():
    arguments = {
        "_class_path": "labn.modules.LABN",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "backbone": "timm/resnet18.a1_in1k",
        "backbone_ckpt": __file__,
        "loss": "ce",
        "network_options": {"weights": __file__, "branch_options": {"mode": "a-b", "sizes": [1, "2x2"]}},
        "guidance": SaliencyGuidance(fill="black"),
        "map_teacher": MapTeacher("gradcam", {"relu": False}),
    }
    check_own_classes("a.ckpt", {"hyper_parameters": arguments}, ())


def test_a_class_that_the_configuration_names_is_allowed():
    content = {
        "hyper_parameters": {"_class_path": "mine.Net", "guidance": {"class_path": "labn.modules.SaliencyGuidance"}}
    }
    check_own_classes("a.ckpt", content, {"mine.Net"})
    check_own_classes("a.ckpt", {"hyper_parameters": None}, ())
    check_own_classes("a.ckpt", [1], ())
    with pytest.raises(ValueError, match=r"a\.ckpt asks for the class mine\.Net"):
        check_own_classes("a.ckpt", content, ())


def test_a_small_file_cannot_claim_a_large_tensor(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1).expand(2**40)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt has a tensor of shape \(1099511627776,\) in a storage of 4 bytes"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save({"a": torch.zeros(1).expand(64), "b": [torch.ones(2, 2).T]}, tmp_path / "b.pt")
    assert read_checkpoint(tmp_path / "b.pt")["a"].shape == (64,)


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as compressed:
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"b\.pt cannot be read .*its entry .* is compressed"):
        read_checkpoint(tmp_path / "b.pt")


def test_weights_alone_cannot_be_tested_as_a_checkpoint(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is not a checkpoint of `cli\.py fit`; pass weights alone"):
        PlainCheckpointIO().load_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError, match="local"):
        PlainCheckpointIO().load_checkpoint("http://localhost:1/a.ckpt")


def test_dataclasses_of_this_package_are_loaded(tmp_path):
    torch.save({"guidance": SaliencyGuidance(patch_size=4)}, tmp_path / "a.ckpt")
    assert own_dataclasses(tmp_path / "a.ckpt") == [SaliencyGuidance]
    assert read_checkpoint(tmp_path / "a.ckpt")["guidance"] == SaliencyGuidance(patch_size=4)


def test_a_pickle_in_the_old_format_raises(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Touch(marker), protocol=2))
    with pytest.raises(ValueError, match=r"old\.pt cannot be read as tensors only"):
        read_checkpoint(tmp_path / "old.pt")
    assert not marker.exists()


def test_the_error_for_a_damaged_checkpoint_does_not_advise_unsafe_loading(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n")
    with pytest.raises(ValueError, match=r"it is damaged, or not a checkpoint of PyTorch \(.*\)\.$") as refused:
        read_checkpoint(tmp_path / "notes.md")
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("cut", [0, 1, 40, 500, -10])
def test_a_truncated_checkpoint_raises_an_error_that_names_it(tmp_path, cut):
    torch.save({"state_dict": {"a": torch.ones(100)}}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read as tensors only: .+"):
        read_checkpoint(tmp_path / "a.ckpt")
