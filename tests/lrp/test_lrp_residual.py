"""Residual sums: the roles of their branches, shares in edge cases, and the block rule with its telescoping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrp_nets import Block, images, plain, seeded, small_resnet
from torch import nn

from labn.lrp import Config, ConservationReport, backward, forward, relevance
from labn.lrp.forward import run_forward
from labn.lrp.plan import plan_for
from labn.lrp.rules.residual_sums import SHARES, ResidualSum
from labn.lrp.tracing.residual_blocks import find_blocks, with_regions

RULES = ["ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"]
numbers = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(numbers, numbers, st.sampled_from(sorted(SHARES)), st.booleans())
def test_the_two_shares_of_a_residual_sum_add_up_to_its_relevance(f, s, rule, identity):
    f, s = torch.tensor(f, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    before = f.clone(), s.clone()
    part = SHARES[rule](f, s, ResidualSum(0, identity))
    assert torch.isfinite(part).all()
    assert torch.equal(f, before[0])
    assert torch.equal(s, before[1])
    if rule != "signed":
        assert ((part >= 0) & (part <= 1)).all()


def test_shares_where_a_branch_is_zero_or_both_cancel():
    f = torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    s = torch.tensor([3.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    junction = ResidualSum(0, False)
    assert SHARES["ratio"](f, s, junction).tolist() == [0, 1, 0.5, 0.5]
    near = SHARES["signed"](f, s + 1e-9, junction)
    assert near[3] > 1e8, "the signed share explodes where the branches cancel"


class Sum(nn.Module):
    def __init__(self, deep, skip):
        super().__init__()
        self.deep, self.skip = deep, skip

    def forward(self, x):
        return (self.deep(x) + self.skip(x)).flatten(1)


@pytest.mark.parametrize(("rule", "identity", "share"), [
    ("symmetric", True, 0.5), ("symmetric_down", True, 1.0), ("symmetric_down", False, 0.5), ("ratio_down", True, 1.0),
])  # fmt: skip
def test_deep_branch_gets_its_fixed_share_whatever_the_order_of_the_sum(rule, identity, share):
    """The deep branch here hides pixel 0 and the skip branch hides pixel 1, so the map shows the share of each."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(1, 1, 1, bias=False) for _ in range(3))

        def forward(self, x):
            deep = self.b(self.a(x))[..., :1]
            skip = (x if identity else self.c(x))[..., 1:]
            return (skip + deep).flatten(1)

    net = seeded(Masked(), 0)
    for conv in (net.a, net.b, net.c):
        conv.weight.data.abs_()
    x = torch.rand(1, 1, 1, 2, dtype=torch.float64) + 0.1
    got = backward(
        forward(net, x, Config(residual=rule, first_layer="alpha1beta0")), torch.ones(1, 1, dtype=torch.float64)
    )
    assert torch.allclose(got.flatten(), torch.tensor([share, 1 - share], dtype=torch.float64))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("block", "duplicate")])
@pytest.mark.parametrize("identity", [True, False])
def test_relevance_of_the_branches_adds_up_to_the_arriving_relevance(rule, identity):
    skip = nn.Identity() if identity else nn.Conv2d(3, 3, 1)
    net = seeded(Sum(nn.Conv2d(3, 3, 3, padding=1), skip), 2)
    trace = forward(net, images(2, 4), Config(residual=rule))
    r = torch.randn(2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    f, s = (net.deep(images(2, 4)), net.skip(images(2, 4)))
    share = SHARES[rule](f.clone(), s.clone(), ResidualSum(0, identity)) * torch.ones_like(f)
    deep = backward(trace, r, until="deep")
    assert torch.allclose(deep, share * r.view_as(deep), atol=1e-12)
    if not identity:
        assert torch.allclose(deep + backward(trace, r, until="skip"), r.view_as(deep), atol=1e-9)
    conservation = ConservationReport()
    backward(trace, r, conservation=conservation)
    assert torch.allclose(conservation.entries[0].delivered, conservation.entries[0].arriving, atol=1e-9)


def test_duplicate_rule_reports_the_doubled_relevance_as_copied():
    net = seeded(Sum(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)), 1)
    conservation = ConservationReport()
    r = torch.rand(1, 32, dtype=torch.float64)
    got = backward(forward(net, images(1, 4), Config(residual="duplicate")), r, conservation=conservation)
    assert torch.allclose(got.sum(), 2 * r.sum())
    assert torch.allclose(conservation.entries[0].copied, -r.sum())


@pytest.mark.parametrize("batchnorm", ["pass", "fold"])
def test_all_residual_rules_agree_on_a_network_without_residual_sums(batchnorm):
    maps = [
        relevance(plain(), images(), torch.tensor([0, 2]), Config(residual=r, batchnorm=batchnorm)).relevance
        for r in RULES
    ]
    assert all(torch.equal(maps[0], other) for other in maps[1:])


