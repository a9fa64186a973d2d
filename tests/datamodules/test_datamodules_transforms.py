import numpy as np
import pytest
import torch

from datamodules.io.transforms import FLIPS, PUBLISHED, Augmentation, Transform

MEAN, STD = (0.4, 0.3, 0.2), (0.3, 0.2, 0.1)
OFF = Augmentation(0, 0, 0, None, (3 / 4, 4 / 3), 0, 0, 0, 0, 0)


def image(seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_evaluation_only_normalises() -> None:
    pixels, mask = image(), image(1)[..., 0] > 128
    out, moved = Transform(32, MEAN, STD)(pixels, mask, seed=(1, 2, 3))
    expected = (torch.from_numpy(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(out.double(), expected.permute(2, 0, 1), atol=1e-5, rtol=0)
    assert out.dtype == torch.float32
    assert moved is not None
    assert moved.dtype == torch.bool
    np.testing.assert_array_equal(moved.numpy(), mask)
    again, _ = Transform(32, MEAN, STD, OFF)(pixels, None, seed=(9,))
    torch.testing.assert_close(again, out, atol=0, rtol=0)


def test_grey_images_keep_one_channel() -> None:
    out, mask = Transform(32, (0.5,), (0.5,), PUBLISHED)(image()[..., :1], None, seed=(0, 0, 0))
    assert out.shape == (1, 32, 32)
    assert mask is None


def test_the_same_seed_gives_the_same_sample_whatever_came_before() -> None:
    transform, other = Transform(32, MEAN, STD, PUBLISHED), Transform(32, MEAN, STD, PUBLISHED)
    first = transform(image(), image(1)[..., 0] > 128, seed=(1, 2, 3))
    for i in range(5):
        other(image(i), None, seed=(7, 7, i))
    second = other(image(), image(1)[..., 0] > 128, seed=(1, 2, 3))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_seed_epoch_and_index_each_change_the_sample(change: tuple[int, int, int]) -> None:
    transform = Transform(32, MEAN, STD, PUBLISHED)
    assert not torch.equal(transform(image(), seed=(1, 2, 3))[0], transform(image(), seed=change)[0])


def test_flips_have_probability_one_half_and_are_independent() -> None:
    corner = np.zeros((32, 32, 3), dtype=np.uint8)
    corner[0, 0] = 255
    transform = Transform(32, (0, 0, 0), (1, 1, 1), FLIPS)
    counts = {(0, 0): 0, (0, 31): 0, (31, 0): 0, (31, 31): 0}
    for i in range(400):
        where = transform(corner, seed=(0, 0, i))[0][0].nonzero()[0]
        counts[int(where[0]), int(where[1])] += 1
    assert all(60 < count < 140 for count in counts.values())


def test_masks_are_transformed_like_their_images() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[10:34, 20:44] = 255
    geometric = Augmentation(brightness=0, contrast=0, saturation=0, erasing=0.0)
    transform = Transform(64, (0, 0, 0), (1, 1, 1), geometric)
    for i in range(20):
        out, mask = transform(pixels, pixels[..., 0] > 0, seed=(0, 0, i))
        assert mask is not None
        overlap = ((out[0] > 0.5) & mask).sum() / ((out[0] > 0.5) | mask).sum()
        assert overlap > 0.85


def test_erasing_sets_the_mean_colour_and_clears_the_mask() -> None:
    always = Augmentation(0, 0, 0, None, brightness=0, contrast=0, saturation=0, erasing=1.0)
    white, everywhere = np.full((32, 32, 3), 255, np.uint8), np.ones((32, 32), bool)
    out, mask = Transform(32, MEAN, STD, always)(white, everywhere, seed=(1,))
    assert mask is not None
    erased = (out == 0).all(0)
    assert 0.02 * 0.8 < erased.float().mean() < 0.33 * 1.2
    assert torch.equal(mask, ~erased)


def test_crop_shares_above_one_are_drawn_again() -> None:
    """Nothing fits when all shares exceed 1 (the whole image is left); the published range still crops."""

    def unchanged(scale: tuple[float, float]) -> float:
        crop_only = Augmentation(0, 0, 0, scale, brightness=0, contrast=0, saturation=0, erasing=0)
        transform = Transform(64, MEAN, STD, crop_only)
        plain = Transform(64, MEAN, STD)(image(size=64))[0]
        return sum(torch.equal(transform(image(size=64), seed=(0, 0, i))[0], plain) for i in range(100)) / 100

    assert unchanged((1.1, 1.3)) == 1.0
    assert unchanged((0.7, 1.3)) < 0.2


def test_the_default_augmentation_has_the_published_strengths() -> None:
    assert Augmentation(0.5, 0.5, 5.0, (0.7, 1.3), (3 / 4, 4 / 3), 0.5, 0.5, 0.5, 0.0, 0.5, (0.02, 0.33)) == PUBLISHED
