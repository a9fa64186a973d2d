"""Every rule against the same formula on a dense matrix, in float64."""

import pytest
import torch
from lrp_nets import images, matrix_of, seeded
from torch import nn

from labn.lrp import Config, ConservationReport, backward, forward

EPS = 0.01


def stable(z):
    return z + EPS * torch.where(z < 0, -1.0, 1.0)


def parts(a, w):
    """Positive and negative parts of the contributions a_i w_ji, (out, in)."""
    products = w * a
    return products.clamp(min=0), products.clamp(max=0)


def share(contributions, r, z=None):
    z = contributions.sum(1) if z is None else z
    return (contributions * (r / stable(z))[:, None]).sum(0)


def dense_epsilon(a, w, b, r):
    return share(w * a, r, w @ a + b)


def dense_zplus(a, w, b, r):
    return share(parts(a, w)[0], r)


def dense_alphabeta(a, w, b, r):
    up, down = parts(a, w)
    return 2 * share(up, r) - share(down, r)


def dense_gamma(a, w, b, r):
    lifted = torch.where(a > 0, w + 0.25 * w.clamp(min=0), w + 0.25 * w.clamp(max=0)) * a
    return share(lifted, r, lifted.sum(1) + b + 0.25 * b.clamp(min=0))


def dense_flat(a, w, b, r):
    return share((w != 0).double(), r)


def dense_ones(a, w, b, r):
    return share(w.clamp(min=0), r)


def dense_zbox(a, w, b, r):
    return share(w * a + 4 * w.clamp(min=0) - 3 * w.clamp(max=0), r)


def dense_wsquare(a, w, b, r):
    return share(w**2, r)


DENSE = {
    "epsilon": dense_epsilon,
    "zplus": dense_zplus,
    "alphabeta": dense_alphabeta,
    "gamma": dense_gamma,
    "flat": dense_flat,
}
FIRST = {
    "ones": dense_ones,
    "zbox": dense_zbox,
    "alpha1beta0": dense_zplus,
    "flat": dense_flat,
    "wsquare": dense_wsquare,
    "epsilon": dense_epsilon,
}
LAYERS = {
    "conv": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 6, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), (4, 5, 5)),
    "pointwise": (nn.Conv2d(3, 5, 1), (3, 4, 4)),
    "same": (nn.Conv2d(3, 2, 3, padding="same", dilation=2), (3, 5, 4)),
}


