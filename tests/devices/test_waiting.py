"""How often a call waits for the device: operators whose result the processor reads, counted under a dispatch mode."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules import SyntheticFundus
from labn.explainers.registry import explainer_by_name
from labn.metrics import PatchInsertionDeletion
from labn.modules import LABN

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount"}
"""Operators whose result, or whose result's shape, the processor must know."""
ROOT = Path(__file__).parents[2]


class Waits(TorchDispatchMode):
    """Counts the operators that wait for the device, by the line of this project that they come from."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS or by_mask:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT / "labn")]
            line = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else name
            # On a CPU the engine compares positions to save a copy, which it does not do on a GPU.
            if "positions" not in line:
                self.lines[line] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.lines.total()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 2)).eval()


IMAGES, TARGETS, INDICES = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 0, 1]), torch.arange(4)


def counted(call):
    call()  # a first call prepares copies and caches
    with Waits() as waits:
        call()
    return waits


def test_scores_wait_a_few_times(network):
    metric = PatchInsertionDeletion(16)
    waits = counted(lambda: metric.score(network, IMAGES, IMAGES.mean(1), TARGETS, INDICES))
    assert waits.total <= 13, waits.lines


@pytest.mark.parametrize(
    ("method", "budget", "options"),
    [
        ("gradcam", 1, {}),
        ("gradient", 1, {}),
        ("smoothgrad", 1, {"n_samples": 25}),
        ("integrated_gradients", 1, {"n_steps": 50}),
        ("lrp", 4, {}),
        ("rise", 3, {"n_masks": 64}),
    ],
)
def test_maps_wait_a_few_times(network, monkeypatch, method, budget, options):
    monkeypatch.setattr("labn.perturbation.engine.cpu_chunk", lambda images: 256)  # as on a GPU
    explainer = explainer_by_name(method, **options)
    waits = counted(lambda: explainer(network, IMAGES, TARGETS, INDICES))
    assert waits.total <= budget, waits.lines


def test_a_training_step_waits_once():
    """For the check that the loss is finite, before it reaches the weights."""
    options = {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}}
    module = LABN("lambda_resnet", split=1, network_options=options)
    batch = {"image": IMAGES, "label": TARGETS, "index": INDICES}

    def step():
        terms, logits = module.losses(batch, "train")
        module.check_not_nan(terms["loss"].detach(), batch, "train")
        module._update(terms["loss"].detach(), logits.detach(), batch, "train")
        terms["loss"].backward()

    waits = counted(step)
    assert waits.total <= 1, waits.lines


def test_loaders_have_no_workers_on_a_cpu_unless_asked():
    options = {"n_train": 4, "n_val": 2, "n_test": 2, "image_size": 48, "batch_size": 2}
    assert SyntheticFundus(**options).train_dataloader().num_workers == 0
    assert SyntheticFundus(**options, num_workers=1).train_dataloader().num_workers == 1
