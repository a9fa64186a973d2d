"""The first gradients under DDP are those without it: none is permuted on its way through DDP's buckets."""

import subprocess
import sys

import pytest

SCRIPT = """
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader
from labn.modules import Classifier

class Gradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found = {name: value.grad.clone() for name, value in module.named_parameters()}

def gradients(strategy):
    torch.manual_seed(0)
    module, watch = Classifier("timm/resnet10t", 3), Gradients()
    images = torch.randn(4, 3, 32, 32)
    samples = [{"image": image, "label": index % 3, "index": index} for index, image in enumerate(images)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [watch]}
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, accelerator="cpu", devices=1, strategy=strategy, **quiet)
    loader = DataLoader(samples, batch_size=4)
    trainer.fit(module, loader, loader)
    return watch.found

plain, distributed = gradients("auto"), gradients("ddp")
assert any(value.ndim == 4 and value.shape[-1] > 1 for value in plain.values())
print(max(((plain[name] - distributed[name]).norm() / (plain[name].norm() + 1e-3)).item() for name in plain))
"""


@pytest.mark.slow
def test_the_first_gradients_are_those_without_ddp():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[-1]) < 1e-2
