"""The ground-truth map: mask, dilation and blur."""

import csv

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, gaussian_filter
from torch import nn

from callbacks import EvaluationCallback, ExplanationCallback
from datamodules import SyntheticFundus
from labn import evaluate
from labn.explainers import GroundTruthMap, Negated
from labn.explainers.baseline import disc
from labn.modules import Classifier
from labn.results.fingerprints import describe

IMAGES, TARGETS = torch.zeros(3, 2, 20, 24), torch.zeros(3, dtype=torch.long)


def masks():
    return torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)) > 0.97


def truth(given, **options):
    return GroundTruthMap(**options).with_masks(given)(nn.Identity(), IMAGES, TARGETS)


def test_the_map_without_options_is_the_mask():
    assert torch.equal(truth(masks()), masks().float())


def test_the_mask_is_dilated_by_a_disc():
    expected = np.stack([binary_dilation(mask, disc(3).numpy() > 0) for mask in masks().numpy()])
    assert torch.equal(truth(masks(), dilation=3), torch.from_numpy(expected).float())


def test_the_mask_is_blurred_by_a_gaussian():
    blurred = [gaussian_filter(mask, 2.0, mode="constant", truncate=4.0) for mask in masks().double().numpy()]
    torch.testing.assert_close(
        truth(masks(), blur=2.0).double(), torch.from_numpy(np.stack(blurred)), atol=1e-6, rtol=0
    )


def test_missing_masks_are_refused_and_masks_are_no_settings():
    with pytest.raises(ValueError, match="GroundTruthMap needs the ground-truth masks of these images"):
        GroundTruthMap()(nn.Identity(), IMAGES, TARGETS)
    with pytest.raises(ValueError, match="GroundTruthMap needs the ground-truth masks"):
        truth(masks()[:2])
    with pytest.raises(ValueError, match="must not be negative"):
        GroundTruthMap(dilation=-1)
    assert describe(GroundTruthMap(2).with_masks(masks())) == describe(GroundTruthMap(2))


AGAIN = {"max_sensitivity": 0.0, "random_logit": 1.0, "randomisation": 1.0}
"""Metrics that explain again -> their values for a map that depends on neither image, class nor weights."""


@pytest.mark.parametrize("sign", [1, -1])
def test_metrics_that_explain_again_give_the_masks(sign):
    explainer = GroundTruthMap() if sign == 1 else Negated(GroundTruthMap())
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(960, 2)), torch.rand(3, 2, 20, 24)
    values = evaluate(
        model,
        images,
        sign * masks().float(),
        TARGETS,
        ["max_sensitivity", "random_logit", "randomisation", "adcc"],
        masks=masks(),
        explainer=explainer,
        mean=None,
        std=None,
    )
    for name, expected in AGAIN.items():
        torch.testing.assert_close(values[name], torch.full((3,), expected, dtype=torch.float64))
    assert values["adcc"].isfinite().any()


def test_the_callback_gives_the_masks_to_metrics_that_explain_again(tmp_path):
    module = Classifier("resnet18", num_classes=2)
    module.random_weights = ()  # as after training, without which a test is refused
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[
            ExplanationCallback({"truth": GroundTruthMap(1), "negated": Negated(GroundTruthMap(1))}),
            EvaluationCallback(["max_sensitivity", "random_logit"], baselines=False, metric_options={"draws": 2}),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        inference_mode=False,
    )
    trainer.test(module, SyntheticFundus(n_train=4, n_val=2, n_test=2, image_size=48, batch_size=2), verbose=False)
    with open(tmp_path / "test" / "scores.csv", newline="") as file:
        found = {(r["explainer"], r["metric"], r["value"]) for r in csv.DictReader(file) if r["label"] == "1"}
    for explainer in ("truth", "negated"):
        assert {float(value) for e, m, value in found if (e, m) == (explainer, "max_sensitivity")} == {0.0}
        assert {float(value) for e, m, value in found if (e, m) == (explainer, "random_logit")} == {1.0}
