"""`batchnorm="fold"` where no linear layer precedes the BatchNorm, as in DenseNet and pre-activation ResNets."""

import pytest
import torch
from lrp_nets import images, seeded
from test_lrp_rules import EPS, dense_epsilon, dense_zplus, matrix_of, stable
from torch import nn
from torchvision.models import DenseNet
from torchvision.ops import FrozenBatchNorm2d

import labn
from labn.lrp import Config, backward, forward, relevance

EPSILON = {"rule": "epsilon", "first_layer": "same", "batchnorm": "fold", "eps": 1e-12}


def affine_of(norm):
    """(C,) scale and shift of a BatchNorm in eval mode."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale.detach(), (norm.bias - norm.running_mean * scale).detach()


@pytest.mark.filterwarnings("ignore:.* of the relevance arrives")  # the biases of a small network keep most of it
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("between", [nn.ReLU(), nn.Identity(), nn.AvgPool2d(2)])
def test_epsilon_rule_is_gradient_times_input(padding, between):
    """On a piecewise linear network z = sum_i a_i dz/da_i + b at every layer, so that LRP-epsilon is x dy/dx."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4), between,
        nn.Conv2d(4, 5, 2, padding=padding), nn.ReLU(), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(5), nn.Linear(5, 3),
    )  # fmt: skip
    seeded(net, 11)
    net[3].weight.data[:2] *= -1
    x = images(2, 12)
    expected = labn.explain(net, x, "gradxinput", 1).maps
    got = labn.explain(net, x, "lrp", 1, init="logit", **EPSILON).maps
    assert torch.allclose(got, expected, atol=1e-9 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("rule", ["zplus", "epsilon", "gamma", "alphabeta", "lrp0"])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_norm_read_by_an_unpadded_layer_is_folded_into_it(rule, kind):
    """The twin has the weights w g and the bias w c + b written out."""
    if kind == "convolution":
        norm, layer, path = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), [nn.Dropout()]
        where = torch.arange(4).view(2, 1, 2, 1, 1).expand(2, 3, 2, 3, 3).reshape(6, 2, 3, 3)
    else:
        norm, layer, path = nn.BatchNorm2d(4), nn.Linear(4 * 25, 6), [nn.Flatten(), nn.Dropout()]
        where = torch.arange(4).repeat_interleave(25).expand(6, -1)
    head = [nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), norm, *path, layer, *head)
    net(torch.zeros(1, 3, 7, 7))
    seeded(net, 5)
    norm.weight.data[1] *= -1
    scale, shift = affine_of(norm)
    folded = type(layer)(4, 6, 3, groups=2) if kind == "convolution" else nn.Linear(100, 6)
    folded.double()
    folded.weight.data = layer.weight.data * scale[where]
    folded.bias.data = layer.bias.data + (layer.weight.data * shift[where]).flatten(1).sum(1)
    twin = nn.Sequential(net[0], net[1], *path, folded, *head).eval()
    x, config = images(2, 7), Config(rule=rule, batchnorm="fold")
    assert torch.allclose(net(x), twin(x))
    got, expected = (relevance(n, x, torch.tensor([0, 2]), config, "one", report=True) for n in (net, twin))
    assert torch.allclose(got.relevance, expected.relevance, atol=1e-12)
    assert torch.allclose(got.initial, got.arrived + got.leaked, atol=1e-12)


@pytest.mark.parametrize("rule", ["zplus", "epsilon"])
def test_norm_before_a_padded_layer_is_a_layer_with_the_epsilon_rule(rule):
    norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
    net = seeded(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), norm, conv, nn.Flatten()), 3)
    x = images(1, 4)
    r = torch.rand(1, 64, dtype=torch.float64)
    a = net[:3](x).detach()
    w, b, _ = matrix_of(conv, (3, 4, 4))
    dense = dense_zplus if rule == "zplus" else dense_epsilon
    scale, shift = (v.repeat_interleave(16) for v in affine_of(norm))
    at_norm = dense(scale * a.flatten() + shift, w, b, r[0])
    expected = scale * a.flatten() * at_norm / stable(scale * a.flatten() + shift)
    trace = forward(net, x, Config(rule=rule, batchnorm="fold", eps=EPS, eps_mode="absolute"))
    assert torch.allclose(backward(trace, r, until="2").flatten(), expected, atol=1e-11)


class TwoReaders(nn.Module):
    """A BatchNorm that two layers read, over the raw pixels."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(x)
        return self.head((self.one(x) + self.two(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("first", ["epsilon", "same", "ones", "alpha1beta0"])
def test_norm_of_the_pixels_books_its_bias_only_under_rules_that_divide_by_them(first):
    net, x = seeded(TwoReaders(), 2), images(2, 6)
    config = Config(rule="epsilon", batchnorm="fold", first_layer=first)
    got = relevance(net, x, torch.tensor([0, 1]), config, "one", report=True)
    assert torch.allclose(got.initial, got.arrived + got.leaked, atol=1e-9)
    booked = [entry for entry in got.entries if entry.name.startswith("'norm'")]
    assert [bool(entry.bias.abs().min() > 0) for entry in booked] == [True] * (first in ("epsilon", "same"))


def test_densenet_accounts_for_all_relevance():
    torch.manual_seed(0)
    net = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=3)
    net, x = seeded(net), images(1, 32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    passed, folded = (
        relevance(net, x, torch.tensor([1]), Config(rule="epsilon", batchnorm=mode), "one", report=True)
        for mode in ("pass", "fold")
    )
    assert torch.allclose(folded.initial, folded.arrived + folded.leaked, atol=1e-9)
    assert not torch.allclose(folded.relevance, passed.relevance)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Written(nn.Module):
    """A convolution that is read by a frozen BatchNorm, another BatchNorm directly behind one, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
            nn.BatchNorm2d(5), nn.ReLU(), FrozenBatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.* of the relevance arrives")
def test_norms_written_out_and_in_a_row_are_gradient_times_input_too():
    net, x = seeded(Written(), 4), images(2, 10)
    for norm in net.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight[:2] *= -1
    expected = labn.explain(net, x, "gradxinput", 1).maps
    got = labn.explain(net, x, "lrp", 1, init="logit", **EPSILON).maps
    assert float(expected.abs().max()) > 0
    assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-4)
