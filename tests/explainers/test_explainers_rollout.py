"""Attention rollout: its algebra, and the matrices recorded from real transformers."""

from __future__ import annotations

import pytest
import timm
import torch
from small_networks import pictures, seeded
from torch import Tensor, nn
from torchvision.models import MaxVit, VisionTransformer

from labn.explainers import AttentionRollout
from labn.explainers.attention.rollout import implicit_attention, rollout, token_grid
from labn.models import LambdaLayer, lambda_resnet26


def test_identity_attention_gives_the_identity() -> None:
    eye = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    assert torch.equal(rollout([eye, eye, eye]), eye)


def test_rows_sum_to_one_and_later_layers_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = rollout(layers)
    assert torch.allclose(found.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    mixed = [(a / 2 + torch.eye(6) / 2) for a in layers]
    mixed = [m / m.sum(-1, keepdim=True) for m in mixed]
    assert torch.allclose(found, mixed[2] @ mixed[1] @ mixed[0])


def timm_reference(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of every block from its own weights, then the rollout's class token row."""
    matrices: list[Tensor] = []

    def see(attention: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0]
        qkv = attention.qkv(x).reshape(len(x), x.shape[1], 3, attention.num_heads, attention.head_dim)
        query, key = qkv.permute(2, 0, 3, 1, 4)[:2]
        matrices.append((query @ key.mT * attention.head_dim**-0.5).softmax(-1).mean(1))

    hooks = [block.attn.register_forward_pre_hook(see) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return rollout(matrices)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("pool", "tokens"), [("token", 1), ("avg", 0)])
def test_rollout_of_a_timm_vision_transformer_equals_its_definition(fused: bool, pool: str, tokens: int) -> None:
    torch.manual_seed(0)
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4}
    model = timm.models.VisionTransformer(**options, global_pool=pool, class_token=bool(tokens)).double().eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    images = pictures(2, 32, 48)
    rolled = timm_reference(model, images)
    row = rolled[:, 0, 1:] if tokens else rolled.mean(1)
    expected = nn.functional.interpolate(
        row.reshape(2, 1, 4, 6), (32, 48), mode="bilinear", align_corners=False
    ).squeeze(1)
    found = AttentionRollout()(model, images, torch.tensor([0, 1]))
    assert torch.allclose(found, expected.float(), atol=1e-6)
    assert float(found.std()) > 0.01


def test_rollout_of_a_torchvision_vision_transformer_equals_its_definition() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4).double().eval()
    matrices: list[Tensor] = []
    for layer in model.encoder.layers:
        nn.init.normal_(layer.self_attention.in_proj_weight, std=1.0)

        def see(attention: nn.Module, args: tuple[Tensor, ...]) -> None:
            weight, bias, x = attention.in_proj_weight, attention.in_proj_bias, args[0]
            query, key, _ = ((x @ weight.T + bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)).unbind(0)
            matrices.append((query @ key.mT * 8**-0.5).softmax(-1).mean(1))

        layer.self_attention.register_forward_pre_hook(see)
    with torch.no_grad():
        model(pictures(2, 32, 32))
    for layer in model.encoder.layers:
        layer.self_attention._forward_pre_hooks.clear()
    found = AttentionRollout()(model, pictures(2, 32, 32), torch.tensor([0, 1]))
    row = rollout(matrices)[:, 0, 1:].reshape(2, 1, 4, 4)
    expected = nn.functional.interpolate(row, (32, 32), mode="bilinear", align_corners=False).squeeze(1)
    assert torch.allclose(found, expected.float(), atol=1e-6)


def test_token_grid_fits_tokens_and_proportions() -> None:
    assert token_grid(197, torch.Size([224, 224])) == (14, 14, 1)
    assert token_grid(24, torch.Size([32, 48])) == (4, 6, 0)
    assert token_grid(29, torch.Size([32, 48])) == (4, 6, 5)
    with pytest.raises(ValueError, match="cannot place 47 tokens on an image of 32 x 48"):
        token_grid(47, torch.Size([32, 48]))


def test_the_grid_of_the_patch_embedding_takes_precedence_over_the_proportions() -> None:
    """20 x 40 pixels in patches of 8 are 2 x 5 tokens; 2 x 4 with three prefix tokens would fit the proportions."""
    assert token_grid(11, torch.Size([20, 40]), [(2, 5)]) == (2, 5, 1)
    assert token_grid(11, torch.Size([20, 40]), [(5, 10), (2, 5), (1, 1)]) == (2, 5, 1)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True, dynamic_img_pad=True, depth=2, num_classes=3
    ).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    images = torch.randn(2, 3, 40, 80)
    row = timm_reference(model, images)[:, 0, 1:].reshape(2, 1, 3, 5)
    expected = nn.functional.interpolate(row, (40, 80), mode="bilinear", align_corners=False).squeeze(1)
    assert torch.allclose(AttentionRollout()(model, images, torch.tensor([0, 1])), expected, atol=1e-6)


