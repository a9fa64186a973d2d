"""IROF and its superpixels: closed forms in float64."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.metrics import IROF
from labn.metrics.functional import area_over_curve, segment_means, segment_ranks
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.superpixels import slic

INDICES = torch.tensor([4, 7])
WEIGHTS = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)


class Quarters(nn.Module):
    """Probability of class 1: sum of w_q times the mean of quarter q, of an image whose quarters are 0 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        p = nn.functional.adaptive_avg_pool2d(x[:, :1], 2).flatten(1) @ WEIGHTS * 0.9 + 0.05
        return torch.stack([(1 - p).log(), p.log()], 1)


def quarters(*values: float) -> Tensor:
    """A map (8, 8) of four values."""
    return torch.tensor(values, dtype=torch.float64).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)


WHITE = torch.ones(2, 1, 8, 8, dtype=torch.float64)
MAPS = torch.stack([quarters(4, 3, 2, 1), quarters(1, 2, 3, 4)])


def score(metric: IROF, maps: Tensor = MAPS, images: Tensor = WHITE, **more) -> Tensor:
    targets = torch.ones(len(images), dtype=torch.long)
    return metric.score(Quarters(), images, maps, targets, INDICES[: len(images)], **more)["irof"]


def test_slic_of_an_even_image_is_the_grid_it_starts_from():
    found = slic(torch.full((1, 3, 8, 12), 0.4), n_segments=6)[0]
    row, column = torch.arange(8)[:, None] // 4, torch.arange(12) // 4
    assert torch.equal(found, row * 3 + column)


def test_slic_follows_colours_and_does_not_depend_on_the_batch():
    images = 0.1 * torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    images[0, :, :, :10] += 0.8  # an edge two pixels from the grid's
    whole = slic(images, 16)
    bright, dark = whole[0, :, :10].unique(), whole[0, :, 10:].unique()
    assert not set(bright.tolist()) & set(dark.tolist())
    assert torch.equal(slic(images[1:], 16)[0], whole[1])
    for labels in whole:
        assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    # Compact regions keep to their grid, whatever the colours.
    assert torch.equal(slic(images, 16, compactness=1e6)[0], slic(torch.zeros(1, 3, 24, 24), 16)[0])


def test_slic_of_one_region_and_of_every_pixel():
    image = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert slic(image, 1).eq(0).all()
    assert slic(image, 35, compactness=1e6).flatten().tolist() == list(range(35))
    with pytest.raises(InputError, match="compactness above 0"):
        slic(image, 4, compactness=0)


def test_segments_leave_by_their_mean_and_together_where_it_is_equal():
    segments = torch.tensor([[[0, 0, 1], [2, 2, 2]], [[0, 0, 0], [1, 1, 1]]])
    means = segment_means(
        torch.tensor([[[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]], [[0.0, 0.0, 0.0], [1.0, 1.0, 4.0]]]), segments
    )
    assert torch.equal(means[0], torch.tensor([2.0, 5.0, 2.0]).double())
    assert means[1, :2].tolist() == [0, 2]
    assert means[1, 2].isnan()
    assert segment_ranks(means).tolist() == [[1, 0, 1], [1, 0, 3]]


def test_area_over_the_curve_in_closed_form():
    x = torch.tensor([[0.0, 0.5, 1.0]]).expand(3, -1)
    p = torch.tensor([[0.6, 0.6, 0.6], [0.8, 0.0, 0.0], [0.5, 0.75, 1.0]])
    assert area_over_curve(x, p).tolist() == pytest.approx([0, 0.75, -0.5])
    assert area_over_curve(x[:1], torch.zeros(1, 3)).isnan().all()


def test_irof_of_known_quarters():
    """p falls by .9 w_q with every quarter, from .95 to .05: the area is that of the polygon."""
    found = score(IROF(n_segments=4))

    def polygon(order):
        heights = [0.95]
        for quarter in order:
            heights.append(heights[-1] - 0.9 * WEIGHTS[quarter].item())
        return 1 - sum((a + b) / 2 for a, b in itertools.pairwise(heights)) / 4 / 0.95

    assert found.tolist() == pytest.approx([polygon([0, 1, 2, 3]), polygon([3, 2, 1, 0])], abs=1e-9)
    assert found[0] > found[1]


def test_irof_of_a_constant_map_is_the_straight_line():
    expected = 1 - (0.95 + 0.05) / 2 / 0.95
    assert score(IROF(n_segments=4), torch.ones(2, 8, 8)).tolist() == pytest.approx([expected] * 2, abs=1e-9)


def test_irof_runs_a_forward_per_superpixel_and_depends_neither_on_batch_nor_on_chunk():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    maps = torch.rand(2, 8, 8, generator=generator, dtype=torch.float64)
    engine = PerturbationEngine(Quarters(), images, indices=INDICES)
    whole = score(IROF(n_segments=6), maps, images, cache=engine)
    metric = IROF(n_segments=6)
    counts = [len(labels.unique()) for labels in metric.segments(images)]
    assert engine.forwards == sum(counts) + 1  # the image and all but one superpixels removed, and the fill for both
    assert torch.allclose(score(IROF(n_segments=6, chunk_size=1), maps, images), whole, atol=1e-12)
    targets = torch.tensor([1])
    alone = metric.score(Quarters(), images[1:], maps[1:], targets, INDICES[1:])["irof"]
    assert torch.allclose(alone, whole[1:], atol=1e-12)


def test_superpixels_are_those_of_the_picture_and_not_of_its_normalisation():
    pixels = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    shape = (1, 3, 1, 1)
    normalised = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    same = IROF(n_segments=6).segments(pixels)
    assert torch.equal(IROF(n_segments=6, mean=mean, std=std).segments(normalised), same)
    assert torch.equal(same, slic(pixels, 6))
