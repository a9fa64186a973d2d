"""Padding, pooling and resizing of the pixels, before the first convolution."""

import pytest
import torch
import torch.nn.functional as F
from lrp_nets import images, matrix_of, seeded
from test_lrp_network import adds_up
from torch import nn

from labn.lrp import Config, ConservationReport, backward, forward, relevance

FIRST = ["ones", "zbox", "alpha1beta0", "flat", "wsquare", "epsilon", "same"]
BOUNDS = {"low": (-9.0,) * 3, "high": (9.0,) * 3}
BEFORE = {
    "resize": nn.Upsample(size=(9, 7), mode="bilinear"),
    "shrink": nn.Upsample(size=(3, 4), mode="bilinear"),
    "average": nn.AvgPool2d(3, 2, padding=1),
    "adaptive": nn.AdaptiveAvgPool2d(4),
    "pad": nn.ZeroPad2d((1, 1, 0, 1)),
    "pad and average": nn.Sequential(nn.ZeroPad2d(2), nn.AvgPool2d(2)),
}


class Net(nn.Module):
    def __init__(self, before, padding=1):
        super().__init__()
        self.before, self.conv, self.head = before, nn.Conv2d(3, 4, 3, padding=padding), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(self.before(x))).mean((2, 3)))


@pytest.mark.parametrize("name", BEFORE)
def test_ones_is_the_rule_of_both_steps_together(name):
    """R_i = sum_jk c_ij w+_jk R_k / sum_i'j' c_i'j' w+_j'k, independent of the pixels."""
    before, shape = BEFORE[name].double(), (3, 6, 5)
    spread, _, between = matrix_of(before, shape)
    conv = seeded(nn.Conv2d(3, 4, 3, padding=1), 3)
    weights, bias, _ = matrix_of(conv, between)
    r = torch.rand(2, len(bias), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    trace = forward(nn.Sequential(before, conv, nn.Flatten()), images(2, 6)[..., :5], Config(eps=0.0))
    plus = weights.clamp(min=0) @ spread
    total = plus.sum(1)
    expected = torch.where(total > 0, r / total.where(total > 0, torch.ones(())), 0.0) @ plus
    conservation = ConservationReport()
    got = backward(trace, r, conservation=conservation)
    assert torch.allclose(got.flatten(1), expected, atol=1e-12)
    assert torch.allclose(backward(trace, r).flatten(1), expected, atol=1e-12)
    assert all(torch.allclose(e.arriving, e.delivered + e.leaks, atol=1e-12) for e in conservation.entries)


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_conservation_report_adds_up_with_operations_before_the_first_layer(name, first, residual):
    net = seeded(Net(BEFORE[name]), 4)
    config = Config(first_layer=first, residual=residual, **BOUNDS)
    result = relevance(net, images(2, 8), torch.tensor([0, 2]), config, report=True)
    assert adds_up(result) < 1e-9
    if first in ("ones", "flat", "wsquare"):
        assert (result.relevance >= 0).all()
        assert torch.allclose(result.arrived, result.initial, rtol=1e-6)


@pytest.mark.parametrize("first", FIRST)
def test_separate_padding_equals_padding_inside_the_convolution(first):
    config = Config(first_layer=first, **BOUNDS)
    inside, outside = seeded(Net(nn.Identity(), 1), 5), seeded(Net(nn.ZeroPad2d(1), 0), 5)
    x, chosen = images(2, 8), torch.tensor([0, 1])
    x[:, :, :4] = 0
    results = [relevance(net, x, chosen, config) for net in (inside, outside)]
    assert torch.allclose(results[0].relevance, results[1].relevance, atol=1e-14)


@pytest.mark.parametrize(
    "before", [nn.ConstantPad2d(2, 2.0), nn.Sequential(nn.ConstantPad2d(1, -1.0), nn.AvgPool2d(2))]
)
def test_zbox_gives_no_share_to_a_filled_border_and_no_negative_share_to_a_pixel(before):
    """The transformed bounds enclose the transformed pixels, so that a w - l w+ - h w- >= 0."""
    for seed in range(5):
        net = nn.Sequential(before, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        result = relevance(
            seeded(net, seed),
            images(2, 8).clamp(-1.5, 1.5),
            torch.tensor([0, 3]),
            Config(first_layer="zbox", low=(-1.5,) * 3, high=(1.5,) * 3),
            report=True,
        )
        assert (result.relevance >= 0).all()
        assert adds_up(result) < 1e-9


class Scaled(nn.Module):
    """(x - shift) / scale, with a negative scale too, before the network."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("shift", torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.2, -0.25, 0.3], dtype=torch.float64).view(1, 3, 1, 1))

    def forward(self, x):
        return self.net((x - self.shift) / self.scale)


def normed(net):
    """The same normalisation as a BatchNorm, except for the sign of the scale."""
    norm = nn.BatchNorm2d(3, eps=0.0, affine=False).double()
    norm.running_mean.copy_(Scaled(net).shift.flatten())
    norm.running_var.copy_(Scaled(net).scale.flatten() ** 2)
    return nn.Sequential(norm, net).eval()


@pytest.mark.parametrize("first", ["ones", "zbox", "alpha1beta0", "flat", "wsquare"])
@pytest.mark.parametrize("inside", [Scaled, normed])
def test_normalisation_inside_the_network_equals_normalisation_outside(first, inside):
    net, x, chosen = (
        seeded(Net(nn.AvgPool2d(2)), 7),
        torch.rand(2, 3, 12, 12, dtype=torch.float64),
        torch.tensor([0, 2]),
    )
    scaled = Scaled(net)
    scale = scaled.scale if inside is Scaled else scaled.scale.abs()
    ends = torch.stack([(end - scaled.shift) / scale for end in (0.0, 1.0)]).flatten(1)
    low, high = (tuple(end.tolist()) for end in (ends.amin(0), ends.amax(0)))
    outside = relevance(net, (x - scaled.shift) / scale, chosen, Config(first_layer=first, low=low, high=high))
    found = relevance(inside(net), x, chosen, Config(first_layer=first, low=(0.0,) * 3, high=(1.0,) * 3))
    assert torch.allclose(found.relevance, outside.relevance, atol=1e-14)
    assert first != "zbox" or (found.relevance >= 0).all()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_relevance_of_a_copied_border_returns_to_its_source(mode):
    conv = seeded(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), 6)
    result = relevance(nn.Sequential(conv, nn.Flatten()), images(2, 6), torch.tensor([3, 20]), report=True)
    assert adds_up(result) < 1e-12
    assert torch.allclose(result.arrived, result.initial)


def test_relevance_of_a_filled_border_between_layers_is_reported_as_dead():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 2, 3), nn.Flatten())
    result = relevance(seeded(net, 7), images(2, 8), torch.tensor([0, 5]), report=True)
    assert adds_up(result) < 1e-9
    padding = next(entry for entry in result.entries if "pad" in entry.name)
    assert (padding.dead > 0).all()


def test_border_below_every_value_keeps_no_relevance():
    """Padding with minus infinity before a max pool, as networks ported from TensorFlow do."""
    outside = nn.Sequential(nn.ConstantPad2d(1, float("-inf")), nn.MaxPool2d(3, 2))
    nets = [
        seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 2, 3), nn.Flatten()), 8)
        for pool in (nn.MaxPool2d(3, 2, padding=1), outside)
    ]
    maps = [relevance(net, images(2, 9), torch.tensor([0, 3])).relevance for net in nets]
    assert maps[0].abs().sum() > 0
    assert torch.allclose(maps[0], maps[1], atol=1e-14)


def test_many_relevance_maps_of_one_image_equal_single_maps():
    net = seeded(Net(nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(2))), 9)
    x, seeds = images(1, 8), torch.eye(3, dtype=torch.float64)
    maps = backward(forward(net, x), seeds)
    single = torch.cat([backward(forward(net, x), seed[None]) for seed in seeds])
    assert torch.allclose(maps, single, atol=1e-14)


def test_average_pooling_rule_applies_to_a_max_pool_on_pixels():
    net = seeded(Net(nn.MaxPool2d(2)), 10)
    result = relevance(net, images(2, 8), torch.tensor([0, 1]), Config(pooling="average"), report=True)
    assert adds_up(result) < 1e-9
    blocks = result.relevance.unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.allclose(blocks, blocks[..., :1, :1].expand_as(blocks), atol=1e-14)
