"""`export`: onnxruntime computes the network's logits and attention, and the file says how to prepare a picture."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call_main
from torch import nn

from labn import explain
from labn.errors import InputError, MissingFileError
from labn.io.preprocessing import KEY, Preprocessing
from labn.models import onnx_export
from labn.models.onnx_export import onnx_bytes
from labn.modules import LABN
from labn.modules.restore import restore

SIDE = 48
PREPARED = Preprocessing(SIDE, [0.5] * 3, [0.25] * 3, class_names=["cat", "ä dog"])


@pytest.fixture(scope="module")
def session_of():
    for package in onnx_export.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")
    return lambda data: importlib.import_module("onnxruntime").InferenceSession(data)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small LABN with lambda layers, whose gate leaves a share of the positions open."""
    torch.manual_seed(0)
    arguments = {
        "backbone": "lambda_resnet",
        "split": 1,
        "network_options": {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}},
        "gate_schedule": {"begin": 0, "end": 1, "share": 0.5},
    }
    module = LABN(**arguments)
    module.network.set_open_share(0.5)
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    stored = {"_class_path": "labn.modules.LABN", **arguments}
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": stored, KEY: PREPARED.plain()}, path)
    return path


def test_logits_and_attention_of_photographs_are_those_of_the_network(session_of, checkpoint, tmp_path, capsys):
    data = importlib.import_module("skimage").data_dir
    photographs = [Path(data) / name for name in ("astronaut.png", "chelsea.png", "coffee.png")]
    call_main(["export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'model.onnx'}", "--image", *map(str, photographs)])
    assert "-> logits, attention; " in capsys.readouterr().out
    session = session_of(str(tmp_path / "model.onnx"))
    network, preprocessing = restore(checkpoint)
    images = torch.stack([preprocessing.normalise(preprocessing.read(path)) for path in photographs])
    expected = network(images)
    found = session.run(["logits", "attention"], {"images": images.numpy()})
    assert np.abs(found[0] - expected.logits.detach().numpy()).max() < 1e-4
    assert np.abs(found[1] - expected.attention.detach().numpy()).max() < 1e-4
    # The map of `explain` is this one, resized to the picture.
    resized = nn.functional.interpolate(torch.from_numpy(found[1]), (SIDE, SIDE), mode="bilinear")[:, 0]
    assert torch.allclose(resized, explain(network, images, "labn", 0).maps, atol=1e-4)
    for count in (1, 5):
        batch = images[:1].expand(count, -1, -1, -1).numpy()
        assert np.abs(session.run(["logits"], {"images": batch})[0] - found[0][:1]).max() < 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labn.class_names"]) == PREPARED.class_names
    assert Preprocessing(**json.loads(metadata["labn.preprocessing"]), class_names=PREPARED.class_names) == (
        preprocessing
    )


class Scaled(nn.Module):
    """Logits that are `scale` times the mean colour."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.scale * self.norm(images).mean((2, 3))


def test_a_plain_classifier_has_logits_alone_and_a_file_that_computes_something_else_is_refused(
    session_of, monkeypatch
):
    network, images = Scaled().train(), torch.rand(2, 3, SIDE, SIDE)
    data, differences = onnx_bytes(network, PREPARED, images)
    assert [output.name for output in session_of(data).get_outputs()] == ["logits"] == list(differences)
    assert network.training
    assert int(network.norm.num_batches_tracked) == 0
    monkeypatch.setattr(onnx_export, "_exported", lambda *_: data)
    with pytest.raises(InputError, match="The logits of the exported file differ from the network's by"):
        onnx_bytes(Scaled(1.01), PREPARED, images)


class Chosen(nn.Module):
    """Takes another way through its layers where the picture is bright, which no graph can hold."""

    def forward(self, images):
        return images.mean((2, 3)) if float(images.mean()) > 0.5 else images.amax((2, 3))


def test_a_network_that_cannot_be_exported_is_one_sentence(session_of):
    with pytest.raises(InputError, match="Chosen cannot be exported to ONNX: ") as raised:
        onnx_bytes(Chosen(), PREPARED, torch.rand(2, 3, SIDE, SIDE))
    assert "\n" not in str(raised.value)


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingFileError, match=r'the package onnx, an optional one; .* pip install -e "\.\[export\]"'):
        onnx_bytes(Scaled(), PREPARED, torch.rand(2, 3, SIDE, SIDE))
    assert list(tmp_path.iterdir()) == []
