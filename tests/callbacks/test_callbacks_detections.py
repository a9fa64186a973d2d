"""The detections of a test in the results folder: maps, pictures, tables."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from small_voc import write_voc

from callbacks import DetectionCallback
from callbacks.explanation.detections import detection_rows
from datamodules import VOC
from labn.explainers import CRP
from labn.io.readers import read_table
from labn.metrics.detection import DetectionScores
from labn.models.detectors import Detections, Layout
from labn.modules import SSD

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.filterwarnings("ignore:.*without area", "ignore:.*does not have many workers")


def trainer(root, *callbacks, **settings):
    return pl.Trainer(
        default_root_dir=root,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{"inference_mode": False, **settings},
    )


def module():
    torch.manual_seed(0)
    detector = SSD(num_classes=2, width=1 / 16, warmup_steps=1)
    detector.random_weights = ()  # as after training, without which a test is refused
    return detector


def rows(path):
    return [row.cells for row in read_table(path, escaped=True)]


def test_a_test_writes_maps_pictures_and_scores(tmp_path):
    data = VOC(write_voc(tmp_path / "voc"), batch_size=1)
    callback = DetectionCallback(
        CRP(score_threshold=0.0), tasks=["class", "cx"], top=2, scores=DetectionScores(fractions=(0, 0.1))
    )
    trainer(tmp_path / "run", callback).test(module(), data, verbose=False)
    stage = tmp_path / "run" / "test"
    found = rows(stage / "detections.csv")
    assert [(r["index"], r["name"], r["detection"]) for r in found] == [("0", "e", "0"), ("0", "e", "1")]
    assert {r["class"] for r in found} <= {"cat", "dog"}
    assert all(0 <= float(r["overlap"]) <= 1 for r in found)
    stored = load_file(stage / "detections" / "000000.safetensors")
    assert stored["maps"].shape == (2, 2, 300, 300)
    assert stored["priors"].tolist() == [int(r["prior"]) for r in found]
    image = data.dataset("test")[0]["image"]
    explainer = CRP(score_threshold=0.0)
    network = module().network.eval()
    again = explainer(network, image[None], torch.tensor([int(stored["labels"][0])]))
    torch.testing.assert_close(stored["maps"][0, 0], again[0], rtol=1e-4, atol=1e-4 * float(again.abs().max()))
    assert (stage / "overlays" / "000000-e.png").read_bytes().startswith(b"\x89PNG")
    page = (stage / "report.html").read_text()
    assert "e #1" in page
    assert "shift_cx" in page
    scores = rows(stage / "detection_scores.csv")
    assert {r["metric"] for r in scores} >= {"similarity", "mass", "confidence", "shift_cx", "shift_h"}
    summary = {(r["explainer"], r["metric"]): r for r in rows(stage / "detection_summary.csv")}
    values = [float(r["value"]) for r in scores if (r["explainer"], r["metric"]) == ("crp", "mass")]
    assert float(summary["crp", "mass"]["mean"]) == pytest.approx(sum(values) / 2)
    assert summary["crp", "mass"]["n"] == "2"
    ends = ("explainer_a", "explainer_b", "metric")
    paired = {tuple(r[k] for k in ends): r for r in rows(stage / "detection_paired.csv")}
    assert {(a, b) for a, b, metric in paired if metric == "shift_cx"} == {
        ("crp", "random"), ("-crp", "random"), ("crp", "-crp"),
    }  # fmt: skip
    means = [float(summary[e, "shift_w"]["mean"]) for e in ("crp", "-crp")]
    assert float(paired["crp", "-crp", "shift_w"]["difference"]) == pytest.approx(means[0] - means[1])


@pytest.mark.slow
def test_a_second_test_replaces_all_files_of_the_first(tmp_path):
    """One image less and no scores: tables, pictures and tensors are those of the second run alone."""
    root = write_voc(tmp_path / "voc")
    (root / "ImageSets" / "Main" / "test.txt").write_text("e\nd\n")
    data, stage = VOC(root, batch_size=1), tmp_path / "run" / "test"
    settings = {"tasks": ["class"], "top": 1}
    scores = DetectionScores(fractions=(0, 0.1))
    first = DetectionCallback(CRP(score_threshold=0.0), **settings, scores=scores)
    trainer(tmp_path / "run", first).test(module(), data, verbose=False)
    assert {r["index"] for r in rows(stage / "detection_scores.csv")} == {"0", "1"}
    (stage / "scores.csv").write_text("of another callback")
    second = DetectionCallback(CRP(score_threshold=0.0), **settings)
    trainer(tmp_path / "run", second, limit_test_batches=1).test(module(), data, verbose=False)
    assert [r["index"] for r in rows(stage / "detections.csv")] == ["0"]
    assert [path.name for path in (stage / "overlays").iterdir()] == ["000000-e.png"]
    assert {path.stem for path in (stage / "detections").iterdir()} == {"000000"}
    assert not list(stage.glob("detection_s*.csv"))
    assert "d #1" not in (stage / "report.html").read_text()
    assert (stage / "scores.csv").exists()


def test_detections_of_other_weights_are_moved_aside(tmp_path):
    data, stage = VOC(write_voc(tmp_path / "voc"), batch_size=1), tmp_path / "run" / "test"
    callback = DetectionCallback(CRP(score_threshold=0.0), tasks=["class"], top=1)
    trainer(tmp_path / "run", callback).test(module(), data, verbose=False)
    kept = ["detections/000000.safetensors", "detections.csv", "overlays/000000-e.png", "report.html"]
    first = {name: (stage / name).read_bytes() for name in kept}
    other = module()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.warns(UserWarning, match=r"holds results of another checkpoint; they are in .*test\.old-1 now"):
        trainer(tmp_path / "run", callback).test(other, data, verbose=False)
    aside = tmp_path / "run" / "test.old-1"
    assert {name: (aside / name).read_bytes() for name in kept} == first
    assert (stage / kept[0]).read_bytes() != first[kept[0]]


def test_false_detections_overlap_no_object_of_their_class():
    layout = Layout(((1, 1),), (3,))
    found = Detections(
        torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]),
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([1, 2, 1]),
        torch.tensor([0, 1, 2]),
    )
    truth = (torch.tensor([[0.0, 0, 10, 5]]), torch.tensor([0]))
    made = detection_rows(found, SimpleNamespace(layout=layout), ["background", "cat", "dog"], truth)
    assert [row["overlap"] for row in made] == pytest.approx([0.5, 0, 0])
    assert [row["class"] for row in made] == ["cat", "dog", "cat"]
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert (
        detection_rows(found, SimpleNamespace(layout=layout), ["background", "cat", "dog"], nothing)[0]["overlap"] == 0
    )


def test_validation_while_fitting_and_images_without_detection(tmp_path):
    data = VOC(write_voc(tmp_path / "voc"), batch_size=3)
    callback = DetectionCallback(CRP(score_threshold=1.0), val_images=1, scores=DetectionScores())
    trainer(tmp_path / "run", callback).fit(module(), data)
    stage = tmp_path / "run" / "val" / "epoch=000"
    assert rows(stage / "detections.csv") == []
    assert load_file(stage / "detections" / "000000.safetensors")["maps"].shape == (0, 5, 300, 300)
    assert (stage / "overlays" / "000000-d.png").exists()
    assert not (stage / "detection_scores.csv").exists()


def test_every_n_epochs_and_bad_settings(tmp_path):
    data = VOC(write_voc(tmp_path / "voc"), batch_size=3)
    trainer(tmp_path / "run", DetectionCallback(every_n_epochs=0)).fit(module(), data)
    assert not (tmp_path / "run" / "val").exists()
    with pytest.raises(ValueError, match="tasks has 'left'; it must be some of class, cx, cy, w, h"):
        DetectionCallback(tasks=["left"])
    with pytest.raises(ValueError, match="contrast_at of crp is 'none'"):
        DetectionCallback(CRP(contrast_at="none"), scores=DetectionScores())
    with pytest.raises(MisconfigurationException, match=r"set trainer\.inference_mode to false"):
        trainer(tmp_path / "run", DetectionCallback(), inference_mode=True).test(module(), data, verbose=False)
