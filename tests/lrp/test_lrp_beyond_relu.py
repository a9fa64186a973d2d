"""Rules beyond ReLU networks against dense restatements in float64, and the account of every leak."""

import pytest
import torch
import torch.nn.functional as F
from lrp_nets import images, seeded
from torch import nn

from labn.lrp import Config, Contrast, backward, forward, relevance

TARGETS = torch.tensor([0, 1])


class Around(nn.Module):
    """A convolution, the operation under test on its (B, 4, H, W) output, and a linear head on the flattened result."""

    def __init__(self, operation, features=4 * 5 * 5, classes=3):
        super().__init__()
        self.conv, self.head, self.operation = nn.Conv2d(3, 4, 3), nn.Linear(features, classes), operation

    def forward(self, x):
        return self.head(self.operation(self.conv(x)).flatten(1))


def network(operation, **sizes):
    return seeded(Around(operation, **sizes))


def at_operation(net, x, config=None):
    """The operation's input and output, the relevance at its output, and at its input, for one class per image."""
    trace = forward(net, x, config or Config(rule="epsilon", linear_rule="epsilon"))
    seeds = torch.eye(3, dtype=x.dtype)[: len(x)]
    kept = {}
    with torch.no_grad():
        before = net.conv(x)
        after = net.operation(before)
    weight, bias = net.head.weight, net.head.bias
    a = after.flatten(1)
    z = a @ weight.T + bias
    eps = 1e-9 * z.abs().mean(1, keepdim=True)
    kept["r"] = (a * ((seeds / (z + torch.copysign(eps, z))) @ weight)).view_as(after)
    return before, after, kept["r"], backward(trace, seeds, until="conv")


def closes(net, x, config=None, init="logit", tolerance=1e-9):
    """Whether arrived + kept = initial, up to a share of what is handed on."""
    result = relevance(net, x, TARGETS[: len(x)], config, init, report=True)
    assert result.entries[0].arriving.shape == (len(x),)
    scale = 1 + result.initial.abs() + torch.stack([entry.leaks.abs() for entry in result.entries]).sum(0)
    return bool(((result.initial - result.arrived - result.leaked).abs() <= tolerance * scale).all())


IDENTITIES = [
    nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.ELU(), nn.SELU(), nn.Tanh(),
    nn.Mish(), nn.Softsign(), nn.PReLU(4), nn.SiLU(inplace=True),
]  # fmt: skip
FUNCTIONS = [torch.square, torch.abs, lambda x: x**3, lambda x: x.clamp(-0.2, 0.4), lambda x: x.clone().clamp_(max=1)]


@pytest.mark.parametrize("function", [*IDENTITIES, *FUNCTIONS])
def test_a_function_that_is_zero_at_zero_hands_relevance_on_unchanged(function):
    net = network(function)
    _, _, r, got = at_operation(net, images(2, 7))
    assert torch.allclose(got, r, rtol=1e-9, atol=1e-12)
    assert closes(net, images(2, 7))


@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.Softplus(), torch.exp, torch.cos, F.logsigmoid])
def test_the_constant_part_of_a_function_keeps_its_share_as_a_bias(function):
    net, x = network(function), images(2, 7)
    before, after, r, got = at_operation(net, x)
    rise, constant = after - function(torch.zeros_like(before)), function(torch.zeros_like(before))
    assert torch.allclose(got, r * rise.abs() / (rise.abs() + constant.abs()), rtol=1e-8, atol=1e-12)
    _, _, r, got = at_operation(net, x, Config(rule="epsilon", residual="signed"))
    assert torch.allclose(got, r * rise / after, rtol=1e-7, atol=1e-12)
    assert closes(net, x)
    entry = relevance(net, x, TARGETS, report=True).entries[1]
    assert torch.allclose(entry.bias, entry.arriving - entry.delivered)


def test_a_function_without_a_value_at_zero_has_no_rule():
    with pytest.raises(NotImplementedError, match="no rule for"):
        relevance(network(lambda x: (x * x + 1).log()), images(1, 7), TARGETS[:1])


