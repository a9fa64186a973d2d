"""Relevance through lambda layers: against matrices written out in full, and through whole networks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrp_nets import images, seeded
from torch import nn

from labn.lrp import Config, backward, forward, relevance
from labn.models.attention_branch import AttentionBranchNetwork
from labn.models.lambda_networks.layer import LambdaLayer
from labn.models.lambda_networks.position import FORMULATIONS
from labn.models.lambda_networks.resnet import LambdaResNet, lambda_resnet26, lambda_resnet50, magnetogram_net

EPS = 0.01
TARGETS = torch.tensor([1, 0])


def pooling(layer, height, width):
    """The pooling after the layer as a matrix (outputs, positions)."""
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return layer.pool(basis).flatten(1).T


def paths(layer, x):
    """Weights (heads, outputs, paths, du, positions) of one image: a path per key through each position n, which the
    pooling reads, and one through the window; values (du, dv, positions); offsets (heads, outputs)."""
    query, key, value = (t[0].flatten(2) for t in layer.project(x))
    height, width = x.shape[-2:]
    count, reach = height * width, layer.r // 2
    window = torch.zeros(layer.dim_k, layer.dim_u, count, count, dtype=torch.float64)
    for n in range(count):
        for m in range(count):
            i, j = m // width - n // width + reach, m % width - n % width + reach
            if min(i, j) >= 0 and max(i, j) < layer.r:
                window[:, :, n, m] = layer.position_weight[:, :, i, j]
    content = torch.einsum("hkn,ukm->hnkum", query, key)
    position = torch.einsum("hkn,kunm->hnum", query, window)[:, :, None]
    pool = pooling(layer, height, width)
    single = torch.einsum("on,hnpum->honpum", pool, torch.cat([content, position], 2))
    bias = torch.zeros(layer.dim_k, dtype=torch.float64) if layer.position_bias is None else layer.position_bias
    offset = torch.einsum("on,hkn,k->ho", pool, query, bias)
    return single.flatten(2, 3), value, offset, pool


def stable(z):
    return z + EPS * torch.where(z < 0, -1.0, 1.0)


def share(contributions, r, z=None):
    z = contributions.sum(-1) if z is None else z
    return contributions * (r / stable(z))[..., None]


def contributions_of(rule, w, a, b, r):
    """Relevance that each input (..., inputs) of the dense layer w (outputs, inputs), b receives from each output."""
    c = w * a
    up, down = c.clamp(min=0), c.clamp(max=0)
    if rule == "lrp0":
        return c * (r / (c.sum(-1) + b))[..., None]
    if rule == "epsilon":
        return share(c, r, c.sum(-1) + b)
    if rule == "zplus":
        return share(up, r)
    if rule == "alphabeta":
        return 2 * share(up, r) - share(down, r)
    lifted = c + 0.25 * up
    return share(lifted, r, lifted.sum(-1) + b + 0.25 * b.clamp(min=0))


def dense(layer, x, r, rule, norm=None):
    """Relevance (1, du * dv, H, W) of the values for relevance r (1, d, H', W') of the (normalised) output."""
    weights, value, offset, pool = paths(layer, x)
    r = r[0].flatten(1).view(layer.heads, layer.dim_v, -1)
    scale = torch.ones(layer.heads, layer.dim_v, dtype=torch.float64)
    shift = torch.zeros_like(scale)
    if norm is not None:
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        scale, shift = (t.view(layer.heads, -1) for t in (gain, norm.bias - norm.running_mean * gain))
    result = torch.zeros_like(value)
    for h in range(layer.heads):
        for v in range(layer.dim_v):
            a = value[:, v].expand(weights.shape[2], -1, -1)
            if rule == "flat":
                # Every value of the channel the same, through every position that the pooling reads.
                got = pool.sum(1) * value[:, v].numel()
                result[:, v] += (pool.sum(1) * r[h, v] / stable(got)).sum()
                continue
            w = scale[h, v] * weights[h].flatten(1)
            b = scale[h, v] * offset[h] + shift[h, v]
            result[:, v] += contributions_of(rule, w, a.flatten(), b, r[h, v]).view(-1, *a.shape).sum((0, 1))
    return result.view(1, -1, *x.shape[-2:])


@st.composite
def layers(draw):
    heads, dim_v = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layer = LambdaLayer(
        heads * dim_v,
        dim_k=draw(st.integers(1, 4)),
        dim_u=draw(st.integers(1, 2)),
        heads=heads,
        r=draw(st.sampled_from([1, 3, 5, 23])),
        stride=draw(st.integers(1, 2)),
        pos_bias=draw(st.booleans()),
        formulation=draw(st.sampled_from(["auto", *FORMULATIONS])),
    )
    return layer, draw(st.integers(1, 9)), draw(st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    layers(),
    st.sampled_from(["lrp0", "epsilon", "zplus", "alphabeta", "gamma", "flat"]),
    st.sampled_from([None, "pass", "fold"]),
    st.integers(0, 2**31),
)
def test_every_rule_against_matrices_written_out(drawn, rule, batchnorm, seed):
    layer, height, width = drawn
    norm = nn.BatchNorm2d(layer.channels)
    seeded(nn.Sequential(layer, norm), seed)
    norm.weight.data[::2] *= -1
    net = nn.Sequential(layer, *([norm] if batchnorm else []), nn.Flatten())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, layer.channels, height, width, dtype=torch.float64, generator=generator)
    config = Config(rule=rule, batchnorm=batchnorm or "pass", eps=EPS, eps_mode="absolute")
    trace = forward(net, x, config)
    r = torch.randn(trace.logits.shape, dtype=torch.float64, generator=generator)
    got = backward(trace, r, until="0.norm_v")
    for one in range(2):
        shaped = r[one].view(1, layer.channels, *layer.pool(x).shape[-2:])
        expected = dense(layer, x[one : one + 1], shaped, rule, norm if batchnorm == "fold" else None)
        scale = expected.abs().max().clamp(min=1)
        # A sum that cancels to 1e-7 of its terms leaves nine digits of the quotient.
        assert torch.allclose(got[one : one + 1] / scale, expected / scale, atol=1e-8)


@pytest.mark.parametrize("stride", [1, 2])
def test_lrp0_equals_gradient_times_value_of_the_values(stride):
    """With the output as relevance z cancels: LRP-0 is the value times the gradient of the sum of outputs."""
    layer = seeded(LambdaLayer(8, dim_k=3, dim_u=2, heads=2, r=5, stride=stride), 3)
    net, x = nn.Sequential(layer, nn.Flatten()), torch.randn(2, 8, 7, 6, dtype=torch.float64)
    query, key, value = (t.detach() for t in layer.project(x))
    layer.project = lambda _: (query, key, value.requires_grad_())
    expected = value * torch.autograd.grad(layer(x).sum(), value)[0]
    del layer.project
    trace = forward(net, x, Config(rule="lrp0"))
    got = backward(trace, trace.logits, until="0.norm_v")
    assert torch.allclose(got, expected.flatten(1, 2), atol=1e-12)


def test_the_value_projection_is_one_convolution_joined_to_its_batchnorm():
    """Queries and keys receive no relevance: the relevance of x comes from the convolution of the values alone."""
    layer = seeded(LambdaLayer(4, dim_k=3, heads=2, r=3), 5)
    x, r = torch.randn(1, 4, 5, 5, dtype=torch.float64).abs(), torch.rand(1, 100, dtype=torch.float64)
    config = Config(first_layer="same", batchnorm="fold", eps=EPS, eps_mode="absolute")
    trace = forward(nn.Sequential(layer, nn.Flatten()), x, config)
    at_values = backward(trace, r, until="0.norm_v")
    conv = nn.Conv2d(4, 2, 1, bias=False).double()
    conv.weight.data = layer.to_qkv.weight.data[-2:]
    alone = forward(nn.Sequential(conv, layer.norm_v, nn.Flatten()).eval(), x, config)
    assert torch.allclose(backward(trace, r), backward(alone, at_values.flatten(1)), atol=1e-12)


def realistic(make, **options):
    """A network in float64 and eval mode, with scales, shifts and statistics that are not trivial."""
    torch.manual_seed(0)
    net = make(**options)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.3, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
    return net.double().eval()


def slim(**options):
    return LambdaResNet((2, 1, 2), num_classes=3, width=8, **options)


def branched(**options):
    return AttentionBranchNetwork(slim(), num_classes=3, split=2, lab_block="lambda", **options)


def adds_up(result):
    scale = result.initial.abs() + torch.stack([e.arriving.abs() + e.leaks.abs() for e in result.entries]).amax(0)
    single = torch.stack([(e.arriving - e.delivered - e.leaks).abs() for e in result.entries]).amax(0)
    return float(torch.maximum((result.arrived + result.leaked - result.initial).abs(), single).div(scale).max())


@pytest.mark.parametrize("rule", ["zplus", "epsilon", "lrp0", "alphabeta", "gamma", "flat"])
@pytest.mark.parametrize("residual", ["ratio", "block", "signed"])
@pytest.mark.parametrize("batchnorm", ["pass", "fold"])
def test_conservation_report_of_a_lambda_network_adds_up(rule, residual, batchnorm):
    config = Config(rule=rule, residual=residual, batchnorm=batchnorm, first_layer="alpha1beta0", eps=1e-6)
    result = relevance(realistic(slim, dim_u=2, r=5), images(2, 33), TARGETS, config, "one", report=True)
    assert adds_up(result) < 1e-9
    assert any("LambdaLayer, weighted" in entry.name for entry in result.entries) or residual == "block"


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda_resnet26, lambda_resnet50])
@pytest.mark.parametrize("config", [Config(), Config(residual="block", block_weights="zplus")])
def test_lambda_resnets_conserve_relevance(make, config):
    result = relevance(realistic(make, num_classes=10), images(1, 65), torch.tensor([4]), config, "one", report=True)
    assert float((result.arrived + result.leaked - result.initial).abs()) < 1e-6
    assert adds_up(result) < 1e-9
    assert float(result.arrived / result.initial) > 0.99
    assert (result.relevance >= 0).all()


@pytest.mark.parametrize(("gate", "branch"), [("mul", "labn"), ("residual", "abn")])
@pytest.mark.parametrize("residual", ["ratio", "block"])
def test_attention_branch_networks_on_lambda_layers_send_no_relevance_to_the_branch(gate, branch, residual):
    """The strict gate hides half of the positions; relevance passes the others, and none goes to the branch."""
    net = realistic(branched, gate=gate, branch=branch)
    x = images(2, 64)
    attention = net(x).attention
    net.theta = float(attention.detach().median())
    assert (attention <= net.theta).any()
    result = relevance(net, x, TARGETS, Config(residual=residual), "one", report=True)
    assert torch.allclose(result.logits, net(x).logits)
    assert adds_up(result) < 1e-9
    assert result.relevance.abs().sum((1, 2, 3)).min() > 0
    assert not any("attention_branch" in entry.name for entry in result.entries)


def test_magnetogram_network_conserves_relevance():
    net, x = realistic(magnetogram_net), images(2, 128)[:, :1]
    result = relevance(net, x, TARGETS, Config(), "one", report=True)
    assert adds_up(result) < 1e-9
    assert (result.arrived > 0.98).all()


@pytest.mark.parametrize("config", [Config(), Config(rule="epsilon", batchnorm="fold"), Config(residual="block")])
def test_relevance_does_not_depend_on_calls_batches_and_formulations(config):
    net, x = realistic(slim), images(3, 40)
    targets = torch.tensor([0, 2, 1])
    found = relevance(net, x, targets, config).relevance
    assert torch.equal(found, relevance(net, x, targets, config).relevance)
    size = found.abs().amax()
    for one in range(3):
        alone = relevance(net, x[one : one + 1], targets[one : one + 1], config).relevance
        assert torch.allclose(alone / size, found[one : one + 1] / size, atol=1e-10)
    for formulation in FORMULATIONS:
        for layer in (m for m in net.modules() if isinstance(m, LambdaLayer)):
            layer.formulation = formulation
        assert torch.allclose(relevance(net, x, targets, config).relevance / size, found / size, atol=1e-9)


def test_many_relevance_maps_of_one_forward_equal_single_maps():
    net = realistic(slim)
    trace = forward(net, images(1, 33))
    seeds = torch.eye(3, dtype=torch.float64)
    together = backward(trace, seeds)
    for row in range(3):
        assert torch.allclose(together[row : row + 1], backward(trace, seeds[row : row + 1]), atol=1e-14)


def test_single_precision_is_close_to_double():
    net, x = realistic(slim), images(2, 40)
    wanted = relevance(net, x, TARGETS, init="one").relevance
    got = relevance(net.float(), x.float(), TARGETS, init="one").relevance
    assert torch.allclose(got.double(), wanted, atol=1e-4 * float(wanted.max()))
