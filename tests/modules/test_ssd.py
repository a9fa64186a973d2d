"""The detector's LightningModule: it learns, it measures, it refuses."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from small_voc import write_voc
from torch.utils.data import DataLoader

from callbacks import RunProfile
from datamodules import VOC
from datamodules.io.boxes import collate_boxes
from labn.models.detectors import Detections
from labn.modules import SSD
from labn.modules.ssd import as_predictions, as_targets

pytest.importorskip("pycocotools")


def sample(index: int) -> dict[str, object]:
    """A bright square on noise; class 0 where it is red, class 1 where it is blue."""
    generator = torch.Generator().manual_seed(index)
    image = 0.1 * torch.randn(3, 300, 300, generator=generator)
    x, y = (int(v) for v in torch.randint(20, 180, (2,), generator=generator))
    kind = index % 2
    image[2 * kind, y : y + 90, x : x + 90] += 2
    box = torch.tensor([[x, y, x + 90, y + 90]], dtype=torch.float32)
    flags = {"labels": torch.tensor([kind]), "difficult": torch.tensor([False])}
    return {"image": image, "label": kind, "index": index, "boxes": box, **flags}


def loader(count: int = 4, batch_size: int = 2) -> DataLoader:
    return DataLoader([sample(i) for i in range(count)], batch_size=batch_size, collate_fn=collate_boxes)


def trainer(epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        num_sanity_val_steps=0,
    )


def slim(**settings) -> SSD:
    torch.manual_seed(0)
    module = SSD(**{"num_classes": 2, "width": 1 / 16, "batchnorm": True, "warmup_steps": 1, **settings})
    module.random_weights = ()  # as after training, without which a test is refused
    return module


def test_training_lowers_the_loss_and_logs_the_precision():
    module, run = slim(optimizer="adamw", lr=3e-3), trainer(epochs=3)
    first = float(module.losses(next(iter(loader())))[0]["loss"].detach())
    run.fit(module, loader(), loader())
    logged = run.callback_metrics
    assert float(logged["train/loss"]) < first
    assert {"val/loss", "val/map50", "train/classification", "train/localisation"} <= logged.keys()
    assert 0 <= float(logged["val/map50"]) <= 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_an_epoch_does_not_depend_on_the_batch_size(batch_size):
    whole = trainer().test(slim(), loader(4, 4), verbose=False)[0]
    parts = trainer().test(slim(), loader(4, batch_size), verbose=False)[0]
    for name in ("loss", "classification", "localisation"):
        assert parts[f"test/{name}"] == pytest.approx(whole[f"test/{name}"], rel=1e-5)


def test_perfect_detections_have_precision_one():
    module, run = slim(), trainer()
    batch = next(iter(loader()))
    truth = [
        Detections(b, torch.ones(len(b)), labels + 1, torch.zeros(len(b), dtype=torch.int64))
        for b, labels in zip(batch["boxes"], batch["labels"])
    ]
    metric = module.precision["val_"]
    metric.update([as_predictions(d) for d in truth], as_targets(batch), torch.arange(len(truth)))
    assert float(metric.compute()["map"]) == pytest.approx(1.0)
    metric.reset()
    found = run.test(module, loader(), verbose=False)[0]
    assert found["test/map50"] < 0.5
    assert set(found) >= {"test/ap50_0", "test/ap50_1", "test/loss"}


def test_a_class_without_a_box_has_no_precision():
    samples = [sample(2), {**sample(4), "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    samples[1]["difficult"] = torch.zeros(0, dtype=torch.bool)
    module = slim(score_threshold=0.01)
    found = trainer().test(module, DataLoader(samples, batch_size=2, collate_fn=collate_boxes), verbose=False)[0]
    assert "test/ap50_0" in found
    assert "test/ap50_1" not in found
    empty = trainer().test(module, DataLoader(samples[1:], collate_fn=collate_boxes), verbose=False)[0]
    assert math.isnan(empty["test/map50"])
    assert empty["test/loss"] == 0
    assert not any(name.startswith("test/ap50") for name in empty)


def test_detections_follow_the_thresholds():
    module = slim(score_threshold=1.0).eval()
    with torch.no_grad():
        assert [len(d) for d in module.detections(next(iter(loader()))["image"])] == [0, 0]


def test_random_weights_raise():
    with pytest.raises(ValueError, match=r"weights of SSD \(first: model.* are random: give --ckpt_path"):
        trainer().test(SSD(2, 1 / 16, True), loader(), verbose=False)


def test_bad_settings_of_a_detector_raise():
    with pytest.raises(ValueError, match="optimizer is 'adam'; it must be one of sgd, adamw"):
        slim(optimizer="adam")
    with pytest.raises(ValueError, match="width must be positive"):
        slim(width=0)


def test_images_of_another_size_raise():
    with pytest.raises(ValueError, match="images are 64 x 96 pixels; SSD300 needs 300 x 300"):
        slim()(torch.zeros(1, 3, 64, 96))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_data_of_another_size_raises_before_the_network_is_profiled(tmp_path):
    data = VOC(write_voc(tmp_path), image_size=200)
    fit = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[RunProfile()])
    with pytest.raises(
        ValueError, match=r"images are 200 x 200 pixels; SSD300 needs 300 x 300: set data\.init_args\.image_"
    ):
        fit.fit(SSD(num_classes=2, width=1 / 16), data)


def test_weights_are_loaded_from_a_file(tmp_path, capsys):
    module = slim()
    torch.save(module.network.model.state_dict(), tmp_path / "given.pth")
    torch.manual_seed(1)
    other = SSD(2, 1 / 16, True, ckpt=str(tmp_path / "given.pth"))
    assert "tensors taken" in capsys.readouterr().out
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(other.network.state_dict()[name], value)
