"""Every metric through the evaluation callback: rows, intervals, paired differences, settings from YAML."""

import csv
import math

import lightning.pytorch as pl
import numpy as np
import pytest
from command_line import TINY, call_main

from callbacks import EvaluationCallback, ExplanationCallback
from datamodules import SyntheticFundus
from labn import evaluate
from labn.explainers import GradCAM
from labn.modules import LABN

METRICS = ["average_drop", "percent_increase", "pctin", "pctin10", "pointing", "mass", "rank"]
METRICS += ["randomisation", "sparseness"]
PCTIN = [f"pctin_{form}{q}" for form in ("prob", "logit", "ratio") for q in (10, 50)]
VALUES = {name for name in METRICS if name != "pctin"} | set(PCTIN)


def rows(folder, name):
    with open(folder / "test" / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The folder of a test with every metric, the network and the data."""
    folder = tmp_path_factory.mktemp("metrics")
    pl.seed_everything(0, verbose=False)
    backbone = {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}
    module = LABN("lambda_resnet", split=1, theta=0.3, network_options={"backbone_options": backbone})
    module.random_weights = ()  # as after training, without which a test is refused
    data = SyntheticFundus(n_train=8, n_val=6, n_test=5, image_size=48, batch_size=3)
    score = EvaluationCallback(METRICS, metric_options={"percents": [10, 50], "mask_space": "pixel"})
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[ExplanationCallback({"gradcam": None}), score],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        inference_mode=False,
    )
    trainer.test(module, data, verbose=False)
    return folder, module, data


def test_every_value_has_rows_a_mean_and_paired_differences(scored):
    folder = scored[0]
    found = rows(folder, "scores.csv")
    assert {row["metric"] for row in found} == VALUES
    assert {row["explainer"] for row in found} == {"gradcam", "random", "constant"}
    summary = {(row["explainer"], row["metric"]): row for row in rows(folder, "summary.csv")}
    paired = {(r["explainer_a"], r["explainer_b"], r["metric"]): r for r in rows(folder, "paired.csv")}
    assert {metric for _, metric in summary} == VALUES == {metric for *_, metric in paired}
    for (a, b, metric), row in paired.items():
        of = {r["index"] + r["explainer"]: float(r["value"]) for r in found if r["metric"] == metric}
        indices = {r["index"] for r in found if r["metric"] == metric}
        differences = [of[i + a] - of[i + b] for i in indices]
        assert float(row["difference"]) == pytest.approx(np.mean(differences), abs=1e-9)
        assert float(row["ci_low"]) <= float(row["difference"]) + 1e-9
        assert float(row["difference"]) <= float(row["ci_high"]) + 1e-9
        mean = float(summary[a, metric]["mean"])
        assert mean == pytest.approx(np.mean([of[i + a] for i in indices]), abs=1e-9)


def test_uninformative_maps_have_the_expected_scores(scored):
    means = {(r["explainer"], r["metric"]): float(r["mean"]) for r in rows(scored[0], "summary.csv")}
    assert means["random", "randomisation"] == means["constant", "randomisation"] == 1
    assert means["gradcam", "randomisation"] < 0.99
    assert means["constant", "sparseness"] == pytest.approx(0, abs=1e-12)


def test_rows_equal_the_scores_of_evaluate(scored):
    folder, module, data = scored
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    network = module.network.eval()
    maps = GradCAM()(network, batch["image"], batch["label"])
    options = {"masks": batch["mask"], "explainer": GradCAM(), "mean": data.mean, "std": data.std}
    settings = {"percents": [10, 50], "mask_space": "pixel"}
    scores = evaluate(network, batch["image"], maps, batch["label"], METRICS, **options, **settings)
    assert set(scores) == VALUES
    found = {
        (int(r["index"]), r["metric"]): float(r["value"])
        for r in rows(folder, "scores.csv")
        if r["explainer"] == "gradcam"
    }
    for name, values in scores.items():
        for index, value in zip(batch["index"].tolist(), values.tolist()):
            assert math.isnan(value) == ((index, name) not in found)
            assert math.isnan(value) or found[index, name] == pytest.approx(value, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("random_weights_allowed")
def test_settings_come_from_yaml(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    (tmp_path / "metrics.yaml").write_text("""
trainer:
  callbacks:
    - class_path: callbacks.EvaluationCallback
      init_args:
        explainers: {gradcam: }
        metrics: [pctin, randomisation]
        metric_options: {percents: [3, 7], forms: [prob], n_stages: 2, absolute: true}
        baselines: false
""")
    run = ["--config", "configs/quickstart.yaml", *TINY, f"--run_dir={tmp_path}", "--data.init_args.n_test=4"]
    call_main(["test", *run, "--config", str(tmp_path / "metrics.yaml")])
    found = rows(tmp_path, "summary.csv")
    assert {row["explainer"] for row in found} == {"gradcam"}
    assert [row["metric"] for row in found] == ["pctin_prob3", "pctin_prob7", "randomisation"]


def test_an_unknown_metric_option_raises():
    with pytest.raises(TypeError, match="no metric has a setting 'percent'"):
        EvaluationCallback(["pctin"], metric_options={"percent": [10]})
