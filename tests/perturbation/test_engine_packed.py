"""Fast copies with packed convolutions."""

import copy

import pytest
import torch
from torch import nn

from labn.inference.fast_copy import fast_copy
from labn.inference.packing import PackedConv2d, can_pack

PROBE = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.skipif(not can_pack(PROBE, torch.float32), reason="this build of PyTorch has no oneDNN")


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": (2, 1)}, {"groups": 2, "bias": False}, {"kernel_size": 1}],
)
def test_a_packed_convolution_equals_the_plain_one_for_any_batch(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **{"kernel_size": 3, **options})
    packed = PackedConv2d(conv, (8, 4, 12, 10), torch.float32)
    with torch.no_grad():
        for batch in (1, 3, 8, 17):
            x = torch.randn(batch, 4, 12, 10).contiguous(memory_format=torch.channels_last)
            assert torch.allclose(packed(x), conv(x), atol=1e-5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_the_copy_is_packed_and_the_model_is_not_changed():
    model = network()
    weights = copy.deepcopy(model.state_dict())
    prepared = fast_copy(model, PROBE)
    assert prepared.form.packed
    assert sum(isinstance(module, PackedConv2d) for module in prepared.copy.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(prepared.copy(PROBE), model(PROBE), atol=1e-6)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())


def test_a_hooked_or_reflecting_convolution_is_not_packed():
    model = network()
    model[2] = nn.Conv2d(5, 5, 3, padding=1, padding_mode="reflect")
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    prepared = fast_copy(model, PROBE)
    with torch.no_grad():
        assert torch.allclose(prepared.copy(PROBE), model(PROBE), atol=1e-6)
    assert not any(isinstance(module, PackedConv2d) for module in prepared.copy.modules())


def test_float64_is_not_packed():
    assert not can_pack(PROBE.double(), torch.float64)
    assert not fast_copy(network().double(), PROBE.double()).form.packed
