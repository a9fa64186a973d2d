"""Rules by layer: conditions, presets, YAML, and agreement with zennit on a VGG16."""

import pytest
import torch
import yaml
from lrp_nets import images, plain, seeded
from torch import nn
from torchvision.models.vgg import VGG, cfgs, make_layers

from labn.explainers import LRP
from labn.lrp import COMPOSITES, Config, LayerRule, backward, forward, relevance
from labn.lrp.forward import rules_of

TARGETS = torch.tensor([0, 1])
LOW, HIGH = -3.0, 4.0


def vgg16(width=8):
    """torchvision's VGG16 with channels divided by `width` and a small head, in float64, with biases that are not 0."""
    layers = [size if isinstance(size, str) else size // width for size in cfgs["D"]]
    net = VGG(make_layers(layers), num_classes=3, init_weights=False)
    net.classifier = nn.Sequential(nn.Linear(512 // width * 49, 32), nn.ReLU(), nn.Linear(32, 3))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return net.double().eval()


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_gamma_box", "alpha2beta1_flat"])
def test_presets_agree_with_zennit_on_a_vgg16(name):
    composites = pytest.importorskip("zennit.composites", reason="zennit is not installed")
    box = {"low": torch.full((1, 3, 1, 1), LOW).double(), "high": torch.full((1, 3, 1, 1), HIGH).double()}
    theirs = {
        "epsilon_plus": composites.EpsilonPlus(),
        "epsilon_gamma_box": composites.EpsilonGammaBox(**box),
        "alpha2beta1_flat": composites.EpsilonAlpha2Beta1Flat(),
    }
    net, x = vgg16(), images(2, 32)
    leaf = x.clone().requires_grad_()
    with theirs[name].context(net) as hooked:
        out = hooked(leaf)
        expected = torch.autograd.grad(out, leaf, torch.eye(3).double()[:2])[0]
    # The stabiliser of the average pooling before the head is that of the configuration.
    config = Config(composite=name, low=(LOW,) * 3, high=(HIGH,) * 3, eps=1e-6, eps_mode="absolute")
    got = relevance(net, x, TARGETS, config, "one", report=True)
    assert torch.allclose(got.relevance, expected, atol=1e-9 * float(expected.abs().max()))
    booked = torch.stack([entry.leaks.abs() for entry in got.entries]).sum(0)
    assert ((got.arrived + got.leaked - 1).abs() < 1e-9 * (1 + booked)).all()


class Mixed(nn.Module):
    """One layer of every kind."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.depthwise(self.stem(x).relu()).flatten(2).mT
        query, key, value = (self.qkv(tokens) + 0).chunk(3, -1)
        return self.head(self.out((query @ key.mT).softmax(-1) @ value).relu().mean(1))


CONDITIONS = {
    "first": (LayerRule("flat", position="first"), ["stem"]),
    "last": (LayerRule("flat", position="last"), ["head"]),
    "conv": (LayerRule("flat", kind="conv"), ["stem", "depthwise"]),
    "depthwise": (LayerRule("flat", kind="depthwise"), ["depthwise"]),
    "linear": (LayerRule("flat", kind="linear"), ["qkv", "out", "head"]),
    "attention": (LayerRule("flat", kind="attention"), ["qkv", "out"]),
    "product": (LayerRule("flat", kind="product"), [""]),
    "lower half": (LayerRule("flat", depth=(0, 0.5)), ["stem", "depthwise", "qkv"]),
    "name": (LayerRule("flat", name="^(qkv|out)$"), ["qkv", "out"]),
    "two": (LayerRule("flat", kind="linear", depth=(0.9, 1)), ["head"]),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_selects_its_layers(name):
    rule, expected = CONDITIONS[name]
    net = seeded(Mixed())
    graph = forward(net, images(1, 8)).graph
    found = rules_of(graph, Config(composite=[rule]))
    assert [graph.nodes[index].call.module for index in found] == expected


def test_the_first_rule_that_fits_is_taken_and_the_rest_have_the_rules_of_the_configuration():
    net, x = seeded(Mixed()), images(1, 8)
    composite = [LayerRule("gamma", name="qkv", gamma=3.0), LayerRule("epsilon", kind="linear")]
    config = Config(composite=composite, gamma=1.0)
    graph = forward(net, x).graph
    names = {graph.nodes[i].call.module: (rule, own.gamma) for i, (rule, own) in rules_of(graph, config).items()}
    assert names == {"qkv": ("gamma", 3.0), "out": ("epsilon", 1.0), "head": ("epsilon", 1.0)}
    assert rules_of(graph, Config()) == {}


def test_a_composite_equals_the_same_rules_by_field():
    net, x = plain(True), images()
    by_layer = [LayerRule("ones", position="first"), LayerRule("epsilon", kind="linear"), LayerRule("zplus")]
    expected = relevance(net, x, TARGETS, Config(linear_rule="epsilon")).relevance
    assert torch.equal(relevance(net, x, TARGETS, Config(rule="flat", composite=by_layer)).relevance, expected)
    read = yaml.safe_load(
        "[{rule: ones, position: first}, {rule: epsilon, kind: linear}, {rule: zplus, depth: [0, 1]}]"
    )
    with pytest.warns(UserWarning, match="relevance arrives"):
        maps = LRP(composite=read)(net, x, TARGETS)
    assert torch.equal(maps, expected.sum(1).float())


def test_many_maps_of_one_image_have_the_rules_of_the_composite():
    net, x = plain(True), images(1)
    trace = forward(net, x, Config(composite="epsilon_plus"))
    seeds = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(backward(trace, seeds), torch.cat([backward(trace, seed[None]) for seed in seeds]))


def test_the_preset_for_transformers_closes_its_account():
    net, x = seeded(Mixed()), images(2, 8)
    found = relevance(net, x, TARGETS, Config(composite="attnlrp_vit"), "one", report=True)
    booked = torch.stack([entry.leaks.abs() for entry in found.entries]).sum(0)
    assert ((found.arrived + found.leaked - 1).abs() < 1e-9 * (1 + booked)).all()


@pytest.mark.parametrize(("composite", "words"), [
    ("epsilon", "not one of epsilon_plus"),
    ([{"rule": "zplus", "layer": "conv"}], "a layer rule has the fields"),
    ([{"kind": "conv"}], "needs rule"),
    ([{"rule": "plus"}], "rule='plus' of a layer rule"),
    ([{"rule": "zplus", "kind": "norm"}], "kind='norm' of a layer rule"),
    ([{"rule": "zplus", "depth": [0.5, 0.2]}], "two fractions"),
    ([{"rule": "zplus", "name": "("}], "not a regular expression"),
])  # fmt: skip
def test_a_wrong_composite_is_refused_naming_the_field(composite, words):
    with pytest.raises(ValueError, match=words):
        Config(composite=composite)


def test_presets_have_the_documented_names():
    assert list(COMPOSITES) == ["epsilon_plus", "epsilon_gamma_box", "alpha2beta1_flat", "attnlrp_vit"]
