"""The explainers `lrp` and `c3lrp`: defaults, post-processing, and the common contract of explainers."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from labn.explainers.relevance.losses import has_grown
from labn.explainers.relevance.lrp import C3LRP, LRP, ContrastiveLRP
from labn.lrp import Config, forward, relevance
from labn.postprocess import apply, c3, quantise


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    return torch.randn(3, 3, 33, 33, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 1])


def test_defaults_are_ratio_splitting_with_zplus(net, batch):
    expected = relevance(net, *batch, Config(residual="ratio", rule="zplus", batchnorm="pass", first_layer="ones"))
    maps = LRP()(net, *batch)
    assert torch.equal(maps, expected.relevance.sum(1))
    assert maps.shape == (3, 33, 33)
    assert maps.dtype == torch.float32
    probabilities = net(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    assert torch.allclose(maps.sum((1, 2)), probabilities, rtol=1e-3)
    block = relevance(net, *batch, Config(residual="block")).relevance.sum(1)
    assert torch.equal(C3LRP()(net, *batch), c3(block))


def test_postprocess_is_appended_in_order(net, batch):
    raw = LRP()(net, *batch)
    assert torch.equal(LRP(postprocess=["c1c", "hq8"])(net, *batch), apply(raw, ["c1c", "hq8"]))
    assert torch.equal(C3LRP(postprocess=["hq8"])(net, *batch), quantise(C3LRP()(net, *batch)))
    with pytest.raises(ValueError, match="postprocess 'c5'"):
        LRP(postprocess=["c5"])


def test_c3lrp_takes_every_argument_of_lrp_but_the_residual_rule(net, batch):
    options = {"rule": "gamma", "batchnorm": "fold", "gamma": 0.5, "first_layer": "same"}
    expected = apply(LRP(residual="block", **options)(net, *batch), ["c3"])
    assert torch.equal(C3LRP(**options)(net, *batch), expected)
    with pytest.raises(TypeError, match="'residual'"):
        C3LRP(residual="ratio")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("explainer", [LRP(), C3LRP(), ContrastiveLRP(), LRP(rule="epsilon", batchnorm="fold")])
def test_half_precision_images_are_explained_in_single_precision(net, batch, explainer, dtype):
    images, targets = batch[0].to(dtype), batch[1]
    half = copy.deepcopy(net).to(dtype)
    expected = explainer(copy.deepcopy(half).float(), images.float(), targets)
    assert expected.isfinite().all()
    assert torch.equal(explainer(half, images, targets), expected)
    assert half[0].weight.dtype == dtype
    with pytest.raises(ValueError, match="relevance is propagated in float32 or float64"):
        forward(half, images)


@pytest.mark.parametrize("explainer", [LRP(), C3LRP(), LRP(rule="epsilon", batchnorm="fold", first_layer="same")])
def test_the_map_depends_neither_on_the_batch_nor_on_copying_the_explainer(net, batch, explainer):
    images, targets = batch
    whole = explainer(net, images, targets)
    assert torch.equal(whole, explainer(net, images, targets))
    for other in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert torch.equal(whole, other(net, images, targets))
    single = torch.cat([explainer(net, images[i : i + 1], targets[i : i + 1]) for i in range(3)])
    assert torch.allclose(whole, single, rtol=1e-3, atol=1e-6 * float(whole.abs().max()))


def test_a_model_in_training_mode_is_restored(batch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    net(batch[0])
    net.train()
    before = copy.deepcopy(net.state_dict())
    LRP()(net, batch[0], torch.tensor([0, 1, 2]))
    assert net.training
    assert net[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_model_without_parameters_is_explained(batch):
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    maps = LRP(init="one")(net, batch[0], torch.tensor([0, 1, 2]))
    assert torch.allclose(maps.sum((1, 2)), torch.ones(3), atol=1e-5)
    assert torch.allclose(maps[0], batch[0][0, 0].clamp(min=0) / batch[0][0, 0].clamp(min=0).sum(), atol=1e-6)


def test_lrp_works_in_inference_mode_and_on_compiled_models(net, batch):
    expected = LRP()(net, *batch)
    with torch.inference_mode():
        assert torch.equal(LRP()(net, *batch), expected)
    assert torch.equal(LRP()(torch.compile(net), *batch), expected)


def test_an_unknown_init_is_refused():
    with pytest.raises(ValueError, match="init='prob'"):
        LRP(init="prob")


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_size_below_one_is_refused(net, batch, size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        LRP(chunk_size=size)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        relevance(net, *batch, chunk_size=size)


def test_an_absolute_stabiliser_of_zero_is_refused():
    with pytest.raises(ValueError, match="eps must be above 0 with eps_mode='absolute'"):
        LRP(eps=0.0, eps_mode="absolute")
    LRP(eps=0.0)


def test_relevance_that_grows_without_bound_is_called_so():
    """Every layer gives (1, 1) from (1, 1) as a difference of two millions, so that relevance grows as fast."""
    size = 2.0**20
    layers = [nn.Conv2d(2, 2, 1, bias=False) for _ in range(8)]
    for layer in layers:
        layer.weight.data = torch.tensor([[size, 1 - size], [1 - size, size]])[:, :, None, None]
    model, images = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 2, bias=False)).eval(), torch.ones(1, 2, 1, 1)
    model[-1].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # equal relevance of both channels would cancel
    with pytest.warns(
        UserWarning, match="is not finite arrives at the pixels of Sequential.*rule='epsilon' divides by"
    ):
        LRP(rule="epsilon", eps=1e-12)(model, images, torch.tensor([0]))
    assert has_grown(1001.0)
    assert has_grown(-1001.0)
    assert not has_grown(15.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LRP(rule="zplus")(model[-2:], torch.ones(1, 2, 1, 1), torch.tensor([0]))
