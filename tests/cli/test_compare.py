"""The comparison configurations: what they hold, and whole runs in small."""

import csv
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from command_line import TINY, call_main

from labn.explainers import EXPLAINERS
from labn.launch.config_include import with_includes
from labn.models import build_network

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
COMPARISONS = sorted({*CONFIGS.glob("**/*compare*.yaml"), *CONFIGS.glob("**/amg*.yaml")})

# Methods of other networks, the second of two forms of one method, and what every table has anyway.
OF_OTHERS = {"labn", "abn", "lambda", "rollout", "legrad", "crp"}
FORMS = {"rise_released"}
BASELINES = {"random", "constant"}
# Methods that came later; a configuration with recorded results keeps its list.
LATER = {"sobel", "layercam", "hirescam", "finercam", "guided_backprop", "deconvnet", "expected_gradients"}
LATER |= {"integrated_gradients_blur", "integrated_gradients_bw", "legrad", "sobol", "kernelshap"}


def explainers_of(path):
    """The explainers that a file and those that it includes hand to the last ExplanationCallback."""
    found = {}
    for file in with_includes(path):
        trainer = yaml.safe_load(file.read_text()).get("trainer", {})
        for entry in trainer.get("callbacks", []) + trainer.get("callbacks+", []):
            if entry["class_path"] == "callbacks.ExplanationCallback":
                found = entry["init_args"]["explainers"]
    return found


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_no_experiment_switches_the_baselines_off(path):
    assert "gradcam" in explainers_of(path)
    assert "baselines" not in path.read_text()


@pytest.mark.parametrize("name", ["imagenet/imagenet_compare.yaml", "imagenet/on_cpu.yaml"])
def test_every_method_for_a_plain_network_is_compared(name):
    assert set(explainers_of(CONFIGS / name)) == set(EXPLAINERS) - OF_OTHERS - FORMS - BASELINES - LATER


@pytest.mark.parametrize(
    "name", ["idrid/idrid_compare.yaml", "synthetic/quickstart_compare.yaml", "idrid/on_cpu_compare.yaml"]
)
def test_every_method_for_a_lambda_network_is_compared(name):
    expected = set(EXPLAINERS) - FORMS - BASELINES - LATER - {"abn", "rollout", "crp"} | {"-labn"}
    assert set(explainers_of(CONFIGS / name)) == expected


def summary_of(folder):
    with open(folder / "summary.csv", newline="") as file:
        return {(row["explainer"], row["metric"]): row for row in csv.DictReader(file)}


def test_given_weights_are_compared_on_imagenet_without_training(tmp_path, monkeypatch, capsys):
    """Photographs in a flat folder, a file of weights, no --ckpt_path."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    torch.save(build_network("timm/resnet10t", 1000).state_dict(), tmp_path / "weights.pt")
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        pixels = torch.randint(0, 256, (40, 60, 3), generator=generator, dtype=torch.uint8).numpy()
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
    small = tmp_path / "small.yaml"
    callbacks = [
        {
            "class_path": "callbacks.ExplanationCallback",
            "init_args": {"explainers": dict.fromkeys(("gradcam", "lrp")), "test_images": 3},
        },
        {"class_path": "callbacks.EvaluationCallback", "init_args": {"metrics": ["pid16"]}},
    ]
    small.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    data = {"root": tmp_path, "class_rule": "every:190", "image_size": 32, "shorter": 36, "batch_size": 4}
    call_main(
        [
            *("test", "--config", "configs/imagenet/imagenet_compare.yaml", "--config", str(small)),
            *("--model.init_args.backbone", "timm/resnet10t"),
            *(f"--model.init_args.backbone_ckpt={tmp_path}/weights.pt", f"--run_dir={tmp_path}/run"),
            *(f"--data.init_args.{name}={value}" for name, value in data.items()),
            *("--wandb=disabled", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        ]
    )
    summary = summary_of(tmp_path / "run" / "test")
    assert {explainer for explainer, _ in summary} == {"gradcam", "lrp", "random", "constant"}
    assert {row["n"] for row in summary.values()} == {"3"}
    assert float(summary["constant", "pid16"]["mean"]) == pytest.approx(0, abs=1e-6)
    assert "top5_error 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["googlenet", "vgg19"])
def test_weights_that_are_not_here_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LABN_DATA", str(tmp_path))
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(ValueError, match=rf"backbone_ckpt: {tmp_path}/imagenet/{name}.pth does not exist"):
        call_main(
            ["test", "--config", f"configs/imagenet/amg_{name}.yaml", "--wandb=disabled", f"--run_dir={tmp_path}/run"]
        )


def cheaper(folder):
    """The callbacks of the quickstart's comparison with fewer masks, channels, nodes and copies, as a last file."""
    explainers = explainers_of(CONFIGS / "synthetic" / "quickstart_compare.yaml")
    for name, kind, settings in (
        ("rise", "RISE", {"n_masks": 64}),
        ("scorecam", "ScoreCAM", {"channels": 8}),
        ("integrated_gradients", "IntegratedGradients", {"n_steps": 2}),
        ("smoothgrad", "SmoothGrad", {"n_samples": 2}),
    ):
        explainers[name] = {"class_path": f"labn.explainers.{kind}", "init_args": settings}
    own = yaml.safe_load((CONFIGS / "synthetic" / "quickstart_compare.yaml").read_text())["trainer"]["callbacks"]
    explaining = {"class_path": "callbacks.ExplanationCallback", "init_args": {"explainers": explainers}}
    scoring = next(entry for entry in own if entry["class_path"] == "callbacks.EvaluationCallback")
    path = folder / "cheaper.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [explaining, scoring]}}))
    return str(path)


@pytest.mark.slow
def test_the_whole_table_of_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = ["--wandb=disabled", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    quick = [word for word in TINY if "max_epochs" not in word]
    call_main(
        ["fit", "--config", "configs/quickstart.yaml", f"--run_dir={tmp_path}/fit", *quick, "--trainer.max_epochs=1"]
    )
    checkpoint = f"--ckpt_path={tmp_path}/fit/checkpoints/last.ckpt"
    compare = ["--config", "configs/synthetic/quickstart_compare.yaml", "--data.init_args.n_test=2"]
    call_main(["test", *compare, "--config", cheaper(tmp_path), checkpoint, f"--run_dir={tmp_path}/run", *run])
    summary = summary_of(tmp_path / "run" / "test")
    for explainer in BASELINES | set(explainers_of(CONFIGS / "synthetic" / "quickstart_compare.yaml")):
        for metric in ("id", "pid16", "pid16@official", "average_drop", "pctin_logit20", "mass", "randomisation"):
            assert (explainer, metric) in summary
    assert float(summary["constant", "pid16"]["mean"]) == pytest.approx(0, abs=1e-6)
    assert float(summary["random", "randomisation"]["mean"]) == pytest.approx(1)
