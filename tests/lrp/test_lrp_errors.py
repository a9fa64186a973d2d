"""Networks with a layer without rule are refused with its name; no part of them is explained."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from lrp_nets import images, plain, small_resnet
from torch import nn

from labn.lrp import Config, backward, forward, relevance


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), inner, nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.trunk(x).mean((2, 3)))


class Logarithm(nn.Module):
    def forward(self, x):
        return x.exp().log()


@pytest.mark.parametrize(("layer", "words"), [
    (Logarithm(), r"'trunk.1' \(Logarithm, log\)"),
    (nn.ConvTranspose2d(4, 4, 3, padding=1), r"'trunk.1' \(ConvTranspose2d, conv_transpose2d\)"),
    (nn.BatchNorm2d(4, track_running_stats=False), r"'trunk.1' \(BatchNorm2d, batch_norm\)"),
])  # fmt: skip
@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_layer_without_a_rule_is_named(layer, words, residual):
    with pytest.raises(NotImplementedError, match=words):
        relevance(Wrapped(layer).eval(), images().float(), torch.tensor([0, 1]), Config(residual=residual))


@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_unknown_block_in_a_resnet_is_named(residual):
    net = torchvision.models.resnet18(num_classes=3).eval()
    net.layer3[1].bn2 = nn.Sequential(nn.BatchNorm2d(256), Logarithm())
    with pytest.raises(NotImplementedError, match=r"'layer3.1.bn2.1' \(Logarithm, log\)"):
        relevance(net, images(1, 64).float(), torch.tensor([0]), Config(residual=residual))


def test_logits_behind_a_softmax_that_counts_as_a_constant_are_refused():
    net = nn.Sequential(plain(), nn.Softmax(1))
    with pytest.raises(NotImplementedError, match=r"Relevance ends at '1' \(Softmax, softmax\)"):
        relevance(net, images(1), torch.tensor([0]))


class ThroughNumpy(nn.Module):
    def forward(self, x):
        means = x.mean((2, 3))
        return means + torch.from_numpy(np.exp(means.detach().numpy()))


class BranchesOnPixels(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x[0, 0, 0, 0] < x[0, 0, 0, -1] else -2 * x.amax((2, 3))


@pytest.mark.parametrize("net", [ThroughNumpy(), BranchesOnPixels()])
def test_forward_pass_that_a_recording_cannot_repeat_is_refused(net):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    x[..., 0, 0], x[..., 0, -1] = 0.0, 3.0
    with pytest.raises(ValueError, match="does not repeat its logits on other images"):
        relevance(net, x, torch.tensor([0, 1]))


class Cancelling(nn.Module):
    """Logits that are small differences of large sums, in which single precision errs by more than 1e-3."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
        self.head = nn.Linear(64, 4)
        self.body[1].running_mean.normal_(0.0, 3.0)
        nn.init.constant_(self.body[1].bias, 3e4)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        # The weights of the constant 3e4 are taken off again, up to the rounding of the sums above.
        constant = 3e4 * self.body[3].weight.sum((1, 2, 3)) + self.body[3].bias
        return self.head(x - constant)


def test_networks_with_large_errors_of_their_own_are_not_taken_for_branching_ones():
    """ConvMixer at 224 pixels errs so in single precision; the float64 error of the model itself sets the limit."""
    net, x = Cancelling().eval(), torch.randn(2, 3, 9, 9)
    double = copy.deepcopy(net).double()(x.double())
    assert float(((net(x) - double).abs().max() / double.abs().max()).detach()) > 5e-4
    result = relevance(net, x, torch.tensor([0, 1]))
    assert result.relevance.isfinite().all()


def test_logits_that_do_not_depend_on_the_images_are_refused():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2)

    with pytest.raises(ValueError, match="logits of Constant do not depend on the images"):
        relevance(Constant(), images(), torch.tensor([0, 1]))


@pytest.mark.parametrize(("arguments", "words"), [
    ({"rule": "plus"}, "rule='plus'"),
    ({"residual": "both"}, "residual='both'"),
    ({"batchnorm": "skip"}, "batchnorm='skip'"),
    ({"first_layer": "zero"}, "first_layer='zero'"),
    ({"alpha": 2.0, "beta": 0.0}, "alpha - beta must be 1"),
    ({"eps": -1.0}, "must not be negative"),
])  # fmt: skip
def test_error_of_a_wrong_config_names_the_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        Config(**arguments)


def test_wrong_init_target_and_bounds_are_refused():
    with pytest.raises(ValueError, match="init='softmax'"):
        relevance(plain(), images(), torch.tensor([0, 1]), init="softmax")
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.2, got 0\.\.3"):
        relevance(plain(), images(), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="low and high for each of the 3 image channels"):
        relevance(plain(), images(), torch.tensor([0, 1]), Config(first_layer="zbox", low=(0.0,), high=(1.0,)))


def test_average_pooling_rule_refuses_a_dilated_max_pool():
    net = nn.Sequential(nn.MaxPool2d(2, dilation=2), nn.Flatten())
    with pytest.raises(ValueError, match="dilated max pool '0'"):
        relevance(net, images(1, 6), torch.tensor([0]), Config(pooling="average"))


def test_unknown_and_unreachable_modules_are_refused():
    trace = forward(small_resnet(), images(1, 16))
    start = torch.ones_like(trace.logits)
    with pytest.raises(KeyError, match="'layer9'"):
        backward(trace, start, until="layer9")
    with pytest.raises(ValueError, match="does not lie below"):
        backward(trace, {"first": torch.ones(1, 6, 8, 8, dtype=torch.float64)}, until="second")


@pytest.mark.parametrize(("earlier", "now"), [
    ({"rule": "simple"}, {"rule": "lrp0"}),
    ({"linear_rule": "simple"}, {"linear_rule": "lrp0"}),
    ({"first_layer": "zb"}, {"first_layer": "zbox"}),
    ({"first_layer": "input"}, {"first_layer": "alpha1beta0"}),
    ({"first_layer": "w2", "rule": "simple"}, {"first_layer": "wsquare", "rule": "lrp0"}),
])  # fmt: skip
def test_the_earlier_name_of_a_rule_becomes_its_name_with_one_warning(earlier, now):
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        config = Config(**earlier)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert config == Config(**now)


class SharedMatrix(nn.Module):
    """One matrix with two biases, and as its own transpose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = self.two(self.one(x.flatten(1)).relu()).relu()
        return self.head(nn.functional.linear(x, self.one.weight.mT).relu())


def test_layers_that_share_a_weight_keep_their_own_biases_and_order():
    net, x = SharedMatrix().double().eval(), images(2, 2)
    config = Config(rule="epsilon", first_layer="same", eps=1e-12)
    result = relevance(net, x, torch.tensor([1, 1]), config, init="logit")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    assert torch.allclose(result.relevance, gradient * x, atol=1e-9)