def test_blocks_are_found_in_a_network_of_unknown_classes():
    net = small_resnet()
    graph = plan_for(net, images()).graph
    assert len(find_blocks(graph)) == 3
    rows = [n for n in with_regions(graph).nodes.values() if n.kind == "region"]
    singles = [n for n in with_regions(graph, telescope=False).nodes.values() if n.kind == "region"]
    assert (len(rows), len(singles)) == (1, 3)


def block_by_hand(block, x, r, eps):
    """x_q sum dy/dx_q R / (y + eps), by autograd through the module itself."""
    x = x.detach().requires_grad_()
    y = block(x)
    return x.detach() * torch.autograd.grad(y, x, r / (y.detach() + eps))[0]


def test_block_rule_equals_its_formula():
    block = seeded(Block(3, 5, 2), 2)
    x, eps = images(2, 6), 1e-3
    net = nn.Sequential(block, nn.Flatten())
    r = torch.rand(2, 45, dtype=torch.float64)
    got = backward(forward(net, x, Config(residual="block", first_layer="same", eps=eps, eps_mode="absolute")), r)
    assert torch.allclose(got, block_by_hand(block, x, r.view(2, 5, 3, 3), eps), atol=1e-10)


@pytest.mark.parametrize("first", ["ones", "flat", "wsquare", "zbox", "alpha1beta0"])
def test_a_block_at_the_pixels_does_not_replace_the_first_layer_rule(first):
    """A first-layer rule cannot apply inside a region, so that this block is divided by `ratio`."""
    net = seeded(nn.Sequential(Block(3, 5, 2), Block(5, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2)
    x = images(2, 8)
    trace = forward(net, x, Config(residual="block", first_layer=first, low=(-9.0,) * 3, high=(9.0,) * 3))
    assert sum(node.kind == "region" for node in trace.graph.nodes.values()) == 1
    start = torch.ones_like(trace.logits)
    lower = nn.Sequential(net[0], nn.Flatten())
    config = Config(first_layer=first, low=(-9.0,) * 3, high=(9.0,) * 3)
    expected = backward(forward(lower, x, config), backward(trace, start, until="0").flatten(1))
    assert torch.allclose(backward(trace, start), expected, atol=1e-12)


class LongSkip(nn.Module):
    """Two blocks inside a long skip connection, which is no block itself: a side branch reads from its inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.low, self.high, self.head = Block(6, 6), Block(6, 6), nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        low = self.low(x)
        out = nn.functional.relu(self.high(low) + x)
        return self.head(torch.cat([out.mean((2, 3)), low.mean((2, 3))], 1))


def test_a_block_inside_an_open_block_is_found():
    net, x = seeded(LongSkip()), images(2, 8)
    assert len(find_blocks(plan_for(net, x).graph)) == 2
    maps = [relevance(net, x, torch.tensor([0, 1]), Config(residual=r)).relevance for r in ("block", "ratio")]
    assert not torch.allclose(*maps)


class Crossed(LongSkip):
    """A sum with a branch that the head reads too, so that it forms no block."""

    def forward(self, x):
        x = self.stem(x)
        deep = self.low.one(x)
        return self.head(torch.cat([(deep + x).mean((2, 3)), deep.mean((2, 3))], 1))


def test_block_rule_warns_for_sums_that_form_no_block():
    with pytest.warns(UserWarning, match="finds no residual block in this network"):
        relevance(seeded(Crossed()), images(2, 8), torch.tensor([0, 1]), Config(residual="block"))


def test_consecutive_blocks_telescope_to_one_gradient():
    """With eps -> 0 the rule applied block by block equals one gradient through all blocks."""
    net = small_resnet(3)
    x, config = images(2, 16), Config(residual="block", eps=1e-13, eps_mode="absolute")
    plan = plan_for(net, x)
    maps = []
    for telescope in (True, False):
        with torch.no_grad():
            trace = run_forward(with_regions(plan.graph, telescope), plan.residual_sums, config, x)
        maps.append(backward(trace, torch.ones_like(trace.logits)))
    assert torch.allclose(maps[0], maps[1], rtol=1e-6, atol=1e-9)
    a = net.stem(x).detach().requires_grad_()
    y = net.third(net.second(net.first(a)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    top = backward(
        forward(head, y.detach(), Config(first_layer="same", eps=1e-13, eps_mode="absolute")),
        torch.ones_like(trace.logits),
    )
    s = torch.where(y == 0, 0, top / torch.where(y == 0, 1, y)).detach()
    by_hand = a.detach() * torch.autograd.grad(y, a, s)[0]
    with torch.no_grad():
        trace = run_forward(with_regions(plan.graph), plan.residual_sums, config, x)
    assert torch.allclose(backward(trace, torch.ones_like(trace.logits), until="stem"), by_hand, rtol=1e-6, atol=1e-9)


def test_block_rule_loses_exactly_the_effective_bias():
    block = seeded(Block(3, 5, 2), 4)
    x = images(2, 6)
    r = torch.rand(2, 45, dtype=torch.float64)
    config = Config(residual="block", first_layer="same", eps=1e-3, eps_mode="absolute")
    conservation = ConservationReport()
    got = backward(forward(nn.Sequential(block, nn.Flatten()), x, config), r, conservation=conservation)
    y, jx = torch.func.jvp(lambda a: nn.functional.relu(block(a)), (x,), (x,))
    s = r.view_as(y) / (y + 1e-3)
    entry = conservation.entries[0]
    assert torch.allclose(entry.bias, (s * (y - jx)).flatten(1).sum(1), atol=1e-9)
    assert torch.allclose(entry.dead, (r.view_as(y) * (y == 0)).flatten(1).sum(1), atol=1e-9)
    assert torch.allclose(got.flatten(1).sum(1), (s * jx).flatten(1).sum(1), atol=1e-9)
    assert (entry.bias.abs() > 1e-2).all()


def test_block_rule_conserves_without_biases():
    block = seeded(Block(3, 3), 5, biased=False)
    x = images(2, 6)
    y = block(x)
    r = torch.rand_like(y) * (y > 0)
    config = Config(residual="block", first_layer="same", eps=1e-14)
    got = backward(forward(nn.Sequential(block, nn.Flatten()), x, config), r.flatten(1))
    assert torch.allclose(got.flatten(1).sum(1), r.flatten(1).sum(1), atol=1e-9)


class ClampedBlock(nn.Module):
    """The residual block with BatchNorm folded by hand, clamped weights and no biases."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        block = self.block
        y = self.clamped(torch.relu(self.clamped(x, block.one, block.one_norm)), block.two, block.two_norm)
        return torch.relu(y + (x if block.skip is None else self.clamped(x, *block.skip)))

    @staticmethod
    def clamped(x, conv, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = (conv.weight * scale[:, None, None, None]).clamp(min=0)
        return nn.functional.conv2d(x, weight, None, conv.stride, conv.padding)


@pytest.mark.parametrize("out", [3, 5])
def test_clamped_block_equals_its_formula_and_conserves(out):
    block = seeded(Block(3, out, 1 if out == 3 else 2), 6)
    block.one_norm.weight.data[:2] *= -1
    x = images(2, 6).abs()
    y = ClampedBlock(block)(x)
    r = torch.rand(2, y[0].numel(), dtype=torch.float64)
    config = Config(residual="block", first_layer="same", block_weights="zplus", eps=1e-3, eps_mode="absolute")
    conservation = ConservationReport()
    got = backward(forward(nn.Sequential(block, nn.Flatten()), x, config), r, conservation=conservation)
    assert torch.allclose(got, block_by_hand(ClampedBlock(block), x, r.view_as(y), 1e-3), atol=1e-10)
    entry = conservation.entries[0]
    assert torch.allclose(entry.arriving, entry.delivered + entry.leaks, atol=1e-12)
    assert torch.allclose(entry.eps, (r.view_as(y) * 1e-3 / (y + 1e-3) * (y > 0)).flatten(1).sum(1), atol=1e-12)
    assert (entry.bias == 0).all()
    assert (got >= 0).all()


def test_consecutive_clamped_blocks_are_propagated_one_by_one_with_the_true_forward_values():
    """The output of a clamped block is not the input of the next block, so every block divides by its own output."""
    net, x = small_resnet(3), images(2, 16)
    config = Config(residual="block", first_layer="same", block_weights="zplus", eps=1e-13, eps_mode="absolute")
    trace = forward(net, x, config)
    assert torch.allclose(trace.logits, net(x), atol=1e-12)
    expected = backward(trace, torch.ones_like(trace.logits), until="third")
    a = net.stem(x).detach()
    entries = [a, net.first(a), net.second(net.first(a))]
    for block, entry in zip((net.third, net.second, net.first), reversed(entries)):
        expected = block_by_hand(ClampedBlock(block), entry, expected, 1e-13)
    got = backward(trace, torch.ones_like(trace.logits), until="stem")
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_clamped_block_conserves_through_the_whole_network():
    config = Config(residual="block", block_weights="zplus", first_layer="alpha1beta0")
    result = relevance(small_resnet(1), images(2, 17), torch.tensor([1, 3]), config, "one", report=True)
    assert torch.allclose(result.arrived + result.leaked, result.initial, atol=1e-12)
    assert (result.arrived > 0.99).all()
    assert (result.relevance >= 0).all()


def test_block_weights_without_the_block_rule_are_refused():
    with pytest.raises(ValueError, match="block_weights='zplus' needs residual='block', got 'ratio'"):
        Config(block_weights="zplus")
    with pytest.raises(ValueError, match="block_weights='plus' is not one of"):
        Config(residual="block", block_weights="plus")
