"""A network of one's own is trained, tested and explained by its import path, where the user has named it."""

import csv

import cv2
import numpy as np
import pytest
import torch
from command_line import TINY, call_main

from labn.errors import InputError
from labn.models import build_network
from labn.modules.plain_checkpoints import check_own_classes
from labn.modules.restore import restore

NETWORK = """
import torch
from torch import nn


class SmallNet(nn.Module):
    def __init__(self, width=4, num_classes=2):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def small(**options):
    return SmallNet(**options)


def touch(path):
    return open(path, "w").write("")


NUMBER = 3
"""
NAME = "my_small_net.SmallNet"


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_small_net.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("module")
def test_an_import_path_is_built_with_the_arguments_that_its_constructor_has():
    network = build_network(NAME, num_classes=5, in_channels=7, width=6)
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert network.features[0].out_channels == 6
    assert build_network("my_small_net.small", width=3).classifier.in_features == 3


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("my_small_net.Other", {}, "cannot be imported"),
        ("nowhere.Net", {}, "beside cli.py or on PYTHONPATH"),
        ("my_small_net.NUMBER", {}, "must be a subclass of nn.Module"),
        ("my_small_net.torch.Size", {}, "cannot be imported"),
        ("collections.OrderedDict", {}, "must be a subclass of nn.Module"),
        (NAME, {"depth": 3}, "no argument depth; it has width, num_classes"),
    ],
)
def test_a_path_that_leads_to_no_network_is_refused(name, options, said):
    with pytest.raises(InputError, match=said):
        build_network(name, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("module")
def test_a_network_is_trained_tested_and_explained_by_its_path(tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    run = tmp_path / "run"
    config = tmp_path / "own.yaml"
    config.write_text(
        f"""
model: {{class_path: labn.modules.Classifier, init_args: {{backbone: {NAME}, backbone_options: {{width: 6}}}}}}
data: {{class_path: datamodules.SyntheticFundus, init_args: {{image_size: 48}}}}
trainer:
  logger: false
  callbacks:
    - class_path: callbacks.BestCheckpoint
    - {{class_path: callbacks.ExplanationCallback, init_args: {{explainers: {{gradcam: }}}}}}
    - {{class_path: callbacks.EvaluationCallback, init_args: {{metrics: [sparseness]}}}}
"""
    )
    words = ["--config", str(config), f"--run_dir={run}", *TINY]
    call_main(["fit", *words])
    call_main(["test", *words, "--ckpt_path=best"])
    with open(run / "test" / "scores.csv", newline="") as file:
        assert {row["explainer"] for row in csv.DictReader(file)} == {"constant", "gradcam", "random"}
    picture = tmp_path / "a.png"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    best = run / "checkpoints" / "best.ckpt"
    out = ["--image", str(picture), "--method", "gradcam", "--out", str(tmp_path / "out")]
    call_main(["explain", "--ckpt", str(best), "--model", NAME, *out])
    assert (tmp_path / "out" / "overlays" / "a.png").is_file()
    # A stranger's checkpoint names no code that runs.
    with pytest.raises(InputError, match=f"--model {NAME}"):
        restore(best)
    with pytest.raises(SystemExit):
        call_main(["explain", "--ckpt", str(best), *out])
    assert f"asks for the network {NAME}" in capsys.readouterr().err


@pytest.mark.usefixtures("module")
def test_weights_are_explained_with_the_name_of_their_class(tmp_path, capsys):
    torch.save(build_network(NAME, num_classes=3).state_dict(), tmp_path / "weights.pt")
    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    words = ["explain", "--image", str(tmp_path / "a.png"), "--method", "gradcam", "--out", str(tmp_path / "out")]
    call_main([*words, "--model", NAME, "--weights", str(tmp_path / "weights.pt"), "--image_size", "32"])
    assert (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1].startswith(str(tmp_path / "a.png"))
    assert f"{NAME}: pictures are prepared with mean (0.485" in capsys.readouterr().out
    for more, told in (
        (["--model", NAME], "Name the network"),
        (["--ckpt", "a.ckpt", "--model", "resnet18"], "may only name a class of your own"),
        (["--model", NAME, "--weights", str(tmp_path / "weights.pt"), "--mean", "0.5"], "--mean has 1 values; give 3"),
    ):
        with pytest.raises(SystemExit):
            call_main([*words, *more])
        assert told in capsys.readouterr().err


def test_a_checkpoint_that_is_tested_by_another_configuration_names_no_code(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    arguments = {"_class_path": "labn.modules.Classifier", "backbone": "os.system", "_instantiator": "x"}
    torch.save({"state_dict": {}, "hyper_parameters": arguments, "pytorch-lightning_version": "2"}, tmp_path / "a.ckpt")
    config = ["--config", "configs/quickstart.yaml", "--model=labn.modules.Classifier", *TINY]
    with pytest.raises(InputError, match=r"asks for the network os\.system"):
        call_main(["test", *config, f"--ckpt_path={tmp_path / 'a.ckpt'}", f"--run_dir={tmp_path}"])


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("prefix", ["", "cbam/", "cbam/cbam/", "cbam/cbam/cbam/"])
def test_no_prefix_hides_code_that_a_checkpoint_names(tmp_path, prefix):
    name, path = f"{prefix}my_small_net.touch", tmp_path / "a.ckpt"
    options = {"path": str(tmp_path / "touched")}
    arguments = {"_class_path": "labn.modules.Classifier", "backbone": name, "backbone_options": options}
    torch.save({"state_dict": {}, "hyper_parameters": arguments}, path)
    with pytest.raises(InputError, match=f"asks for the network {name}"):
        restore(path)
    with pytest.raises(InputError, match=f"asks for the network {name}"):
        check_own_classes(path, {"hyper_parameters": arguments}, [])
    assert not (tmp_path / "touched").exists()
    with pytest.raises(InputError, match="which made a int"):
        restore(path, [name])
    assert (tmp_path / "touched").exists()


def test_a_dotted_key_hides_no_code():
    arguments = {"_class_path": "labn.modules.Classifier", "model.backbone": "cbam/os.system"}
    with pytest.raises(InputError, match=r"asks for the network cbam/os\.system"):
        check_own_classes("a.ckpt", {"hyper_parameters": arguments}, [])
