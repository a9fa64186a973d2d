"""Properties of whole networks: the report adds up, the model is not changed, batches do not matter."""

import copy

import pytest
import timm
import torch
import torchvision
from lrp_nets import images, plain, seeded, small_resnet
from timm.models.vgg import VGG
from torch import nn

from labn.lrp import Config, plan, relevance

RESIDUALS = ["ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"]


def adds_up(result):
    scale = result.initial.abs() + torch.stack([e.arriving.abs() + e.leaks.abs() for e in result.entries]).amax(0)
    whole = (result.arrived + result.leaked - result.initial).abs() / scale
    single = torch.stack([(e.arriving - e.delivered - e.leaks).abs() for e in result.entries]).amax(0) / scale
    return float(torch.maximum(whole, single).max())


@pytest.mark.parametrize("rule", ["zplus", "epsilon", "lrp0", "alphabeta", "gamma"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("batchnorm", ["pass", "fold"])
def test_conservation_report_adds_up(rule, residual, batchnorm):
    config = Config(rule=rule, residual=residual, batchnorm=batchnorm, first_layer="alpha1beta0", eps=1e-6)
    result = relevance(small_resnet(1), images(2, 17), torch.tensor([1, 3]), config, report=True)
    assert adds_up(result) < 1e-9


@pytest.mark.parametrize("first", ["ones", "zbox", "alpha1beta0", "flat", "wsquare", "epsilon", "same"])
def test_conservation_report_adds_up_for_every_first_layer_rule(first):
    config = Config(first_layer=first, low=(-9.0,) * 3, high=(9.0,) * 3)
    result = relevance(small_resnet(1), images(2, 17), torch.tensor([1, 3]), config, report=True)
    assert adds_up(result) < 1e-11
    if first not in ("epsilon", "same"):
        assert torch.allclose(result.relevance.sum((1, 2, 3)), result.relevance.abs().sum((1, 2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("side", [65, 97, 129])
@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_resnet18_conserves_at_odd_sizes(side, residual):
    net = seeded(torchvision.models.resnet18(num_classes=10), 2)
    result = relevance(net, images(1, side), torch.tensor([4]), Config(residual=residual), "one", report=True)
    assert result.relevance.shape == (1, 3, side, side)
    assert adds_up(result) < 1e-9
    if residual == "ratio":
        assert (result.relevance >= 0).all()
        assert float(result.arrived / result.initial) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
@pytest.mark.parametrize("config", [Config(), Config(residual="block", block_weights="zplus")])
def test_torchvision_resnets_conserve(name, config):
    """Relevance in = out + reported leaks, in float64, with running statistics and biases that are not trivial."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=10).double().eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.3, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
    result = relevance(net, images(1, 64), torch.tensor([4]), config, "one", report=True)
    assert float((result.arrived + result.leaked - result.initial).abs()) < 1e-6
    assert adds_up(result) < 1e-6
    assert (result.relevance >= 0).all()


ARCHITECTURES = [
    "resnet18",
    "resnet50d",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "seresnet50",
    "ecaresnet50d",
    "resnetv2_50",
    "vgg11_bn",
]


def timm_network(name):
    """The named network; of the VGG a slim one with timm's convolutional head, the full one being all head."""
    if name != "vgg11_bn":
        return timm.create_model(name, num_classes=5)
    return VGG(cfg=[8, "M", 8, "M"], num_classes=5, norm_layer=nn.BatchNorm2d)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_timm_networks_conserve(name, residual):
    net = timm_network(name).eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.3, 1, generator=torch.Generator().manual_seed(0))
    x = images(1, 64).float()
    result = relevance(net, x, torch.tensor([2]), Config(residual=residual), report=True)
    assert torch.allclose(result.logits, net(x), atol=1e-4)
    assert adds_up(result) < 1e-5
    if residual == "ratio":
        assert float(result.arrived / result.initial) > 0.999


def test_lrp0_is_gradient_times_input_on_a_bias_free_relu_network():
    net, x = plain(), images(3, 11)
    config = Config(rule="lrp0", first_layer="same")
    leaf = x.clone().requires_grad_()
    targets = torch.tensor([0, 1, 2])
    gradient = torch.autograd.grad(net(leaf).gather(1, targets[:, None]).sum(), leaf)[0]
    assert torch.allclose(relevance(net, x, targets, config, init="logit").relevance, gradient * x, atol=1e-12)


def test_block_rule_on_a_bias_free_network_is_gradient_times_activation():
    net = small_resnet(2, biased=False)
    config = Config(residual="block", rule="lrp0", first_layer="same", batchnorm="fold", eps=1e-14)
    x, targets = images(2, 17), torch.tensor([1, 3])
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(net(leaf).gather(1, targets[:, None]).sum(), leaf)[0]
    assert torch.allclose(relevance(net, x, targets, config, init="logit").relevance, gradient * x, atol=1e-8)


@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_batches_chunks_and_second_calls_give_the_same_maps(residual):
    net, x, targets = small_resnet(3), images(5, 17), torch.tensor([0, 1, 2, 3, 0])
    config = Config(residual=residual)
    whole = relevance(net, x, targets, config)
    assert torch.equal(whole.relevance, relevance(net, x, targets, config).relevance)
    for size in (1, 2, 4):
        parts = relevance(net, x, targets, config, chunk_size=size, report=True)
        assert torch.allclose(whole.relevance, parts.relevance, rtol=1e-9, atol=1e-13)
        assert all(len(entry.arriving) == 5 for entry in parts.entries)


def test_propagation_does_not_change_the_model():
    net = small_resnet(4).train()
    net.third.one_norm.eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    fired = []
    handle = net.head.register_forward_hook(lambda *_: fired.append(1))
    for residual in ("ratio", "block"):
        relevance(net, images(), torch.tensor([0, 1]), Config(residual=residual), report=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "head.weight")
    assert list(net.head._forward_hooks) == [handle.id]
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_prepared_weights_serve_every_image_size():
    """Neither the number of layers nor that of prepared weights grows with the number of image sizes."""
    net, targets = torchvision.models.resnet18(num_classes=3).eval(), torch.tensor([0])
    sizes = []
    for side in (32, 33, 40, 48, 56, 64):
        relevance(net, torch.randn(1, 3, side, side), targets)
        layers = plan.plans_of(net).layers.values()
        sizes.append((len(layers), sum(len(layer._prepared) + len(layer._packed) for layer in layers)))
    assert set(sizes) == {sizes[0]}


@pytest.mark.parametrize("edit", ["step", "data", "replace", "activation", "hook"])
def test_prepared_weights_follow_the_model(edit):
    """A second call uses new weights, also those written through `.data`, which leaves the version counter alone."""
    net, x, targets = plain(biased=True), images(), torch.tensor([0, 1])
    old = relevance(net, x, targets).relevance
    with torch.no_grad():
        if edit == "step":
            net[0].weight[0, 0, 1, 1] += 1
        elif edit == "data":
            net[0].weight.data.mul_(torch.linspace(0.5, 2, 4, dtype=torch.float64).view(4, 1, 1, 1))
        elif edit == "replace":
            net[7] = seeded(nn.Linear(5, 6), 9)
        elif edit == "hook":
            net[0].register_forward_hook(lambda *arguments: arguments[-1] * torch.linspace(0.5, 2, 4).view(4, 1, 1))
        else:
            net[1] = nn.Identity()
    new = relevance(net, x, targets).relevance
    assert not torch.allclose(old, new)
    assert torch.equal(new, relevance(copy.deepcopy(net), x, targets).relevance)


def test_float32_model_with_float64_images_computes_in_float64():
    net = plain(biased=True)
    exact = relevance(net, images(), torch.tensor([0, 1])).relevance
    single = copy.deepcopy(net).float()
    got = relevance(single, images(), torch.tensor([0, 1])).relevance
    assert got.dtype == torch.float64
    assert torch.allclose(got, exact, rtol=1e-4)
    assert next(single.parameters()).dtype == torch.float32
