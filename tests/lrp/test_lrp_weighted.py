"""A user's own product of two values that depend on the image, and linear layers whose output is split."""

import pytest
import torch
from lrp_nets import images, seeded
from torch import nn

from labn.lrp import Config, backward, forward, relevance
from labn.lrp.plan import plan_for
from labn.lrp.rules.elementary import stabiliser
from labn.lrp.weight_transforms import Flat, Gamma, Identity, Negative, Positive, Square
from labn.lrp.weighted_product import Dense, Weights, weighted


class Attention(nn.Module):
    """Softmax attention over positions; `frozen` replaces the attention by given constants."""

    def __init__(self, width=4, dense=Dense):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.dense, self.frozen = dense, None

    def forward(self, x):
        query, key, value = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        attention = (query @ key.transpose(1, 2)).softmax(-1)
        mixed = weighted(value, self.dense, attention if self.frozen is None else self.frozen)
        return mixed.transpose(1, 2).unflatten(2, x.shape[2:])


def network(middle, width=4):
    """A convolution, the layer in question, a residual sum, and a head."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.middle, self.head = nn.Conv2d(3, width, 3, padding=1), middle, nn.Linear(width, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(x + self.middle(x)).mean((2, 3)))

    return seeded(Net(), 2)


def test_weighted_equals_the_plain_product_and_its_gradients():
    value = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    found, wanted = weighted(value, Dense, attention), attention @ value
    assert torch.equal(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (value, attention)) for y in (found, wanted))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["zplus", "epsilon", "lrp0", "alphabeta", "gamma", "flat"])
@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_attention_is_read_as_a_linear_layer_with_these_weights(rule, residual):
    """A network whose attention is constant, equal to this image's, has the same relevance."""
    net, x = network(Attention()), images(1, 6)
    config = Config(rule=rule, residual=residual)
    found = relevance(net, x, torch.tensor([1]), config, "one", report=True)
    scale = max(float(entry.arriving.abs() + entry.leaks.abs()) for entry in found.entries)
    assert float((found.arrived + found.leaked - found.initial).abs()) < 1e-9 * scale
    tokens = torch.relu(net.stem(x)).flatten(2).transpose(1, 2)
    query, key, _ = net.middle.qkv(tokens).chunk(3, -1)
    net.middle.frozen = (query @ key.transpose(1, 2)).softmax(-1).detach()
    frozen = relevance(net, x, torch.tensor([1]), config, "one")
    assert torch.allclose(found.relevance, frozen.relevance, atol=1e-9 * scale)


@pytest.mark.parametrize("rule", ["zplus", "epsilon"])
def test_relevance_of_values_shared_by_heads_adds_up(rule):
    """Broadcasting a value equals copying it: its relevance is the sum over its copies."""

    class Heads(nn.Module):
        def __init__(self, copied):
            super().__init__()
            self.query, self.value, self.copied = nn.Linear(4, 8), nn.Linear(4, 4), copied

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            query = self.query(tokens).unflatten(2, (2, 4)).transpose(1, 2)
            attention = (query @ tokens.transpose(1, 2).unsqueeze(1)).softmax(-1)
            value = self.value(tokens).unsqueeze(1)
            mixed = weighted(value.expand(-1, 2, -1, -1) if self.copied else value, Dense, attention)
            return mixed.sum(1).transpose(1, 2).unflatten(2, x.shape[2:])

    x, targets = images(2, 6), torch.tensor([1, 0])
    found, wanted = (relevance(network(Heads(copied)), x, targets, Config(rule=rule)) for copied in (False, True))
    assert torch.allclose(found.relevance, wanted.relevance, atol=1e-12)


