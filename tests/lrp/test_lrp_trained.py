"""The defaults on a trained network: nearly all relevance arrives, and the report accounts for the rest."""

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from labn.lrp import Config, relevance

TRANSFORM = torchvision.transforms.Compose(
    [
        torchvision.transforms.Resize(256),
        torchvision.transforms.CenterCrop(224),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@pytest.fixture(scope="module")
def trained(data_root):
    weights = data_root / "imagenet" / "resnet50.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights} is not there")
    net = torchvision.models.resnet50()
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()})
    return net.eval()


@pytest.fixture(scope="module")
def photographs(data_root):
    files = sorted((data_root / "imagenet" / "images").iterdir())[::25]
    return torch.stack([TRANSFORM(Image.open(file).convert("RGB")) for file in files])


@pytest.mark.slow
@pytest.mark.data
def test_defaults_deliver_nearly_all_relevance_to_the_pixels(trained, photographs):
    targets = trained(photographs).argmax(1)
    result = relevance(trained, photographs, targets, report=True)
    share = result.arrived / result.initial
    assert (share > 0.999).all(), share
    assert (share <= 1 + 1e-6).all(), share
    assert torch.allclose(result.arrived + result.leaked, result.initial, rtol=1e-5)
    dead, eps = (sum(getattr(entry, name) for entry in result.entries) for name in ("dead", "eps"))
    assert torch.allclose(dead, result.leaked, atol=1e-5), "what is lost is lost in dead units"
    assert (eps.abs() < 1e-5).all()
    assert (result.relevance >= 0).all()


@pytest.mark.slow
@pytest.mark.data
def test_block_rule_does_not_conserve_but_its_report_adds_up(trained, photographs):
    x = photographs[:1].double()
    targets = trained(photographs[:1]).argmax(1)
    result = relevance(trained, x, targets, Config(residual="block"), report=True)
    scale = max(float(entry.leaks.abs() + entry.arriving.abs()) for entry in result.entries)
    assert float((result.arrived + result.leaked - result.initial).abs()) < 1e-6 * scale
    assert float(result.relevance.abs().sum() / result.initial) > 10
