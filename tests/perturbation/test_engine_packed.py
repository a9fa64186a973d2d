"""Fast copies with packed convolutions."""

import copy

import pytest
import torch
from torch import nn

from labn.explainers import RISE, ScoreCAM
from labn.inference.fast_copy import fast_copy
from labn.inference.packing import PackedConv2d, can_pack
from labn.models.attention_branch import AttentionBranchNetwork
from labn.perturbation.engine import PerturbationEngine

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


class Guarded(nn.Module):
    """A network that keeps its last convolution in float32 under autocast, as LABN keeps its attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.guarded = nn.Conv2d(4, 5, 3), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        hidden = self.features(x).relu()
        with torch.autocast("cpu", enabled=False):
            return self.guarded(hidden.float()).mean((2, 3))


@pytest.mark.skipif(not can_pack(PROBE, torch.bfloat16), reason="this machine has no bfloat16 convolutions")
def test_a_layer_that_the_model_keeps_outside_of_autocast_is_not_reduced():
    model, images = Guarded().eval(), torch.randn(3, 4, 12, 10, generator=torch.Generator().manual_seed(1))
    copied = fast_copy(model, PROBE, dtype=torch.bfloat16).copy
    assert copied.features.dtype == torch.bfloat16
    assert copied.guarded.dtype == torch.float32
    plain, packed = (PerturbationEngine(net, images, precision="bf16").original() for net in (model, copied))
    exact = PerturbationEngine(model, images).original()
    assert torch.allclose(packed, plain, atol=2e-3)
    # bfloat16 has 8 bits: rounded logits would have no more.
    assert not torch.equal(packed, packed.bfloat16().float())
    assert torch.allclose(packed, exact, atol=2e-2)


@pytest.mark.skipif(not can_pack(PROBE, torch.bfloat16), reason="this machine has no bfloat16 convolutions")
def test_a_gate_opens_the_same_positions_in_reduced_precision_with_and_without_packing():
    torch.manual_seed(0)
    model = AttentionBranchNetwork("resnet18", num_classes=2, split=4, open_share=0.2).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        model.attention_branch.attention_head[-2].weight.fill_(0.02)  # a flat map, whose values bfloat16 would tie
        copied = fast_copy(model, images, dtype=torch.bfloat16).copy
        with torch.autocast("cpu", torch.bfloat16):
            plain, packed = (
                model(images).attention,
                copied(images.contiguous(memory_format=torch.channels_last)).attention,
            )
    assert plain.dtype == packed.dtype == torch.float32
    assert len(packed.unique()) > 0.9 * packed.numel()
    open_plain, open_packed = (a > model.threshold(a) for a in (plain, packed))
    assert (open_plain == open_packed).float().mean() > 0.9


def test_results_in_reduced_precision_have_another_revision_than_those_of_earlier_versions():
    assert (RISE(precision="bf16").revision, RISE().revision) == (1, 0)
    assert (ScoreCAM(precision="bf16").revision, ScoreCAM().revision) == (1, 0)