def propagate(net, x, r, **config):
    trace = forward(
        net, x, Config(eps=EPS, eps_mode="absolute", low=(-4.0,) * x.shape[1], high=(3.0,) * x.shape[1], **config)
    )
    conservation = ConservationReport()
    slow, fast = backward(trace, r, conservation=conservation), backward(trace, r)
    assert torch.allclose(slow, fast, atol=1e-14), "the account must not change the result"
    entry = conservation.entries[0]
    assert torch.allclose(entry.arriving, entry.delivered + entry.leaks, atol=1e-11)
    return fast


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", DENSE)
@pytest.mark.parametrize("positive", [True, False])
def test_rule_equals_its_formula_on_the_dense_matrix(layer, rule, positive):
    module, shape = LAYERS[layer]
    seeded(module, 3)
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, b, _ = matrix_of(module, shape)
    net = nn.Sequential(*([nn.ReLU()] if positive else []), module, nn.Flatten())
    a = x.clamp(min=0) if positive else x
    r = torch.randn(2, len(b), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = propagate(net, x, r, rule=rule, first_layer="same")
    for one in range(2):
        assert torch.allclose(got[one].flatten(), DENSE[rule](a[one].flatten(), w, b, r[one]), atol=1e-11)


@pytest.mark.parametrize("rule", FIRST)
def test_first_layer_rule_equals_its_formula_on_the_dense_matrix(rule):
    module, shape = LAYERS["conv"]
    seeded(module, 4)
    x = images(1, 6)[:, :, :, :5].clamp(-4, 3)
    w, b, _ = matrix_of(module, shape)
    r = torch.randn(1, len(b), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = propagate(nn.Sequential(module, nn.Flatten()), x, r, first_layer=rule)
    assert torch.allclose(got.flatten(), FIRST[rule](x.flatten(), w, b, r[0]), atol=1e-11)


def test_lrp0_divides_by_the_output_without_a_stabiliser():
    module = seeded(nn.Linear(6, 4), 5)
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    r = torch.randn(1, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), module)
    trace = forward(net, x, Config(rule="lrp0", first_layer="same"))
    expected = (module.weight * x.flatten() * (r[0] / module(x.flatten()))[:, None]).sum(0)
    assert torch.allclose(backward(trace, r).flatten(), expected)


def test_lrp0_reports_relevance_of_a_zero_output_as_dead():
    module = nn.Linear(2, 2, bias=False).double()
    module.weight.data = torch.tensor([[1.0, -1.0], [1.0, 2.0]], dtype=torch.float64)
    x = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    conservation = ConservationReport()
    trace = forward(nn.Sequential(nn.Flatten(), module), x, Config(rule="lrp0", first_layer="same"))
    got = backward(trace, torch.tensor([[5.0, 3.0]], dtype=torch.float64), conservation=conservation)
    assert got.flatten().tolist() == [1.0, 2.0]
    assert conservation.entries[0].dead.tolist() == [5.0]


def test_reported_eps_leak_equals_its_formula():
    module = seeded(nn.Linear(5, 3, bias=False), 6)
    x = torch.randn(4, 5, 1, 1, dtype=torch.float64)
    r = torch.randn(4, 3, dtype=torch.float64)
    trace = forward(
        nn.Sequential(nn.Flatten(), module), x, Config(rule="epsilon", first_layer="same", eps=EPS, eps_mode="absolute")
    )
    z = module(x.flatten(1))
    assert torch.allclose(backward(trace, r).flatten(1).sum(1), (r * z / stable(z)).sum(1), atol=1e-12)


def test_relative_eps_depends_on_its_own_sample_only():
    module = seeded(nn.Linear(5, 3), 6)
    x = torch.randn(2, 5, 1, 1, dtype=torch.float64)
    r = torch.randn(2, 3, dtype=torch.float64)
    config = Config(rule="epsilon", first_layer="same", eps=0.1)
    net = nn.Sequential(nn.Flatten(), module)
    z = module(x.flatten(1))
    e = 0.1 * z.abs().mean(1, keepdim=True) * torch.where(z < 0, -1, 1)
    expected = x.flatten(1) * ((r / (z + e)) @ module.weight)
    assert torch.allclose(backward(forward(net, x, config), r).flatten(1), expected)


@pytest.mark.parametrize("folded", [True, False])
def test_batchnorm_is_passed_or_folded_as_configured(folded):
    """Folding multiplies the weights by g / sqrt(v + e) before z+ clamps them; passing ignores the BatchNorm."""
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    net = seeded(nn.Sequential(nn.ReLU(), conv, norm, nn.Flatten()), 7)
    norm.weight.data[:2] *= -1
    x = images(1, 5)
    w, _, _ = matrix_of(conv, (3, 5, 5))
    if folded:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        w = w * scale.repeat_interleave(9)[:, None]
    r = torch.rand(1, 36, dtype=torch.float64)
    got = propagate(net, x, r, first_layer="same", batchnorm="fold" if folded else "pass")
    assert torch.allclose(got.flatten(), dense_zplus(x.clamp(min=0).flatten(), w, 0, r[0]), atol=1e-11)


@pytest.mark.parametrize("pooling", ["winner", "average"])
def test_max_pool_gives_relevance_to_the_winner_or_to_the_average(pooling):
    x = images(1, 5).abs()
    net = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten())
    r = torch.rand(1, 27, dtype=torch.float64)
    got = propagate(net, x, r, pooling=pooling, first_layer="same")
    if pooling == "average":
        w, _, _ = matrix_of(nn.AvgPool2d(3, 2, 1), (3, 5, 5))
        assert torch.allclose(got.flatten(), share(w * x.flatten(), r[0]), atol=1e-11)
    else:
        winners = nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)[1].flatten(2)
        expected = torch.zeros(1, 3, 25, dtype=torch.float64).scatter_add(2, winners, r.view(1, 3, 9))
        assert torch.allclose(got.flatten(2), expected)


def test_average_pool_divides_relevance_by_activation():
    x = images(1, 4).abs()
    r = torch.rand(1, 3, dtype=torch.float64)
    got = propagate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), x, r, first_layer="same")
    mean = x.mean((2, 3))
    assert torch.allclose(got, x / 16 * (r / (mean + EPS))[..., None, None])


def test_many_relevance_maps_of_one_forward_equal_single_maps():
    """T seeds for one image give the maps of T single sweeps."""
    net = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)), 8)
    trace = forward(net, images(1, 8))
    seeds = torch.eye(5, dtype=torch.float64)
    together = backward(trace, seeds)
    for row in range(5):
        assert torch.allclose(together[row : row + 1], backward(trace, seeds[row : row + 1]), atol=1e-14)
    with pytest.raises(ValueError, match="3 relevance maps for 2 images"):
        backward(forward(net, images(2, 8)), seeds[:3])