def dense_norm(x, r, matrix, bias):
    """LRP-epsilon through y = M x + b of one sample, all flattened; the rows of M hold the constant deviation."""
    z = matrix @ x + bias
    return x * (matrix.T @ (r / (z + torch.copysign(1e-9 * z.abs().mean(), z))))


def averaging(groups, length):
    """The matrix that takes the mean within consecutive groups of `length` values."""
    return torch.block_diag(*[torch.full((length, length), 1 / length, dtype=torch.float64)] * groups)


NORMS = {
    "group": (nn.GroupNorm(2, 4), 2, True),
    "instance": (nn.InstanceNorm2d(4, affine=True), 4, True),
    "layer": (nn.LayerNorm([4, 5, 5]), 1, True),
    "rms": (nn.RMSNorm([4, 5, 5]), 1, False),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_hand_on_all_or_divide_by_the_epsilon_rule_with_a_constant_deviation(name):
    norm, groups, centres = NORMS[name]
    net, x = network(norm), images(2, 7)
    _, _, r, got = at_operation(net, x)
    assert torch.allclose(got, r, rtol=1e-9, atol=1e-12)
    linear = Config(rule="epsilon", norm="linear")
    before, after, r, got = at_operation(net, x, linear)
    gain, shift = (
        (norm.weight, norm.bias if centres else torch.zeros_like(norm.weight))
        if norm.weight.ndim > 1
        else (v[:, None, None].expand(4, 5, 5) for v in (norm.weight, norm.bias))
    )
    for sample in range(2):
        flat = before[sample].flatten()
        mean = averaging(groups, 100 // groups) @ flat if centres else torch.zeros_like(flat)
        deviation = (averaging(groups, 100 // groups) @ (flat - mean).square() + 1e-5 * centres).sqrt()
        centre = torch.eye(100, dtype=torch.float64) - (averaging(groups, 100 // groups) if centres else 0)
        matrix = (gain.flatten() / deviation)[:, None] * centre
        assert torch.allclose(matrix @ flat + shift.flatten(), after[sample].flatten(), atol=1e-9)
        expected = dense_norm(flat, r[sample].flatten(), matrix, shift.flatten())
        assert torch.allclose(got[sample].flatten(), expected, rtol=1e-6, atol=1e-9)
    assert closes(net, x)
    assert closes(net, x, linear)


def gated(x):
    a, b = (x + 0).chunk(2, 1)
    return a * b


def bounded(x):
    a, b = (x + 0).chunk(2, 1)
    return a * torch.sigmoid(b)


def test_two_factors_get_one_half_each_and_a_bounded_gate_nothing():
    net = network(gated, features=50)
    _, _, r, got = at_operation(net, images(2, 7))
    assert torch.allclose(got, torch.cat([r, r], 1) / 2, rtol=1e-9, atol=1e-12)
    _, _, r, got = at_operation(network(bounded, features=50), images(2, 7))
    assert torch.allclose(got, torch.cat([r, 0 * r], 1), rtol=1e-9, atol=1e-12)
    assert closes(net, images(2, 7))
    # Factors that are both broadcast: each sums over the axes along which it is repeated.
    wide = network(lambda x: x[:, :, :, :1] * x[:, :, :1, 1:], features=80)
    assert closes(wide, images(2, 7))


def product(x):
    rows = x.flatten(2)  # (B, 4, 25)
    return rows[:, :2] @ rows[:, 2:].mT


def test_a_matrix_product_gives_each_factor_one_half_by_the_epsilon_rule():
    net = network(product, features=4)
    before, after, r, got = at_operation(net, images(2, 7))
    a, b = before.flatten(2)[:, :2], before.flatten(2)[:, 2:]
    eps = 1e-9 * after.abs().mean((1, 2), keepdim=True)
    s = r / (after + torch.copysign(eps, after)) / 2
    contributions = a[:, :, None] * b[:, None] * s[..., None]  # (B, i, k, j)
    expected = torch.cat([contributions.sum(2), contributions.sum(1)], 1).view_as(got)
    assert torch.allclose(got, expected, rtol=1e-7, atol=1e-10)
    assert closes(net, images(2, 7))
    einsum = network(lambda x: torch.einsum("bij,bkj->bik", x.flatten(2)[:, :2], x.flatten(2)[:, 2:]), features=4)
    assert torch.allclose(at_operation(einsum, images(2, 7))[3], got, rtol=1e-9, atol=1e-12)


class Attention(nn.Module):
    """Two heads over the positions of (B, 4, H, W); `fused` uses PyTorch's function."""

    def __init__(self, fused=False):
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(4, 12), nn.Linear(4, 4), fused

    def tensors(self, x):
        tokens = self.qkv(x.flatten(2).mT).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return tokens.unbind(0)

    def forward(self, x):
        query, key, value = self.tensors(x)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query * 2**-0.5 @ key.mT).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2)).mT.reshape(x.shape)


def share(contributions, r):
    """R times the epsilon-stabilised shares of contributions (out, in)."""
    z = contributions.sum(1)
    return contributions.T @ (r / (z + torch.copysign(1e-9 * z.abs().mean(), z)))


@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_one_weighted_product_however_it_is_written(fused):
    net, x = network(Attention(fused)), images(2, 7)
    result = relevance(net, x, TARGETS, init="one", report=True)
    products = [entry for entry in result.entries if "weighted" in entry.name]
    assert len(products) == 1
    assert closes(net, x)
    assert closes(net, x, Config(residual="block"))


@pytest.mark.parametrize("dead", ["keep", "absolute", "uniform", None])
def test_the_constant_attention_rule_against_a_dense_restatement(dead):
    config = Config(rule="zplus", first_layer="same", dead=dead)
    net, x = network(Attention()), images(1, 7)
    with torch.no_grad():
        features = net.conv(x)
        query, key, value = (t[0] for t in net.operation.tensors(features))
        attention = (query * 2**-0.5 @ key.mT).softmax(-1)
        mixed = attention @ value  # (2, 25, 2)
        tokens = mixed.transpose(0, 1).flatten(1)  # (25, 4)
        out = net.operation.out(tokens)
    seed = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)

    def positive(a, w, own=None):
        """Positive contributions, and what a unit without any has in their place."""
        shares, fallback = (a * w).clamp(min=0), own or dead or "keep"
        others = {"keep": 0 * (a * w), "absolute": (a * w).abs(), "uniform": torch.ones_like(a * w)}
        return torch.where(shares.sum(1, keepdim=True) == 0, others[fallback], shares)

    r = share(positive(out.T.flatten(), net.head.weight[1:2]), seed[0, 1:2]).view(4, 25).T  # at `out`
    at_mixed = torch.stack([share(positive(t, net.operation.out.weight), q) for t, q in zip(tokens, r)])
    at_mixed = at_mixed.unflatten(1, (2, 2)).transpose(0, 1)  # (heads, tokens, channels)
    own = dead or "absolute"
    at_value = torch.stack([
        torch.stack([share(positive(value[h, :, c], attention[h], own), at_mixed[h, :, c]) for c in range(2)], 1)
        for h in range(2)
    ])  # fmt: skip
    weight = net.operation.qkv.weight[8:]
    flat = at_value.transpose(0, 1).flatten(1)
    expected = torch.stack([share(positive(t, weight), q) for t, q in zip(features[0].flatten(1).T, flat)])
    got = backward(forward(net, x, config), seed, until="conv")
    assert torch.allclose(got[0].flatten(1).T, expected, rtol=1e-6, atol=1e-9)
    assert closes(net, x, config)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.depthwise, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.depthwise(self.conv(x).relu()).relu().mean((2, 3)))


def test_fallbacks_of_dead_depthwise_units_lose_nothing():
    net, x = seeded(Depthwise()), images(2, 9)
    net.depthwise.weight.data[:3] = -net.depthwise.weight.data[:3].abs()  # units that only their bias makes active
    net.depthwise.bias.data.fill_(20.0)
    net.conv.bias.data.fill_(1.0)
    arrived = {}
    for dead in ("keep", "absolute", "uniform"):
        found = relevance(net, x, TARGETS, Config(dead=dead))
        arrived[dead] = (found.arrived / found.initial).min()
        assert closes(net, x, Config(dead=dead))
    assert arrived["keep"] < 0.9
    assert min(arrived["absolute"], arrived["uniform"]) > 0.99


def test_attnlrp_hands_relevance_to_queries_and_keys():
    config = Config(rule="epsilon", first_layer="same", softmax="attnlrp")
    net, x = network(Attention()), images(1, 7)
    with torch.no_grad():
        features = net.conv(x)
        query, key, value = (t[0] for t in net.operation.tensors(features))
        scores = query * 2**-0.5 @ key.mT
        attention = scores.softmax(-1)
        tokens = (attention @ value).transpose(0, 1).flatten(1)
        out = net.operation.out(tokens).T.flatten()
        logit = net(x)[0, 1]
    linear = lambda a, w, z, r: a * ((r / z) @ w)  # noqa: E731
    seed = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    r = linear(out, net.head.weight[1:2], logit[None], torch.ones(1, dtype=torch.float64)).view(4, 25).T
    at_mixed = linear(tokens, net.operation.out.weight, out.view(4, 25).T, r).unflatten(1, (2, 2)).transpose(0, 1)
    s = at_mixed / (attention @ value) / 2
    at_attention, at_value = attention * (s @ value.mT), value * (attention.mT @ s)
    at_scores = scores * (at_attention - attention * at_attention.sum(-1, keepdim=True))
    t = at_scores / scores / 2
    scaled = query * 2**-0.5
    at_query, at_key = scaled * (t @ key), key * (t.mT @ scaled)
    pieces = torch.stack([at_query, at_key, at_value]).permute(2, 0, 1, 3).flatten(1)
    tokens_in = features[0].flatten(1).T
    expected = linear(tokens_in, net.operation.qkv.weight, net.operation.qkv(tokens_in), pieces)
    got = backward(forward(net, x, config), seed, until="conv")
    assert torch.allclose(got[0].flatten(1).T, expected, rtol=1e-4, atol=1e-7 * expected.abs().max().item())
    assert closes(net, x, config, tolerance=1e-7)


def test_multi_head_attention_of_pytorch_has_the_rules_of_its_steps():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            tokens = x.flatten(2).mT
            return self.mha(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(x.shape)

    net, x = network(Own()), images(2, 7)
    assert closes(net, x)
    alone = torch.cat([relevance(net, x[k : k + 1], TARGETS[k : k + 1]).relevance for k in range(2)])
    assert torch.equal(relevance(net, x, TARGETS).relevance, alone)


def test_a_mask_per_head_is_read_as_pytorch_reads_it():
    class Own(nn.Module):
        def __init__(self, per_head):
            super().__init__()
            self.mha, self.per_head = nn.MultiheadAttention(4, 2, batch_first=True), per_head

        def forward(self, x):
            tokens = x.flatten(2).mT
            mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
            if self.per_head:
                mask = mask.expand(2 * len(x), -1, -1)
            return self.mha(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0].mT.reshape(x.shape)

    x = images(2, 7)
    shared, per_head = (relevance(network(Own(own)), x, TARGETS).relevance for own in (False, True))
    assert torch.equal(per_head, shared)


def test_queries_of_collected_values_are_constants():
    def lambdas(x):
        query, key, value = (x + 0).flatten(2).chunk(3, 1)  # (B, 2, 25)
        content = key.softmax(-1) @ value.mT
        position = value @ torch.linspace(-1, 1, 50, dtype=x.dtype).view(25, 2)
        return content.mT @ query + position.mT.flip(1) @ query

    class Six(Around):
        def __init__(self):
            super().__init__(lambdas, features=50)
            self.conv = nn.Conv2d(3, 6, 3)

    net, x = seeded(Six()), images(2, 7)
    r = backward(forward(net, x), torch.eye(3, dtype=torch.float64)[:2], until="conv")
    assert not r[:, :4].any()
    assert r[:, 4:].any()
    assert closes(net, x)


def test_maxima_go_to_the_winners_in_equal_shares():
    tied = torch.tensor([[[[2.0, 2.0], [1.0, 0.0]]]], dtype=torch.float64).expand(1, 1, 2, 2)
    seed = torch.ones(1, 1, dtype=torch.float64)
    for operation in (lambda x: x.amax((2, 3)), lambda x: x.flatten(2).max(2)[0], lambda x: x.flatten(2).max(2).values):
        net = nn.Module()
        net.forward = operation
        assert backward(forward(net, tied), seed).flatten().tolist() == [0.5, 0.5, 0, 0]
    net = nn.Module()
    net.forward = lambda x: torch.maximum(x[..., 0, :], x[..., 1, :] + 1).flatten(1)
    assert backward(forward(net, tied), torch.tensor([[1.0, 1.0]]).double()).flatten().tolist() == [0.5, 1, 0.5, 0]
    assert closes(network(lambda x: torch.maximum(x, torch.tensor(0.3, dtype=x.dtype))), images(2, 7))
    assert closes(network(lambda x: x.flatten(2).topk(3, -1).values, features=12), images(2, 7))


def written(x):
    result = torch.zeros(len(x), 4, 7, 7, dtype=x.dtype)
    result[:, :, 1:6, 1:6] = x
    result[:, 0] = 0.5
    return result[:, :, :5, :5] * 2


def viewed(x):
    x = x.clone()
    x[:, 1:3].mul_(3).add_(x[:, 2:].clone())
    x.view(len(x), 2, 2, 5, 5)[:, 0].relu_()
    return x


def masked(x):
    mask = x.new_zeros(5, 5)
    mask[:2] = 1
    return torch.roll(x, (1, 2), (2, 3)).masked_fill(mask != 0, 0.25)


@pytest.mark.parametrize("operation", [written, viewed, masked])
def test_writes_into_tensors_are_recorded_as_what_they_are(operation):
    assert closes(network(operation), images(2, 7))


def test_a_written_value_has_the_relevance_of_its_source():
    net = network(lambda x: written(x) / 2)
    before, _, r, got = at_operation(net, images(2, 7))
    expected = torch.zeros_like(before)
    expected[:, 1:, :4, :4] = r[:, 1:, 1:, 1:]
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


OTHERS = {
    "addcmul": lambda x: torch.addcmul(x, x.flip(1), torch.tensor(0.5, dtype=x.dtype)),
    "addcmul of two": lambda x: torch.addcmul(x, x.flip(1), x.flip(2)),
    "alpha": lambda x: torch.add(x, x.flip(1), alpha=0.5),
    "difference": lambda x: x - F.avg_pool2d(x, 3, 1, 1),
    "quotient": lambda x: x / x.norm(dim=1, keepdim=True),
    "glu": lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1),
    "unfold": lambda x: F.fold(F.unfold(x, 3, padding=1) * 0.5, (5, 5), 3, padding=1),
    "negative": lambda x: 1 - (-x),
    "repeat": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.1, dtype=x.dtype)),
    "square": lambda x: x * x,
    "rms by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("config", [Config(), Config(residual="block")], ids=["ratio", "block"])
def test_the_account_of_other_operations_closes(name, config):
    assert closes(network(OTHERS[name]), images(2, 7), config)
    assert closes(network(OTHERS[name]), images(2, 7), config, Contrast())


class Windows(nn.Module):
    """A layer on windows of 5 positions, which share an axis with the images."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x.reshape(-1, 5)).relu().view(x.shape)


def test_images_that_share_an_axis_with_windows_do_not_depend_on_each_other():
    net, x = network(Windows()), images(3, 7)
    targets = torch.tensor([0, 1, 2])
    together = relevance(net, x, targets, report=True)
    alone = [relevance(net, x[k : k + 1], targets[k : k + 1], report=True) for k in range(3)]
    assert torch.equal(together.relevance, torch.cat([one.relevance for one in alone]))
    assert torch.equal(together.leaked, torch.cat([one.leaked for one in alone]))
    # Many maps of one image.
    trace = forward(net, x[:1])
    seeds = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(backward(trace, seeds), torch.cat([backward(trace, seed[None]) for seed in seeds]))