BESIDE = {
    "weighted": lambda x, h, constant: weighted(x, Dense, constant) + h,
    "product": lambda x, h, constant: x * constant + h,
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("block_weights", ["signed", "zplus"])
def test_constants_keep_their_true_value_where_they_also_carry_relevance(name, block_weights):
    """One value inside a block carries relevance and is a constant too: the result is that of a fixed constant."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.frozen = nn.Conv2d(4, 4, 3, padding=1), None

        def forward(self, x):
            h = torch.relu(self.conv(x))
            h = h.mean((2, 3), keepdim=True) if name == "product" else h
            return BESIDE[name](x, h, h if self.frozen is None else self.frozen)

    net, x = network(Middle()), images(1, 6)
    config = Config(residual="block", block_weights=block_weights)
    found = relevance(net, x, torch.tensor([1]), config, "one", report=True)
    made = torch.relu(net.middle.conv(torch.relu(net.stem(x)))).detach()
    net.middle.frozen = made.mean((2, 3), keepdim=True) if name == "product" else made
    wanted = relevance(net, x, torch.tensor([1]), config, "one")
    assert torch.allclose(found.relevance, wanted.relevance, atol=1e-12)
    assert torch.allclose(found.arrived + found.leaked, found.initial, atol=1e-9)


def test_transposes_by_attribute_are_recorded():
    class Short(Attention):
        def forward(self, x):
            query, key, value = self.qkv(x.flatten(2).mT).chunk(3, -1)
            mixed = weighted(value, self.dense, (query @ key.mT).softmax(-1))
            return mixed.mT.unflatten(2, x.shape[2:])

    x, targets = images(2, 6), torch.tensor([1, 0])
    found, wanted = (relevance(network(middle), x, targets).relevance for middle in (Short(), Attention()))
    assert torch.equal(found, wanted)


def test_signed_dense_weights_by_zplus():
    """R_m = sum_n (A_nm v_m)+ R_n / (sum_m' (A_nm' v_m')+ + e)."""
    generator = torch.Generator().manual_seed(0)
    v, r = (torch.randn(2, *s, dtype=torch.float64, generator=generator) for s in ((5, 3), (4, 3)))
    matrix = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)

    class Fixed(nn.Module):
        def forward(self, x):
            return weighted(x, Dense, matrix).flatten(1)

    config = Config(eps=0.01, eps_mode="absolute")
    got = backward(forward(Fixed(), v, config), r.flatten(1))
    up = (matrix[..., None] * v[:, None]).clamp(min=0)
    assert torch.allclose(got, (up * (r / (up.sum(2) + 0.01))[:, :, None]).sum(1), atol=1e-12)
    assert stabiliser(up.sum(2), config).unique().tolist() == [0.01]


def test_the_error_for_an_unsupported_weight_transform_names_the_layer():
    class OnlyWhole(Dense):
        transforms = (Identity,)

    net, x = network(Attention(dense=OnlyWhole)), images(1, 6)
    relevance(net, x, torch.tensor([1]), Config(rule="epsilon", linear_rule="epsilon"))
    with pytest.raises(
        ValueError, match=r"OnlyWhole of 'middle' \(Attention, weighted\) does not support .* Positive\(\).* Identity"
    ):
        relevance(net, x, torch.tensor([1]))


@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_a_plain_product_of_attention_and_values_is_a_weighted_product(residual):
    class Plain(Attention):
        def forward(self, x):
            query, key, value = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
            mixed = (query @ key.transpose(1, 2)).softmax(-1) @ value
            return mixed.transpose(1, 2).unflatten(2, x.shape[2:])

    config = Config(residual=residual, dead="keep")
    plain, announced = (
        relevance(network(layer), images(1, 6), torch.tensor([0]), config) for layer in (Plain(), Attention())
    )
    assert torch.allclose(plain.relevance, announced.relevance, rtol=1e-9, atol=1e-15)


def test_a_value_that_is_also_a_constant_is_refused():
    class Self(nn.Module):
        def forward(self, x):
            return weighted(x, Dense, x)

    with pytest.raises(NotImplementedError, match=r"'middle' \(Self, weighted\)"):
        relevance(network(Self()), images(1, 6), torch.tensor([0]))


class Cut(nn.Module):
    """One convolution for two branches, each with its own BatchNorm; `how` cuts its output."""

    def __init__(self, how, width=4):
        super().__init__()
        self.both = nn.Conv2d(width, 2 * width, 1)
        self.one, self.two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.how = how

    def forward(self, x):
        first, second = self.how(self.both(x))
        return self.one(first) + torch.relu(self.two(second))


CUTS = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: y.contiguous().split([4, 4], dim=1),
    "tensor_split": lambda y: y.tensor_split(2, 1),
    "split_with_sizes": lambda y: torch.split_with_sizes(y, [4, 4], 1),
    "slices": lambda y: (y[:, :4], y[:, 4:]),
    "overlapping": lambda y: (y[:, 1:5], y.narrow(1, 4, 4)),
}
WHOLE = {
    "also whole": lambda y: (y[:, :4], y[:, 4:] + y.mean(1, keepdim=True)),
    "every other": lambda y: (y[:, ::2], y[:, 1::2]),
    "shuffled": lambda y: (y[:, [0, 2, 1, 3]], y[:, 4:]),
}