def test_networks_without_global_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="no self-attention in this model"):
        AttentionRollout()(seeded(), pictures(), torch.tensor([0, 1]))
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, img_size=64, window_size=2, depths=(1, 1)
    )
    windows = MaxVit((32, 32), 8, 4, [8], [1], head_dim=4, stochastic_depth_prob=0.0, num_classes=2)
    with pytest.raises(ValueError, match=r"attention matrices of shapes \[\(8, 16, 16\)\] in this model"):
        AttentionRollout()(windows, pictures(2, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"attention matrices of shapes"):
        AttentionRollout()(swin, torch.zeros(1, 3, 64, 64), torch.tensor([0]))


def test_implicit_attention_reproduces_the_lambda_layers_output() -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(8, dim_k=4, heads=2, r=5, pos_bias=False).double().eval()
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    query, key, value = layer.project(x)
    applied = layer(x).unflatten(1, (2, 4)).flatten(3)  # (B, heads, dv, N)
    signed = torch.zeros(2, 2, 24, 24, dtype=torch.float64)
    for n in range(24):
        for m in range(24):
            down, right = m // 6 - n // 6 + 2, m % 6 - n % 6 + 2
            weight = key.flatten(3)[:, 0, :, m]
            if 0 <= down < 5 and 0 <= right < 5:
                weight = weight + layer.position_weight[:, 0, down, right]
            signed[:, :, n, m] = torch.einsum("bhk,bk->bh", query.flatten(3)[..., n], weight)
    assert torch.allclose(torch.einsum("bhnm,bvm->bhvn", signed, value.flatten(3)[:, 0]), applied, atol=1e-12)
    assert torch.allclose(implicit_attention(layer, x), signed.abs().mean(1), atol=1e-12)


def test_rollout_of_a_lambda_network_is_a_map() -> None:
    torch.manual_seed(0)
    maps = AttentionRollout()(lambda_resnet26(num_classes=3), torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert maps.shape == (2, 64, 64)
    assert float(maps.std()) > 0


class OneBlock(nn.Module):
    """A patch embedding, one attention written in one of several ways, and a head on the mean token."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 24), nn.Linear(8, 4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        maps = self.embed(x)
        if self.way == "spatial softmax":
            maps = maps * maps.softmax(-1).softmax(-2)
        query, key, value = self.qkv(maps.flatten(2).mT).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(self.mixed(query, key, value).transpose(1, 2).flatten(2).mean(1))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.way == "columns":
            return (key @ query.mT).softmax(-2).mT @ value
        if self.way == "einsum":
            return torch.einsum("bhnm, bhmd -> bhnd", (query @ key.mT).softmax(-1), value)
        if self.way == "joined heads":
            scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT)
            return torch.bmm(nn.functional.softmax(scores, dim=2), value.flatten(0, 1)).unflatten(0, (-1, 2))
        if self.way == "over queries":
            return (query @ key.mT).softmax(-2) @ value
        return (query @ key.mT).softmax(-1) @ value


@pytest.mark.parametrize("way", ["columns", "einsum", "joined heads"])
def test_rollout_does_not_depend_on_how_attention_is_written(way: str) -> None:
    images, targets = 3 * pictures(2, 32, 32), torch.tensor([0, 1])
    models = [OneBlock(kind).double().eval() for kind in (way, "plain")]
    assert torch.allclose(models[0](images), models[1](images))
    maps = [AttentionRollout()(model, images, targets) for model in models]
    assert float(maps[1].std()) > 1e-3
    assert torch.allclose(*maps, atol=1e-7)


def test_a_softmax_over_square_feature_maps_is_no_attention() -> None:
    """Four by four patches: the softmax over columns looks like attention between four tokens."""
    model, images = OneBlock("spatial softmax").double().eval(), 3 * pictures(2, 32, 32)
    maps = model.embed(images)
    query, key = (
        model.qkv((maps * maps.softmax(-1).softmax(-2)).flatten(2).mT).unflatten(2, (3, 2, 4))[:, :, :2].unbind(2)
    )
    attention = (query.transpose(1, 2) @ key.transpose(1, 2).mT).softmax(-1).mean(1)
    row = rollout([attention]).mean(1).reshape(2, 1, 4, 4)
    expected = nn.functional.interpolate(row, (32, 32), mode="bilinear", align_corners=False).squeeze(1)
    assert torch.allclose(AttentionRollout()(model, images, torch.tensor([0, 1])), expected.float(), atol=1e-6)


def test_attention_over_the_wrong_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="rows sum to one; a softmax of this model is over the queries"):
        AttentionRollout()(OneBlock("over queries").double().eval(), pictures(1, 32, 32), torch.tensor([0]))
