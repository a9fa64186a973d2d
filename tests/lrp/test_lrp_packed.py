"""Convolutions that LRP applies and transposes in oneDNN's packed layout equal the plain ones in float64."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from labn.inference.packing import can_pack
from labn.lrp import Config, relevance
from labn.lrp.rules.linear_layers import Layer, Norm
from labn.lrp.weight_transforms import Flat, Gamma, Identity, Negative, Positive, Square

pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(1, 3, 8, 8), torch.float32), reason="this machine or build packs no convolutions"
)


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 1)]))
    options = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
    }
    return draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups, kernel, options


@settings(max_examples=60, deadline=None)
@given(
    geometries(),
    st.sampled_from([Flat(), Identity(), Negative(), Positive(), Square(), Gamma(0.25), Gamma(0.25, -1)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_packed_convolution_and_its_transpose_equal_the_plain_ones(geometry, transform, folded, seed):
    inputs, outputs, kernel, options = geometry
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs // options["groups"], *kernel, generator=generator)
    norm = Norm(torch.randn(outputs, generator=generator), torch.randn(outputs, generator=generator))
    layer = Layer("conv2d", weight, None, options, norm, torch.channels_last, packs=True)
    a, bias = torch.randn(2, inputs, 11, 12, generator=generator), torch.randn(outputs, generator=generator)
    changed = transform(weight.double() * (norm.scale.double().view(-1, 1, 1, 1) if folded else 1))
    plain = a.double().requires_grad_()
    expected = F.conv2d(plain, changed, bias.double(), **options)
    s = torch.randn(expected.shape, generator=generator)
    (transposed,) = torch.autograd.grad(expected, plain, s.double())
    leaf = a.clone().requires_grad_()
    differentiable = layer.apply(leaf, transform, folded, bias)
    found = [
        (layer.apply(a, transform, folded, bias), expected),
        (differentiable, expected),
        (torch.autograd.grad(differentiable, leaf, s)[0], transposed),
        (layer.adjoint(s, transform, folded, a), transposed),
        (layer.adjoint(s[:1].expand(3, -1, -1, -1), transform, folded, a[:1]), transposed[:1].expand(3, -1, -1, -1)),
    ]
    for got, wanted in found:
        assert got.shape == wanted.shape
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"residual": "block"}, {"rule": "epsilon", "batchnorm": "fold"}], ids=str)
@pytest.mark.parametrize("network", ["resnet18", "resnext50_32x4d"])
def test_maps_with_packed_convolutions_are_close_to_float64(network, config):
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, num_classes=5).eval()
    images, targets = torch.randn(3, 3, 65, 65), torch.tensor([0, 3, 4])
    found = relevance(model, images, targets, Config(**config), init="one").relevance
    exact = relevance(model.double(), images.double(), targets, Config(**config), init="one").relevance
    error = (found.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 1e-3
