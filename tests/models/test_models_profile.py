import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from labn.models import LambdaLayer, build_network
from labn.models.profile import count_flops, latency, profile


def test_flops_count_a_multiply_add_as_two():
    assert count_flops(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.ones(1, 3, 2, 2)) == 2 * 12 * 5
    assert count_flops(nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.ones(1, 3, 6, 5)) == 2 * 3 * 9 * 4 * 30


def test_resnet50_has_the_published_flops():
    flops = count_flops(resnet50(), torch.zeros(1, 3, 224, 224))
    assert flops / 2 == pytest.approx(4.09e9, rel=0.005)


@pytest.mark.parametrize("formulation", ["auto", "conv2d", "convolution", "query_first"])
def test_lambda_layer_is_counted_by_its_definition_whatever_runs(formulation):
    d, dk, heads, r, n = 8, 3, 2, 5, 36
    layer = LambdaLayer(d, dk, 1, heads, r, formulation=formulation)
    dv = d // heads
    qkv = d * (heads * dk + dk + dv) * n
    content = dk * dv * n + heads * dk * dv * n
    position = dk * dv * r * r * n + heads * dk * dv * n
    assert count_flops(layer, torch.zeros(1, d, 6, 6)) == 2 * (qkv + content + position)
    assert layer.formulation == formulation


def test_profile_restores_the_modes_of_the_network():
    network = build_network("lambda_resnet", 2, width=4, layers=(1,), r=3, heads=2).train()
    network.conv1.requires_grad_(False)
    before = {n: v.clone() for n, v in network.state_dict().items()}
    result = profile(network, torch.randn(3, 32, 32), repeats=2)
    assert result.parameters - result.trainable == 3 * 4 * 49
    assert result.parameters == sum(p.numel() for p in network.parameters())
    assert result.flops > 0
    assert result.latency > 0
    assert all(module.training for module in network.modules())
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())


def test_latency_raises_without_a_repeat():
    with pytest.raises(ValueError, match="repeats is 0"):
        latency(nn.Identity(), torch.zeros(1, 1, 1, 1), 0)
