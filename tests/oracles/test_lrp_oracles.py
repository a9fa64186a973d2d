"""Agreement with zennit and captum on networks where their rules are right: no residual sums, BatchNorm in place."""

import pytest
import torch
import torchvision
from torch import nn

from labn.lrp import Config, relevance


def vgg(seed=0):
    torch.manual_seed(seed)
    layers = torchvision.models.vgg.make_layers([8, "M", 12, 12, "M"])
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5)]
    net = nn.Sequential(*layers, *head).double().eval()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return net


def batch():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [1, 3]
    )


def by_zennit(rules, net, x, start):
    zennit = pytest.importorskip("zennit.composites", reason="zennit is not installed")
    types = pytest.importorskip("zennit.types")
    composite = zennit.LayerMapComposite(
        [(types.Activation, zennit.Pass()), (types.AvgPool, rules.Norm(stabilizer=1e-6)), (types.Linear, rules.chosen)]
    )
    x = x.clone().requires_grad_()
    with composite.context(net) as hooked:
        return torch.autograd.grad(hooked(x), x, start)[0]


@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma", "alphabeta"])
def test_relevance_of_a_vgg_equals_zennits(rule):
    rules = pytest.importorskip("zennit.rules", reason="zennit is not installed")
    net, (x, targets) = vgg(), batch()
    stabilised = {"stabilizer": 1e-6}
    rules.chosen = {
        "epsilon": lambda: rules.Epsilon(epsilon=1e-6),
        "zplus": lambda: rules.ZPlus(zero_params="bias", **stabilised),
        "gamma": lambda: rules.Gamma(gamma=0.25, **stabilised),
        "alphabeta": lambda: rules.AlphaBeta(alpha=2.0, beta=1.0, zero_params="bias", **stabilised),
    }[rule]()
    logits = net(x)
    targets = logits.argmax(1) if rule == "gamma" else targets  # zennit mirrors the rule at negative outputs
    assert (logits.gather(1, targets[:, None]) > 0).all() or rule != "gamma"
    start = torch.zeros_like(logits).scatter(1, targets[:, None], 1.0)
    expected = by_zennit(rules, net, x, start)
    config = Config(rule=rule, first_layer="same", eps=1e-6, eps_mode="absolute")
    got = relevance(net, x, targets, config, init="one").relevance
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_epsilon_relevance_of_a_vgg_equals_captums():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    from captum.attr._utils.lrp_rules import EpsilonRule

    net, (x, targets) = vgg(2), batch()
    for module in net.modules():
        if not list(module.children()):
            module.rule = EpsilonRule(epsilon=1e-9)
    expected = captum.LRP(net).attribute(x, targets)
    config = Config(rule="epsilon", first_layer="same", eps=1e-9, eps_mode="absolute")
    got = relevance(vgg(2), x, targets, config, init="logit").relevance
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
