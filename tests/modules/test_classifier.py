"""The Classifier module: given weights, what may be tested, learning rates, top-5 error."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules import SyntheticFundus
from labn.models import build_network
from labn.models.cbam import CBAM
from labn.modules import Classifier
from labn.modules.base import top_error


@pytest.fixture
def weights(tmp_path):
    """A file with all weights of a small ResNet of seven classes."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(build_network("timm/resnet10t", 7).state_dict(), path)
    return path


def loader():
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader([{"image": x, "label": n, "index": n} for n, x in enumerate(images)], batch_size=4)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    return pl.Trainer(**{**quiet, "accelerator": "cpu", "enable_model_summary": False, **options})


def test_loaded_weights_can_be_tested_without_training(weights):
    module = Classifier("timm/resnet10t", 7, backbone_ckpt=str(weights))
    network = build_network("timm/resnet10t", 7, weights=str(weights)).eval()
    (found,) = trainer().test(module, loader(), verbose=False)
    with torch.no_grad():
        logits = torch.cat([network(batch["image"]) for batch in loader()])
    labels = torch.arange(6)
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    ranks = (logits > logits[labels, labels][:, None]).sum(1)
    assert found["test/top5_error"] == pytest.approx((ranks >= 5).double().mean().item())


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_random_weights_raise(stage, weights):
    bare = Classifier("timm/resnet10t", 7)
    with pytest.raises(
        ValueError, match=r"weights of timm/resnet10t \(first: conv1.0.weight\) are random: give --ckpt"
    ):
        getattr(trainer(), stage)(bare, loader(), verbose=False)
    other_head = Classifier("timm/resnet10t", 8, backbone_ckpt=str(weights))
    with pytest.raises(ValueError, match=r"2 weights of timm/resnet10t \(first: fc.weight\) are random"):
        getattr(trainer(), stage)(other_head, loader(), verbose=False)


def test_trained_and_loaded_weights_are_not_random(tmp_path):
    module = Classifier("timm/resnet10t", 7)
    runner = trainer()
    runner.fit(module, loader(), loader())
    runner.test(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "trained.ckpt")
    fresh = Classifier("timm/resnet10t", 7)
    trainer().test(fresh, loader(), ckpt_path=tmp_path / "trained.ckpt", weights_only=True, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), module.state_dict().values()))


def test_a_missing_file_of_weights_raises_an_error_that_names_it():
    with pytest.raises(
        FileNotFoundError, match=r"backbone_ckpt: nowhere/resnet18.pth does not exist.*weights of resnet18"
    ):
        Classifier("resnet18", 7, backbone_ckpt="nowhere/resnet18.pth")


def test_cbam_and_head_have_the_larger_learning_rate(weights):
    module = Classifier("cbam/timm/resnet10t", 7, backbone_ckpt=str(weights), lr=1e-5, head_lr=1e-2)
    (block,) = [m for m in module.network.modules() if isinstance(m, CBAM)]
    groups = module.configure_optimizers()["optimizer"].param_groups
    fast = {id(p) for group in groups if group["lr"] == 1e-2 for p in group["params"]}
    assert fast == {id(p) for part in (block, module.network.fc) for p in part.parameters()}
    assert set(module.random_weights) == {n for n, _ in module.network.named_parameters() if "global_pool.0." in n}


def test_options_reach_the_backbone():
    module = Classifier("googlenet", 7, backbone_options={"dropout": 0.125, "init_weights": False})
    assert [m.p for m in module.network.modules() if isinstance(m, torch.nn.Dropout)][-1] == 0.125


def coloured(channels):
    data = SyntheticFundus(image_size=64, n_train=4, n_val=4, n_test=4, batch_size=2)
    data.channels = channels
    return data


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_images_with_other_channels_raise_one_sentence(weights, stage):
    message = r"^model.init_args.in_channels is 3, but images of SyntheticFundus have 1 channels; set it to 1\.$"
    with pytest.raises(ValueError, match=message):
        getattr(trainer(), stage)(Classifier("timm/resnet10t", 7, backbone_ckpt=str(weights)), datamodule=coloured(1))


def test_images_with_the_same_channels_can_be_trained_on():
    trainer(fast_dev_run=True).fit(Classifier("timm/resnet10t", 2), datamodule=coloured(3))


def test_top_error_counts_labels_outside_of_the_five_largest_logits():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6]])
    assert top_error(logits, torch.tensor([4, 5, 0])).tolist() == [0, 1, 1]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_loss_that_is_not_finite_raises_before_weights_change(weights, stage):
    module = Classifier("timm/resnet10t", 7, backbone_ckpt=str(weights))
    with torch.no_grad():
        module.network.fc.bias.fill_(torch.nan)
    name = {"fit": "train", "validate": "val"}.get(stage, stage)
    before = {key: value.clone() for key, value in module.state_dict().items() if "running" not in key}
    with pytest.raises(ValueError, match=rf"The {name} loss is nan in epoch 0, step 0, samples 0, 1, 2, 3: "):
        getattr(trainer(num_sanity_val_steps=0), stage)(module, loader())
    after = module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "weight" in k)
