"""Whatever runs on the CPU runs on a GPU, and gives the same maps and scores up to float32's rounding.

Without a GPU the stand-in of `elsewhere` takes its place, which finds every tensor that was left behind; what needs the
real thing (compiled code, reduced precision, several GPUs) is skipped.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from command_line import TINY, call_main, launch
from every_explainer import INDICES, METHODS, TARGETS, explainer, network, pictures
from every_network import Residual, write_configs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.io.boxes import collate_boxes
from labn import lrp
from labn.metrics.comparisons import compare_values
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.models import LambdaLayer, magnetogram_net
from labn.modules import SSD
from labn.perturbation.engine import PerturbationEngine

pytestmark = pytest.mark.filterwarnings("ignore")

# Another device adds up in another order: maps differ by their last float32 digits, relative to their largest value;
# where that turns two nearly equal pixels, values that depend on order alone go another way for one place of a curve.
ROUNDING = 1e-4
SWAP = 1e-2
ORDER = re.compile(
    r"(errors_)?id|insertion1|deletion1|pctin_\w+|randomisation|auroc|rank|iou|topk_localisation|random_logit|irof|[se]mprt|mprt_layers|(insertion|deletion)8@random"
)
PERCENT = ("average_drop", "percent_increase", "completeness")


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`, which is on the CPU."""
    return float((a.cpu() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", METHODS)
def test_every_explainer_gives_the_cpus_maps(name: str, device: torch.device) -> None:
    expected = explainer(name)(network(name), pictures(), TARGETS, INDICES)
    model, images = network(name).to(device), pictures().to(device)
    maps = explainer(name)(model, images, TARGETS.to(device), INDICES)
    assert maps.device == images.device
    assert difference(maps, expected) <= ROUNDING


@pytest.mark.parametrize("make", [Residual, partial(magnetogram_net, in_channels=3)], ids=["residual", "lambda"])
@pytest.mark.parametrize("residual", ["ratio", "block"])
@pytest.mark.parametrize("rule", ["zplus", "epsilon"])
def test_relevance_arrives_with_its_account(
    make: Callable[..., nn.Module], rule: str, residual: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    model, images = make(num_classes=4).eval(), pictures()
    config = lrp.Config(rule=rule, residual=residual)
    expected = lrp.relevance(model, images, TARGETS, config)
    found = lrp.relevance(model.to(device), images.to(device), TARGETS.to(device), config, report=True)
    assert difference(found.relevance, expected.relevance) <= ROUNDING
    assert difference(found.arrived + found.leaked, found.initial.cpu()) <= ROUNDING


@pytest.mark.parametrize("shape", [(2, 8, 7, 9), (2, 16, 12, 12), (1, 8, 30, 30)])
def test_lambda_layers_and_their_gradients(shape: tuple[int, ...], device: torch.device) -> None:
    def outputs(there: torch.device, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        layer = LambdaLayer(shape[1], dim_k=4, heads=2, r=5).to(there, dtype)
        x = torch.randn(shape, dtype=torch.float64).to(there, dtype).requires_grad_()
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    exact = outputs(torch.device("cpu"), torch.float64)
    for found, expected in zip(outputs(device, torch.float32), exact, strict=True):
        assert found.device == device
        assert difference(found.double(), expected) <= ROUNDING


def curves(there: torch.device, precision: str = "fp32", model: nn.Module | None = None) -> Tensor:
    """Insertion and deletion of a map on a network with BatchNorm, as (2, B, K)."""
    images = pictures().to(there)
    metric = PatchInsertionDeletion(4, n_steps=8, precision=precision)
    maps = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3)).to(there)
    model = network("gradcam").to(there) if model is None else model
    found = metric.curves(model, images, maps, TARGETS.to(there), INDICES)
    return torch.stack([found.insertion, found.deletion])


def test_curves_of_insertion_and_deletion(device: torch.device) -> None:
    assert (curves(device).cpu() - curves(torch.device("cpu"))).abs().max() <= ROUNDING


def test_the_folded_copy_is_used_there(device: torch.device) -> None:
    engine = PerturbationEngine.for_model(network("gradcam").to(device), pictures().to(device))
    plain = PerturbationEngine.for_model(network("gradcam").to(device), pictures().to(device), fold=False)
    assert engine.folded
    assert difference(engine.original(), plain.original().cpu()) <= ROUNDING


def rows(run_dir: Path) -> list[dict[str, str]]:
    (table,) = [path for path in (run_dir / "test").glob("*scores.csv") if path.name != "summary.csv"]
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lambda", "residual", "detector"])
def test_the_command_line_writes_the_cpus_rows(
    name: str, device: torch.device, there: list[str], tmp_path: Path
) -> None:
    """Every explainer and every metric through a Trainer on the device."""
    pytest.importorskip("pycocotools")
    write_configs(tmp_path, images=3)
    words = ["test", "--config", str(tmp_path / f"{name}.yaml")]
    with patch("labn.results.tables.compare_values", partial(compare_values, n_resamples=2)):
        call_main([*words, f"--run_dir={tmp_path / 'there'}", *there])
        call_main([*words, f"--run_dir={tmp_path / 'here'}"])
    found, expected = rows(tmp_path / "there"), rows(tmp_path / "here")
    assert [{**row, "value": None} for row in found] == [{**row, "value": None} for row in expected]
    for a, b in zip(found, expected):
        allowed = SWAP if ORDER.fullmatch(a["metric"]) else ROUNDING
        assert abs(float(a["value"]) - float(b["value"])) <= allowed * (100 if a["metric"] in PERCENT else 1), (a, b)


@pytest.mark.slow
def test_training_explains_scores_and_resumes_there(device: torch.device, there: list[str], tmp_path: Path) -> None:
    """The quickstart with its guidance, tiny: fit, one more epoch from the checkpoint, test."""
    words = ["--config", "configs/quickstart.yaml", f"--run_dir={tmp_path / 'run'}", *TINY, *there]
    call_main(["fit", *words])
    call_main(["fit", *words, "--trainer.max_epochs=3", "--ckpt_path=last"])
    call_main(["test", *words, "--ckpt_path=best"])
    assert {row["explainer"] for row in rows(tmp_path / "run")} >= {"labn", "-labn", "random", "constant"}


def test_the_detector_trains_there(device: torch.device, there: list[str]) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    box = torch.tensor([[40.0, 50.0, 190.0, 160.0]])
    truth = {"boxes": box, "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
    samples = [
        {"image": torch.randn(3, 300, 300, generator=generator), "label": 1, "index": i, **truth} for i in range(2)
    ]
    loader = DataLoader(samples, batch_size=2, collate_fn=collate_boxes)
    options: dict[str, Any] = dict(word.removeprefix("--trainer.").split("=") for word in there)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=2, num_sanity_val_steps=0, inference_mode=False, **quiet, **options)
    trainer.fit(SSD(num_classes=2, width=1 / 16, batchnorm=True, warmup_steps=1), loader, loader)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert 0 <= trainer.callback_metrics["val/map50"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_reduced_precision_trains(precision: str, gpu: torch.device, tmp_path: Path) -> None:
    words = ["--config", "configs/quickstart.yaml", f"--run_dir={tmp_path}", *TINY, "--trainer.accelerator=gpu"]
    call_main(["fit", *words, "--trainer.devices=1", f"--trainer.precision={precision}"])
    call_main(["test", *words, "--trainer.devices=1", "--ckpt_path=best"])
    assert all(float(row["value"]) == float(row["value"]) for row in rows(tmp_path))


def test_reduced_precision_of_scoring(gpu: torch.device) -> None:
    assert 0 < (curves(gpu, "bf16").cpu() - curves(torch.device("cpu"))).abs().max() <= 0.05


@pytest.mark.parametrize("name", ["gradcam", "gradcam++", "rise", "scorecam", "occlusion", "integrated_gradients"])
def test_compiled_and_channels_last_models(name: str, gpu: torch.device) -> None:
    expected = explainer(name)(network(name), pictures(), TARGETS, INDICES)
    model = network(name).to(gpu, memory_format=torch.channels_last)
    images = pictures().to(gpu, memory_format=torch.channels_last)
    compiled = torch.compile(model)
    compiled(images)
    for given in (model, compiled):
        assert difference(explainer(name)(given, images, TARGETS.to(gpu), INDICES), expected) <= ROUNDING
        assert (curves(gpu, model=given).cpu() - curves(torch.device("cpu"))).abs().max() <= ROUNDING


def test_tensor_float_32_does_not_reach_the_maps(gpu: torch.device) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        assert (curves(gpu).cpu() - curves(torch.device("cpu"))).abs().max() <= ROUNDING
    finally:
        torch.set_float32_matmul_precision("highest")


def test_chunks_shrink_until_they_fit(gpu: torch.device) -> None:
    """Where one image fits and 256 do not."""
    images = torch.zeros(1, 3, 256, 256, device=gpu)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + 2**30) / torch.cuda.get_device_properties(gpu).total_memory
    )
    try:
        engine = PerturbationEngine.for_model(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(2), Mean()), images)
        assert engine.run(lambda position: images.expand(len(position), -1, -1, -1), 512).shape == (512, 64)
        assert engine.forwards == 512
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Mean(nn.Module):
    """Mean over pixels: (B, C, N) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


@pytest.mark.slow
def test_several_gpus_write_the_same_rows(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are no two GPUs on this machine")
    write_configs(tmp_path, images=5)
    words = ["cli.py", "test", f"--config={tmp_path / 'residual.yaml'}", "--trainer.accelerator=gpu"]
    for count in (1, 2):
        more = [f"--trainer.devices={count}", "--trainer.strategy=ddp", f"--run_dir={tmp_path / str(count)}"]
        launch(*words, *more, processes=count)
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        assert abs(float(a["value"]) - float(b["value"])) <= SWAP
