"""The layout of feature maps is known from the operations that made them, whatever their sizes."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import labn
from labn.explainers.cam.target_layer import search_target_layer, target_layer_of
from labn.inference.layout import Layout, LayoutRecorder
from labn.inference.token_grid import TokenGrid


class Mixed(nn.Module):
    """A convolution, a layer that mixes channels, pooling and a head; `last` keeps channels in the last dimension."""

    def __init__(self, channels: int, last: bool, stride: tuple[int, int] = (4, 4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, channels, 5, stride, 2)
        self.mix, self.head = nn.Linear(channels, channels), nn.Linear(channels, 3)
        self.last = last
        if not last:
            weight, bias = self.mix.weight.detach(), self.mix.bias.detach()
            self.mix = nn.Conv2d(channels, channels, 1)
            self.mix.weight.data, self.mix.bias.data = weight[:, :, None, None].clone(), bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        if self.last:
            return self.head(self.mix(x.permute(0, 2, 3, 1)).relu().mean((1, 2)))
        return self.head(self.mix(x).relu().mean((2, 3)))


@pytest.mark.parametrize(("channels", "size"), [(8, (32, 32)), (4, (16, 64)), (16, (64, 16)), (1, (32, 32))])
@pytest.mark.parametrize("method", ["gradcam", "scorecam", "ablationcam"])
def test_maps_of_channels_last_networks_equal_those_of_their_twin(
    method: str, channels: int, size: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last, first = (Mixed(channels, kind).double().eval() for kind in (True, False))
    assert torch.allclose(last(images), first(images))
    got, expected = (
        labn.explain(model, images, method, 1, target_layer="mix", relu=False).maps for model in (last, first)
    )
    assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()))
    assert search_target_layer(last, images) == search_target_layer(first, images) == "mix"


class Tokens(nn.Module):
    """`Mixed` on tokens: the norm's output is the target; class tokens lie in front of the positions."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 5, 4, 2), nn.LayerNorm(4), nn.Linear(4, 3)
        self.mix, self.prefix = nn.Linear(4, 4), prefix

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).relu().flatten(2).mT
        tokens = torch.cat([torch.ones(len(x), self.prefix, 4, dtype=x.dtype), tokens], 1)
        return self.head(torch.sigmoid(self.norm(self.mix(tokens))).mean(1))


class Positions(Tokens):
    """The same without tokens."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.mix(self.conv(x).relu().movedim(1, 3)))
        count = maps.shape[1] * maps.shape[2]
        others = torch.sigmoid(self.norm(self.mix(torch.ones(len(x), self.prefix, 4, dtype=x.dtype)))).sum(1)
        return self.head((torch.sigmoid(maps).sum((1, 2)) + others) / (count + self.prefix))


@pytest.mark.parametrize("method", ["gradcam", "xgradcam", "ablationcam", "scorecam", "amg"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_maps_of_tokens_equal_those_of_a_network_without_tokens(method: str, prefix: int) -> None:
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, positions = (kind(prefix).double().eval() for kind in (Tokens, Positions))
    assert torch.allclose(tokens(images), positions(images))
    got, expected = (labn.explain(m, images, method, 1, relu=False).maps for m in (tokens, positions))
    assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()))
    layer = target_layer_of(tokens, images, None)
    assert layer.module is tokens.norm
    assert layer.grid == TokenGrid(4, 6, prefix)


def test_maps_of_other_proportions_than_the_image_are_targets() -> None:
    """A network that reduces rows much more than columns, as readers of text lines do."""
    model, images = Mixed(8, False, (8, 1)).eval(), torch.randn(1, 3, 32, 32)
    assert search_target_layer(model, images) == "mix"
    assert target_layer_of(model, images, "mix").channels_last is False


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_layouts_of_timm_networks(name: str) -> None:
    options = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)} if name.startswith("swin") else {}
    model = timm.create_model(name, pretrained=False, **options).eval()
    layer = target_layer_of(model, torch.randn(1, 3, 224, 224), None)
    assert layer.channels_last is name.startswith("swin")


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda x: x.transpose(1, -1), Layout(3, True)),
        (lambda x: x.permute(dims=(0, 3, 1, 2)), Layout(2, True)),
        (lambda x: x.movedim(1, 3).movedim(3, 1), Layout(1, True)),
        (lambda x: x + x[:, :1], Layout(1, True)),
        (lambda x: x[..., 1:], Layout(1, True)),
        (lambda x: F.max_pool2d(x, 2), Layout(1, True)),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)), Layout(3, True)),
        (lambda x: torch.cat([x, x], 1).chunk(2, 1)[0], Layout(1, True)),
        (lambda x: x + x.transpose(1, 2), None),
        (lambda x: x.reshape(1, 2, 8, 4), None),
        (lambda x: x.flatten(2).mT.unflatten(1, (4, 4)), Layout(3, True)),
        (lambda x: x.flatten(2).mT.unflatten(1, (2, 8)), Layout(3, False)),
        (lambda x: x.flatten(2).mT, Layout(2, True, TokenGrid(4, 4))),
        (lambda x: torch.cat([x.new_zeros(1, 1, 4), x.flatten(2).mT], 1), Layout(2, True, TokenGrid(4, 4, 1))),
        (lambda x: torch.cat([x.new_zeros(1, 2, 4), x.flatten(2).mT], 1)[:, 1:], Layout(2, True, TokenGrid(4, 4, 1))),
        (lambda x: torch.cat([x.new_zeros(1, 2, 4), x.flatten(2).mT], 1)[:, 3:], Layout(2, True)),
        (lambda x: F.linear(x.flatten(2).mT, torch.ones(9, 4)), Layout(2, True, TokenGrid(4, 4))),
        (lambda x: x.flatten(2).mT[:, ::2], Layout(2, True)),
        (lambda x: x.flatten(2).mT.roll(1, 1), Layout(2, True)),
        (lambda x: x.flatten(2).mT.unflatten(1, (4, 4))[:, ::2, ::2].flatten(1, 2), Layout(2, True, TokenGrid(2, 2))),
        (lambda x: x + x.flatten(2).relu().view(1, 4, 4, 4), Layout(1, True)),
        (lambda x: x.view(1, 4, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(4, 4, 2, 2), Layout(1, False)),
        (lambda x: torch.einsum("bchw->bhwc", x), None),
        (lambda x: x.permute(0, 2, 3, 1) + x.reshape(-1).view(1, 4, 4, 4), Layout(3, True)),
        (lambda x: F.linear(x.reshape(1, 2, 8, 4), torch.ones(4, 4)), Layout(3, False)),
        (lambda x: F.conv2d(x.reshape(1, 4, 4, 4), torch.ones(2, 4, 1, 1)), Layout(1, True)),
        (lambda x: F.conv2d(x.transpose(1, 2), torch.ones(2, 4, 1, 1)), Layout(1, False)),
    ],
)
def test_layout_follows_the_operations(change, layout: Layout | None) -> None:
    """All sides are 4, so that no size tells one dimension from another."""
    image = torch.rand(1, 4, 4, 4)
    with LayoutRecorder(image) as layouts:
        changed = change(image)
    assert layouts.of(changed) == layout
