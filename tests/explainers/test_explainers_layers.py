"""The search for target layers, the choice of targets, and error messages."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from small_networks import GapLinear, Parameterless, pictures, seeded
from torch import Tensor, nn

from labn.explainers import GradCAM
from labn.explainers.base import predictions, resolve_targets, top_k
from labn.explainers.cam.target_layer import (
    find_target_layer,
    is_channels_last,
    named_layer,
    search_target_layer,
    target_layer_of,
)
from labn.inference.token_grid import TokenGrid

TORCHVISION = {
    "resnet18": "layer4",
    "vgg11": "features.19",
    "vgg11_bn": "features.27",
    "alexnet": "features.11",
    "googlenet": "inception5b",
    "densenet121": "features",
    "mobilenet_v3_small": "features",
    "squeezenet1_1": "classifier.2",
    "shufflenet_v2_x0_5": "conv5",
}
TIMM = {
    "resnet18": "layer4",
    "vgg11": "features.19",
    "efficientnet_b0": "bn2",
    "convnext_atto": "stages",
    "mobilenetv3_small_050": "blocks",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), TORCHVISION.items())
def test_the_last_feature_layer_of_torchvision_models(name: str, layer: str) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(**options)
    assert search_target_layer(model, torch.zeros(1, 3, 96, 96)) == layer


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), TIMM.items())
def test_the_last_feature_layer_of_timm_models(name: str, layer: str) -> None:
    assert search_target_layer(timm.create_model(name, pretrained=False), torch.zeros(1, 3, 96, 96)) == layer


@pytest.mark.parametrize("size", [(40, 160), (36, 128), (70, 256), (16, 128), (33, 64), (40, 200)])
def test_the_layer_is_found_on_elongated_images(size: tuple[int, int]) -> None:
    """Rounding takes a small map far from the image's proportions: 40 x 160 becomes 2 x 5."""
    assert search_target_layer(torchvision.models.resnet18(), torch.zeros(1, 3, *size)) == "layer4"