@pytest.mark.parametrize("name", [*CUTS, *WHOLE])
@pytest.mark.parametrize("batchnorm", ["pass", "fold"])
def test_a_layer_is_split_if_its_output_is_only_cut_along_channels(name, batchnorm):
    net, x = network(Cut({**CUTS, **WHOLE}[name])), images(2, 6)
    config = Config(rule="epsilon", batchnorm=batchnorm, first_layer="same")
    result = relevance(net, x, torch.tensor([0, 1]), config, "one", report=True)
    assert torch.allclose(result.logits, net(x))
    assert torch.allclose(result.arrived + result.leaked, result.initial, atol=1e-8)
    labels = [node.label for node in plan_for(net, x).graph.nodes.values() if node.kind == "linear"]
    assert sum("middle.both" in label for label in labels) == (2 if name in CUTS else 1)
    assert ("middle.both" in plan_for(net, x).graph.outputs) is (name not in CUTS)


def test_a_split_layer_equals_two_layers():
    """With batchnorm='fold' each half is joined to its own BatchNorm."""
    net, x = network(Cut(CUTS["chunk"])), images(2, 6)
    apart = network(Cut(lambda pair: pair))
    apart.load_state_dict(net.state_dict())
    halves = [nn.Conv2d(4, 4, 1).double() for _ in range(2)]
    for half, weight, bias in zip(halves, net.middle.both.weight.chunk(2), net.middle.both.bias.chunk(2)):
        half.weight.data, half.bias.data = weight.detach(), bias.detach()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = halves

        def forward(self, x):
            return self.first(x), self.second(x)

    apart.middle.both = Both()
    config = Config(batchnorm="fold")
    found, wanted = (relevance(n.eval(), x, torch.tensor([0, 1]), config, "one") for n in (net, apart))
    assert torch.allclose(found.relevance, wanted.relevance, atol=1e-12)


@pytest.mark.parametrize(("transform", "expected"), [
    (Identity(), [-2.0, 0.0, 4.0]), (Positive(), [0.0, 0.0, 4.0]), (Negative(), [-2.0, 0.0, 0.0]),
    (Flat(), [1.0, 1.0, 1.0]), (Square(), [4.0, 0.0, 16.0]), (Gamma(0.5), [-2.0, 0.0, 6.0]),
    (Gamma(0.5, -1), [-3.0, 0.0, 4.0]),
], ids=str)  # fmt: skip
def test_weight_transforms_on_a_negative_a_zero_and_a_positive_weight(transform, expected):
    assert transform(torch.tensor([-2.0, 0.0, 4.0])).tolist() == expected


@pytest.mark.parametrize("transform", [Identity(), Positive(), Negative(), Gamma(0.5), Gamma(0.5, -1)], ids=str)
def test_the_mirrored_transform_is_the_one_that_a_negative_factor_leaves(transform):
    weight = torch.tensor([-2.0, 0.0, 4.0])
    assert torch.equal(transform(-3 * weight), -3 * transform.mirrored(weight))


def test_weights_are_abstract_without_apply_and_adjoint():
    with pytest.raises(TypeError, match="abstract"):
        Weights()
