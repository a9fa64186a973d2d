"""Every configuration parses, and the published ones hold the published values."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from command_line import call_main

from labn.commands.table import ACCURACY, published
from labn.launch.config_include import with_includes

ROOT = Path(__file__).parents[2]
PARSED = {}
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").rglob("*.yaml"))}


def content(path):
    return [yaml.safe_load(file.read_text()) or {} for file in with_includes(path)]


def is_experiment(path):
    """Whether a file, with those that it includes, is complete; the others are read beside one that is."""
    files = content(path)
    has = [any("class_path" in file.get(key, {}) for file in files) for key in ("data", "model")]
    return all(has) and any("callbacks" in file.get("trainer", {}) for file in files)


EXPERIMENTS = [path for path in CONFIGS.values() if is_experiment(path)]


def resolved(path, monkeypatch, capsys, *arguments):
    """A configuration with all included files and defaults, parsed once per file."""
    if (path, arguments) not in PARSED:
        PARSED[path, arguments] = printed(path, monkeypatch, capsys, *arguments)
    return copy.deepcopy(PARSED[path, arguments])


def printed(path, monkeypatch, capsys, *arguments):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        call_main(["fit", "--config", str(path), *arguments, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_parses_and_prints_itself(path, tmp_path, monkeypatch, capsys):
    config = resolved(path, monkeypatch, capsys)
    assert config["trainer"]["inference_mode"] is False
    printed = tmp_path / "printed.yaml"
    printed.write_text(yaml.safe_dump({**config, "include": []}))
    again = resolved(printed, monkeypatch, capsys)
    assert {**again, "include": None} == {**config, "include": None}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs(path, tmp_path, monkeypatch, capsys):
    """One batch of training and validation, or of the test where nothing is trained; small images, no scoring."""
    data = resolved(path, monkeypatch, capsys)["data"]
    command = "test" if data["class_path"].endswith("ImageNet") else "fit"
    small = ["--data.init_args.batch_size=2", "--trainer.accelerator=cpu", "--trainer.callbacks=[]"]
    resizable = "image_size" in data["init_args"] and not data["class_path"].endswith("VOC")  # SSD300 has one size
    small += ["--data.init_args.image_size=64"] if resizable else []
    quick = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false", f"--run_dir={tmp_path}"]
    try:
        call_main([command, "--config", str(path), *small, *quick])
    except (FileNotFoundError, ValueError) as error:
        # The parser wraps what a data module or network says of a file that is missing.
        missing = re.search(r"[^\n]*does not exist[^\n]*", str(error))
        if not missing:
            raise
        pytest.skip(f"not given here: {missing[0].strip()}")


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
    config = resolved(CONFIGS["idrid_labn"], monkeypatch, capsys)
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
    plain = resolved(CONFIGS["idrid_labn"], monkeypatch, capsys)
    other = resolved(CONFIGS["idrid_labn_resnet50"], monkeypatch, capsys)
    differing = {k for k, v in plain["model"]["init_args"].items() if other["model"]["init_args"][k] != v}
    assert differing == {"backbone", "backbone_ckpt"}
    assert {k: v for k, v in plain.items() if k not in ("model", "include")} == {
        k: v for k, v in other.items() if k not in ("model", "include")
    }


def chosen(config, part, expected):
    """The settings of a configuration that `expected` names."""
    settings = config[part]["init_args"]
    return {name: settings[name] for name in expected}


def test_magnetograms_are_the_published_column(monkeypatch, capsys):
    config = resolved(CONFIGS["magnetogram_labn"], monkeypatch, capsys)
    model = {
        **MODEL,
        "backbone": "magnetogram_net",
        "in_channels": 1,
        "split": 0,
        "theta": 0.5,
        "class_weights": [1.0, 1.0],
        "branch_weight": 1.0,
    }
    data = {
        "task": "binary",
        "image_size": 512,
        "batch_size": 32,
        "mean": [0.3625],
        "std": [0.2234],
        "balanced_sampler": False,
        "train_years": [2010, 2011, 2012, 2013, 2014, 2015],
        "val_years": [2016],
        "test_years": [2017],
    }
    assert chosen(config, "model", model) == model
    assert chosen(config, "data", data) == data
    augmentation = config["data"]["init_args"]["augmentation"]
    assert {name: augmentation[name] for name in AUGMENTATION} == AUGMENTATION
    assert config["trainer"]["max_epochs"] == 300
    assert callback(config, "EarlyStopping")["patience"] == 6
    scoring = callback(config, "EvaluationCallback")
    assert scoring["metrics"] == ["id", "pid16", "pid32", "pid64", "pid128"]
    assert (scoring["positives_only"], scoring["fill"]) == (True, "black")
    assert {"labn", "rise", "lambda"} < set(callback(config, "ExplanationCallback")["explainers"])


GUIDANCE = {
    "kl_weight": 0.5,
    "keep_ratio": 0.1,
    "patch_size": 1,
    "fill": "bias",
    "source": "attention",
    "mask_grad": "detached",
    "direction": "original_masked",
    "detach_target": False,
    "branch_loss_on": "original",
}


@pytest.mark.parametrize("name", ["idrid", "magnetogram"])
def test_accv_adds_guidance_and_the_bias_image_and_changes_nothing_else(name, monkeypatch, capsys):
    plain = resolved(CONFIGS[f"{name}_labn"], monkeypatch, capsys)
    guided = resolved(CONFIGS[f"{name}_labn_accv22"], monkeypatch, capsys)
    guidance = guided["model"]["init_args"].pop("guidance")
    assert {key: guidance[key] for key in GUIDANCE} == GUIDANCE
    assert plain["model"]["init_args"].pop("guidance") is None
    assert (callback(plain, "EvaluationCallback")["fill"], callback(guided, "EvaluationCallback")["fill"]) == (
        "black",
        "bias",
    )
    callback(guided, "EvaluationCallback")["fill"] = "black"
    assert {**guided, "include": None} == {**plain, "include": None}


@pytest.mark.parametrize(("name", "change"), [("b3", {"split": 3}), ("b13", {"split": 13}), ("theta0", {"theta": 0.0})])
def test_an_ablation_changes_one_value(name, change, monkeypatch, capsys):
    plain = resolved(CONFIGS["idrid_labn"], monkeypatch, capsys)
    other = resolved(CONFIGS[f"idrid_ablation_{name}"], monkeypatch, capsys)
    plain["model"]["init_args"] |= change
    assert {**other, "include": None} == {**plain, "include": None}


def test_the_baselines_share_data_and_optimiser(monkeypatch, capsys):
    plain = resolved(CONFIGS["idrid_labn"], monkeypatch, capsys)
    optimiser = ("class_weights", "lr", "head_lr", "weight_decay", "lr_factor", "lr_patience", "min_lr", "loss")
    for name, class_path, special in (
        ("lambda", "labn.modules.Classifier", {"backbone": "lambda_resnet50"}),
        (
            "abn",
            "labn.modules.LABN",
            {"backbone": "resnet50", "split": 13, "theta": 0.0, "gate": "residual", "branch": "abn"},
        ),
    ):
        other = resolved(CONFIGS[f"idrid_{name}"], monkeypatch, capsys)
        assert other["model"]["class_path"] == class_path
        assert chosen(other, "model", special) == special
        assert chosen(other, "model", optimiser) == chosen(plain, "model", optimiser)
        assert other["data"] == plain["data"]
        assert callback(other, "EvaluationCallback")["metrics"] == callback(plain, "EvaluationCallback")["metrics"]


def score_of(metric):
    """The score that a value comes with: insertion and deletion with their difference."""
    name = re.sub(r"^(insertion|deletion)", "pid", metric)
    return "id" if name == "pid1" else name


def test_every_published_row_has_a_configuration_that_scores_it(monkeypatch, capsys):
    for table in published().values():
        for row in table.rows:
            config = resolved(CONFIGS[f"{row.run}"], monkeypatch, capsys)
            assert row.explainer in callback(config, "ExplanationCallback")["explainers"]
            scores = {score_of(metric) for metric in table.metrics if metric != ACCURACY}
            assert scores <= set(callback(config, "EvaluationCallback")["metrics"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_read_from_at_most_three_files(path):
    assert len(set(with_includes(path))) <= 3


def test_no_two_configurations_share_a_run_folder():
    assert len(CONFIGS) == len(list((ROOT / "configs").rglob("*.yaml")))


def test_a_published_row_names_its_configuration():
    for table in published().values():
        assert all((ROOT / row.config).is_file() for row in table.rows)
