"""Fills for removed pixels, and stateless random numbers."""

import pytest
import torch
import torch.nn.functional as F

from labn.perturbation.fills import FILLS, make_fill
from labn.perturbation.stateless_random import sample_integers, sample_uniform

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_black_is_zero_in_pixel_space(images):
    fill = make_fill("black", images, mean=MEAN, std=STD)
    pixels = fill * torch.tensor(STD).double().view(1, 3, 1, 1) + torch.tensor(MEAN).double().view(1, 3, 1, 1)
    assert pixels.abs().max() < 1e-7
    assert make_fill("black", images).count_nonzero() == 0


def test_mean_is_zero_after_normalisation(images):
    assert make_fill("mean", images, mean=MEAN, std=STD).count_nonzero() == 0


def test_bias_image_is_normalised_like_the_images(images):
    bias = torch.rand(3, 12, 17, dtype=torch.float64)
    fill = make_fill("bias", images, mean=MEAN, std=STD, bias=bias)
    assert fill.shape == (1, 3, 12, 17)
    assert fill[0, 2, 5, 6].item() == pytest.approx((bias[2, 5, 6].item() - 0.6) / 0.4)


def test_image_mean_is_the_mean_of_each_channel(images):
    fill = make_fill("image_mean", images)
    assert fill[1, 2].item() == pytest.approx(images[1, 2].mean().item())


def test_blur_equals_a_dense_gaussian_filter(images):
    offset = torch.arange(11, dtype=torch.float64) - 5
    kernel = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / 50)
    padded = F.pad(images, (5, 5, 5, 5), mode="replicate").flatten(0, 1).unsqueeze(1)
    expected = F.conv2d(padded, (kernel / kernel.sum()).view(1, 1, 11, 11)).view_as(images)
    assert torch.allclose(make_fill("blur", images), expected, atol=1e-12)


def test_box_blur_is_the_mean_of_the_window_and_of_side_one_the_image(images):
    fill = make_fill("box", images, kernel_size=3)
    assert fill[0, 0, 5, 5].item() == pytest.approx(images[0, 0, 4:7, 4:7].mean().item())
    assert torch.allclose(make_fill("box", images, kernel_size=1), images)


def test_uniform_lies_in_the_channels_range_and_depends_on_seed_and_index_only(images):
    indices = torch.tensor([5, 9, 2])
    fill = make_fill("uniform", images, indices=indices, seed=3)
    assert (fill >= images.amin((2, 3), keepdim=True)).all()
    assert (fill <= images.amax((2, 3), keepdim=True)).all()
    assert torch.equal(fill[1:2], make_fill("uniform", images[1:2], indices=indices[1:2], seed=3))
    assert not torch.equal(fill, make_fill("uniform", images, indices=indices, seed=4))
    assert not torch.equal(fill, make_fill("uniform", images, indices=indices + 1, seed=3))


@pytest.mark.parametrize("name", sorted(FILLS))
def test_every_fill_broadcasts_keeps_dtype_and_leaves_the_images_alone(images, name):
    images = images.float()
    before = images.clone()
    fill = make_fill(name, images, mean=MEAN, std=STD, bias=torch.rand(3, 12, 17))
    assert torch.broadcast_shapes(fill.shape, images.shape) == images.shape
    assert fill.dtype == images.dtype
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grey", {}, "fill must be one of"),
        ("bias", {}, "needs bias="),
        ("bias", {"bias": torch.zeros(3, 12, 12)}, "bias must be"),
        ("black", {"mean": [0.1, 0.2]}, "mean and std must have 1 or 3 values"),
    ],
)
def test_bad_fills_are_refused_by_name(images, name, options, message):
    with pytest.raises(ValueError, match=message):
        make_fill(name, images, **options)


def test_stateless_numbers_depend_on_the_values_of_the_indices_alone():
    expected = sample_integers(5, torch.arange(7), 20)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(sample_integers(5, torch.arange(7, dtype=dtype), 20), expected)


def test_stateless_numbers_in_half_precision_are_the_rounded_ones():
    whole = sample_uniform(0, torch.arange(4), 100)
    assert torch.equal(sample_uniform(0, torch.arange(4), 100, torch.float16), whole.half())


def test_stateless_numbers_are_uniform_and_uncorrelated_between_samples():
    numbers = sample_uniform(0, torch.arange(50), 4000, torch.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 5 / (12 * numbers.numel()) ** 0.5
    assert abs(numbers.var().item() - 1 / 12) < 0.002
    off_diagonal = torch.corrcoef(numbers).fill_diagonal_(0)
    assert off_diagonal.abs().max() < 0.08
    assert len(sample_integers(0, torch.arange(50), 4000).unique()) == 200_000
