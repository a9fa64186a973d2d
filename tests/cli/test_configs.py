"""Every configuration parses, and the published ones hold the published values."""

from pathlib import Path

import pytest
import yaml
from command_line import call_main

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "configs").glob("*.yaml"))


def resolved(path, monkeypatch, capsys, *arguments):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        call_main(["fit", "--config", str(path), *arguments, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_parses_and_prints_itself(path, tmp_path, monkeypatch, capsys):
    config = resolved(path, monkeypatch, capsys)
    assert config["trainer"]["inference_mode"] is False
    printed = tmp_path / "printed.yaml"
    printed.write_text(yaml.safe_dump({**config, "parts": []}))
    again = resolved(printed, monkeypatch, capsys)
    assert {**again, "parts": None} == {**config, "parts": None}


def callback(config, name):
    return next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(name)).get("init_args", {})


MODEL = {
    "backbone": "lambda_resnet50",
    "split": 7,
    "theta": 0.75,
    "gate": "mul",
    "loss": "ce",
    "class_weights": [2.0, 1.0],
    "branch_weight": 3.0,
    "guidance": None,
    "train_lfe": True,
    "lr": 1e-4,
    "head_lr": 1e-3,
    "weight_decay": 0.09,
    "lr_factor": 0.333,
    "lr_patience": 2,
    "min_lr": 1e-6,
}

DATA = {
    "task": "binary",
    "image_size": 224,
    "batch_size": 32,
    "val_fraction": 0.2,
    "mean": [0.4329, 0.2094, 0.0687],
    "std": [0.3083, 0.1643, 0.0829],
    "balanced_sampler": False,
}

AUGMENTATION = {
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "rotation": 5.0,
    "crop_scale": [0.7, 1.3],
    "crop_ratio": pytest.approx([3 / 4, 4 / 3]),
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.5,
    "hue": 0.0,
    "erasing": 0.5,
    "erasing_scale": [0.02, 0.33],
}


def test_idrid_is_the_published_column(monkeypatch, capsys):
    config = resolved(ROOT / "configs/idrid_labn.yaml", monkeypatch, capsys)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert {name: model[name] for name in MODEL} == MODEL
    assert {name: data[name] for name in DATA} == DATA
    assert {name: data["augmentation"][name] for name in AUGMENTATION} == AUGMENTATION
    assert config["trainer"]["max_epochs"] == 300
    stopping = callback(config, "EarlyStopping")
    assert (stopping["monitor"], stopping["mode"], stopping["patience"], stopping["min_delta"]) == (
        "val/loss",
        "min",
        6,
        0,
    )
    scoring = callback(config, "EvaluationCallback")
    assert scoring["metrics"] == ["id", "pid2", "pid4", "pid8", "pid16"]
    assert scoring["positives_only"] is True
    assert scoring["fill"] == "black"
    assert scoring["baselines"] is True
    assert set(callback(config, "ExplanationCallback")["explainers"]) == {"labn", "-labn", "gradcam"}


def test_the_resnet50_configuration_differs_in_the_backbone_only(monkeypatch, capsys):
    plain = resolved(ROOT / "configs/idrid_labn.yaml", monkeypatch, capsys)
    other = resolved(ROOT / "configs/idrid_labn_resnet50.yaml", monkeypatch, capsys)
    differing = {k for k, v in plain["model"]["init_args"].items() if other["model"]["init_args"][k] != v}
    assert differing == {"backbone", "backbone_ckpt"}
    assert {k: v for k, v in plain.items() if k not in ("model", "parts")} == {
        k: v for k, v in other.items() if k not in ("model", "parts")
    }
