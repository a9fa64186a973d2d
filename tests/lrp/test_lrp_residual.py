"""Residual sums: junctions, shares at their edges, and the block rule with its telescoping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrp_nets import Block, images, plain, seeded, small_resnet
from torch import nn

from labn.lrp import Config, Ledger, backward, forward, relevance
from labn.lrp.blocks import find_blocks, with_regions
from labn.lrp.forward import run_forward
from labn.lrp.plan import plan_for
from labn.lrp.residual import SHARES, Junction

RULES = ["ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"]
numbers = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(numbers, numbers, st.sampled_from(sorted(SHARES)), st.booleans())
def test_the_two_parts_of_a_junction_add_up(f, s, rule, identity):
    f, s = torch.tensor(f, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    before = f.clone(), s.clone()
    part = SHARES[rule](f, s, Junction(0, identity))
    assert torch.isfinite(part).all()
    assert torch.equal(f, before[0])
    assert torch.equal(s, before[1])
    if rule != "signed":
        assert ((part >= 0) & (part <= 1)).all()


def test_shares_where_a_branch_is_zero_or_both_cancel():
    f = torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    s = torch.tensor([3.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    junction = Junction(0, False)
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
    """The deep branch here hides pixel 0 and the skip branch hides pixel 1, so the map tells who got what."""

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
    got = backward(forward(net, x, Config(residual=rule, first_layer="input")), torch.ones(1, 1, dtype=torch.float64))
    assert torch.allclose(got.flatten(), torch.tensor([share, 1 - share], dtype=torch.float64))


def test_duplicate_doubles_and_says_so():
    net = seeded(Sum(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)), 1)
    ledger = Ledger()
    r = torch.rand(1, 32, dtype=torch.float64)
    got = backward(forward(net, images(1, 4), Config(residual="duplicate")), r, ledger=ledger)
    assert torch.allclose(got.sum(), 2 * r.sum())
    assert torch.allclose(ledger.entries[0].copied, -r.sum())


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


def test_block_rule_is_its_formula():
    block = seeded(Block(3, 5, 2), 2)
    x, eps = images(2, 6), 1e-3
    net = nn.Sequential(block, nn.Flatten())
    r = torch.rand(2, 45, dtype=torch.float64)
    got = backward(forward(net, x, Config(residual="block", eps=eps, eps_mode="absolute")), r)
    assert torch.allclose(got, block_by_hand(block, x, r.view(2, 5, 3, 3), eps), atol=1e-10)


def test_row_of_blocks_telescopes_to_one_gradient():
    """With eps -> 0 the rule applied block by block is one plain gradient through the whole row."""
    net = small_resnet(3)
    x, config = images(2, 16), Config(residual="block", eps=1e-13, eps_mode="absolute")
    plan = plan_for(net, x)
    maps = []
    for telescope in (True, False):
        with torch.no_grad():
            passage = run_forward(with_regions(plan.graph, telescope), plan.junctions, config, x)
        maps.append(backward(passage, torch.ones_like(passage.logits)))
    assert torch.allclose(maps[0], maps[1], rtol=1e-6, atol=1e-9)
    a = net.stem(x).detach().requires_grad_()
    y = net.third(net.second(net.first(a)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    top = backward(
        forward(head, y.detach(), Config(first_layer="same", eps=1e-13, eps_mode="absolute")),
        torch.ones_like(passage.logits),
    )
    s = torch.where(y == 0, 0, top / torch.where(y == 0, 1, y)).detach()
    by_hand = a.detach() * torch.autograd.grad(y, a, s)[0]
    with torch.no_grad():
        passage = run_forward(with_regions(plan.graph), plan.junctions, config, x)
    assert torch.allclose(
        backward(passage, torch.ones_like(passage.logits), until="stem"), by_hand, rtol=1e-6, atol=1e-9
    )


def test_block_rule_loses_exactly_the_effective_bias():
    block = seeded(Block(3, 5, 2), 4)
    x = images(2, 6)
    r = torch.rand(2, 45, dtype=torch.float64)
    config = Config(residual="block", eps=1e-3, eps_mode="absolute")
    ledger = Ledger()
    got = backward(forward(nn.Sequential(block, nn.Flatten()), x, config), r, ledger=ledger)
    y, jx = torch.func.jvp(lambda a: nn.functional.relu(block(a)), (x,), (x,))
    s = r.view_as(y) / (y + 1e-3)
    entry = ledger.entries[0]
    assert torch.allclose(entry.bias, (s * (y - jx)).flatten(1).sum(1), atol=1e-9)
    assert torch.allclose(entry.dead, (r.view_as(y) * (y == 0)).flatten(1).sum(1), atol=1e-9)
    assert torch.allclose(got.flatten(1).sum(1), (s * jx).flatten(1).sum(1), atol=1e-9)
    assert (entry.bias.abs() > 1e-2).all()


def test_block_rule_conserves_without_biases():
    block = seeded(Block(3, 3), 5, biased=False)
    x = images(2, 6)
    y = block(x)
    r = torch.rand_like(y) * (y > 0)
    got = backward(forward(nn.Sequential(block, nn.Flatten()), x, Config(residual="block", eps=1e-14)), r.flatten(1))
    assert torch.allclose(got.flatten(1).sum(1), r.flatten(1).sum(1), atol=1e-9)
