"""LeGrad: its closed form for a linear layer of attention, and its definition on real transformers."""

from __future__ import annotations

import pytest
import timm
import torch
from small_networks import pictures, seeded
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from labn.errors import InputError
from labn.explainers import LeGrad
from labn.inference.modes import explaining

TARGETS = torch.tensor([1, 3])


def attribute(model: nn.Module, images: Tensor, layers: int | None = None) -> Tensor:
    with explaining(model):
        return LeGrad(layers).attribute(model, images, TARGETS, None)


class Mixing(nn.Module):
    """Tokens plus softmax(Q K^T) V with V = tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.query(x) @ x.mT).softmax(-1) @ x


class Averaged(nn.Module):
    """Patches of 4 x 4 pixels, layers of attention, the mean over the tokens, a linear layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 5, 4, 4), nn.Linear(5, 4)
        self.layers = nn.Sequential(*(Mixing(5) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("layers", [1, 3])
def test_legrad_of_a_linear_layer_reads_off_the_values(layers: int) -> None:
    """s = w . mean_i (A V)_i gives ds/dA_ij = w . V_j / N for every query i."""
    model, images = seeded(Averaged, layers=layers), pictures(2, 12, 20)
    values = model.embed(images).flatten(2).mT
    expected = torch.zeros(2, 15, dtype=torch.float64)
    for layer in model.layers:
        expected += (values @ model.head.weight[TARGETS, :, None]).squeeze(2).relu() / 15 / layers
        values = layer(values)
    assert torch.allclose(attribute(model, images).flatten(1), expected, atol=1e-12)
    if layers == 3:
        assert (attribute(model, images, 1) - attribute(model, images)).abs().max() > 1e-4


def by_definition(blocks: nn.ModuleList, attend: object, start: Tensor, tail: object) -> Tensor:
    """Mean over layers of the positive gradients, from every block's own weights: (B, N)."""
    tokens, total = start.detach(), 0
    for block in blocks:
        matrix, behind = attend(block, tokens)  # type: ignore[operator]
        scores = tail(behind).gather(1, TARGETS[:, None])  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(scores.sum(), matrix)
        total, tokens = total + gradient.relu().mean((1, 2)), behind.detach()
    return total / len(blocks)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("pool", "tokens"), [("token", 1), ("avg", 0)])
def test_legrad_of_a_timm_vision_transformer_equals_its_definition(fused: bool, pool: str, tokens: int) -> None:
    torch.manual_seed(0)
    options = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 4}
    model = timm.models.VisionTransformer(**options, global_pool=pool, class_token=bool(tokens)).double().eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
        nn.init.normal_(block.attn.qkv.weight, std=0.5)

    def attend(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        own = block.attn
        qkv = own.qkv(block.norm1(x)).unflatten(-1, (3, own.num_heads, own.head_dim)).permute(2, 0, 3, 1, 4)
        matrix = (qkv[0] @ qkv[1].mT * own.scale).softmax(-1).detach().requires_grad_()
        x = x + own.proj((matrix @ qkv[2]).transpose(1, 2).flatten(2))
        return matrix, x + block.mlp(block.norm2(x))

    images = pictures(2, 16, 24)
    start = model._pos_embed(model.patch_embed(images))
    expected = by_definition(model.blocks, attend, start, lambda x: model.forward_head(model.norm(x)))
    found = attribute(model, images)
    assert torch.allclose(found.flatten(1), expected[:, tokens:], atol=1e-12)
    assert found.shape == (2, 2, 3)
    assert float(found.std()) > 1e-5


def test_legrad_of_a_torchvision_vision_transformer_equals_its_definition() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4).double().eval()
    nn.init.normal_(model.heads.head.weight)

    def attend(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        own = block.self_attention
        projected = block.ln_1(x) @ own.in_proj_weight.T + own.in_proj_bias
        query, key, value = projected.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        matrix = (query @ key.mT * 8**-0.5).softmax(-1).detach().requires_grad_()
        x = x + own.out_proj((matrix @ value).transpose(1, 2).flatten(2))
        return matrix, x + block.mlp(block.ln_2(x))

    images = pictures(2, 16, 16)
    patches = model._process_input(images)
    start = torch.cat([model.class_token.expand(2, -1, -1), patches], 1) + model.encoder.pos_embedding
    expected = by_definition(model.encoder.layers, attend, start, lambda x: model.heads(model.encoder.ln(x)[:, 0]))
    assert torch.allclose(attribute(model, images).flatten(1), expected[:, 1:], atol=1e-12)


def test_networks_without_attention_or_with_fewer_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"legrad needs global self-attention .* no self-attention in this model"):
        LeGrad()(seeded(), pictures(), TARGETS)
    with pytest.raises(InputError, match="layers is 4; Averaged has 3 with attention"):
        LeGrad(4)(seeded(Averaged, layers=3), pictures(2, 8, 8), TARGETS)
    with pytest.raises(InputError, match="layers must be at least 1"):
        LeGrad(0)


class Flat(nn.Module):
    """Attention whose result is pooled inside of the only module that computes it."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.avg_pool2d(x, 4).flatten(2).mT
        return ((tokens @ tokens.mT).softmax(-1) @ tokens).mean(1)


def test_a_layer_without_a_module_that_returns_its_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="no module of Flat that returns the tokens"):
        LeGrad()(Flat(), pictures(2, 8, 8), torch.tensor([0, 1]))