@given(
    channels=st.integers(1, 600),
    height=st.integers(16, 400),
    width=st.integers(16, 400),
    strides=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ceil=st.booleans(),
)
def test_padded_strides_never_look_like_channels_last(
    channels: int, height: int, width: int, strides: list[int], ceil: bool
) -> None:
    rows, columns = height, width
    for stride in strides:
        rows, columns = ((n + stride - 1) // stride if ceil else max(n // stride, 1) for n in (rows, columns))
    assert not is_channels_last(torch.Size((1, channels, rows, columns)), torch.Size((height, width)))


def test_channels_last_is_detected_where_no_stride_explains_the_other_layout() -> None:
    assert is_channels_last(torch.Size((1, 7, 7, 768)), torch.Size((224, 224)))
    assert is_channels_last(torch.Size((1, 7, 14, 96)), torch.Size((224, 448)))


def test_gradcam_works_where_channel_counts_follow_the_images_proportions() -> None:
    """160 x 100 pixels by stride 8 are 20 x 13 positions; 32 channels over 20 rows are nearer to 1.6 than 20 / 13."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(*width, 3, 2, 1), nn.ReLU()]
    head = nn.Linear(32, 4)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double().eval()
    images = pictures(2, 160, 100)
    with torch.no_grad():
        maps = model[:6](images)
    expected = (maps * head.weight[1].view(1, -1, 1, 1)).sum(1).relu() / (20 * 13)
    found = GradCAM()(model, images, torch.tensor([1, 1]))
    resized = nn.functional.interpolate(expected[:, None], (160, 100), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(found.double(), resized, atol=1e-7)


def test_the_target_of_a_vision_transformer_is_the_last_norm_whose_patches_determine_the_logits() -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 2, "num_heads": 1}
    image = torch.randn(1, 3, 32, 32)
    by_token = timm.models.VisionTransformer(**options)
    assert search_target_layer(by_token, image) == "blocks.1.norm1"
    on_average = timm.models.VisionTransformer(**options, class_token=False, global_pool="avg", fc_norm=False)
    assert search_target_layer(on_average, image) == "norm"
    other = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 8)  # its head begins at zero
    nn.init.normal_(other.heads.head.weight)
    assert search_target_layer(other, image) == "encoder.layers.encoder_layer_1.ln_1"
    assert target_layer_of(other, image, None).grid == TokenGrid(2, 2, prefix=1)


def test_tokens_whose_places_are_not_known_are_refused() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 8, 8), nn.LayerNorm(4)
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(x).flatten(2).mT[:, torch.tensor([3, 1, 0, 2])]
            return self.head(self.norm(self.mix(tokens)).mean(1))

    with pytest.raises(ValueError, match=r"works on tokens after 'conv', .* places in the image are not known"):
        search_target_layer(Shuffled(), torch.randn(1, 3, 16, 16))


def test_layers_that_do_not_determine_the_logits_are_skipped() -> None:
    class SideBranch(GapLinear):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.features(x)
            self.side(maps)
            return self.head(self.pool(maps).flatten(1))

    assert search_target_layer(seeded(SideBranch), pictures()) == "features"


def test_the_search_restores_a_model_in_training_mode() -> None:
    model = GapLinear().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search_target_layer(model, pictures())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_is_searched_once_per_image_size() -> None:
    class Growing(nn.Module):
        """The last layer has more than one position only for larger images."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.Conv2d(4, 4, 3, stride=4, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).mean((2, 3))

    model = seeded(Growing)
    assert find_target_layer(model, pictures(1, 16, 16)) == "first"
    assert find_target_layer(model, pictures(1, 32, 32)) == "second"
    assert find_target_layer(model, pictures(1, 16, 16)) == "first"


def test_the_layer_is_searched_again_after_the_network_has_grown() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    images = torch.zeros(1, 3, 16, 16)
    assert find_target_layer(model, images) == "1"
    model.insert(2, nn.Conv2d(8, 8, 3))
    assert find_target_layer(model, images) == "2"


def test_the_error_for_a_wrong_layer_lists_similar_names() -> None:
    with pytest.raises(ValueError, match=r"'layer5' is not a layer of ResNet; near it: .*layer4"):
        named_layer(torchvision.models.resnet18(), "layer5")


def test_a_layer_without_feature_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_layer \(Linear\) returns \(2, 4\)"):
        GradCAM("head")(seeded(), pictures(), torch.tensor([0, 1]))


def test_a_model_without_a_spatial_layer_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 20, 4)).double()
    for model in (flat, Parameterless()):
        with pytest.raises(ValueError, match="has no layer with spatial feature maps; name one with target_layer"):
            GradCAM()(model, pictures(), torch.tensor([0, 1]))


def test_a_layer_that_does_not_reach_the_logits_is_refused() -> None:
    class Dead(GapLinear):
        def forward(self, x: Tensor) -> Tensor:
            self.features(x)
            return x.mean((2, 3)) * 2

    with pytest.raises(ValueError, match="No gradient of the logits of Dead reaches target_layer"):
        GradCAM("features")(seeded(Dead), pictures(), torch.tensor([0, 1]))


def test_targets_may_be_none_an_integer_a_list_or_a_tensor() -> None:
    model, images = seeded(), pictures(5)
    with torch.no_grad():
        logits = model(images)
    assert torch.equal(resolve_targets(model, images), logits.argmax(1))
    assert torch.equal(predictions(model, images), logits.argmax(1))
    assert resolve_targets(model, images, 2).tolist() == [2] * 5
    assert resolve_targets(model, images, [0, 1, 2, 3, 0]).tolist() == [0, 1, 2, 3, 0]
    assert torch.equal(top_k(model, images, 3), logits.sort(1, descending=True).indices[:, :3])


def test_bad_targets_are_refused() -> None:
    model, images = seeded(), pictures(2)
    with pytest.raises(ValueError, match="targets must be 2 class indices, one per image"):
        resolve_targets(model, images, [1, 2, 3])
    with pytest.raises(ValueError, match="k must be from 1 to 4"):
        top_k(model, images, 5)
