"""Patches of maps: pooling, ranks with ties, steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labn.perturbation.fills import make_fill
from labn.perturbation.patches import default_step, patch_grid, patch_pool, patch_ranks, ranks_to_pixels, top_patches

REDUCE = {"max": lambda p: p.max(), "mean": lambda p: p.mean(), "sum": lambda p: p.sum()}
sizes = st.tuples(st.integers(3, 9), st.integers(3, 9))


def integer_maps(seed: int, size: tuple[int, int], levels: int = 5) -> torch.Tensor:
    return torch.randint(levels, (2, *size), generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 3), st.sampled_from(sorted(REDUCE)), st.integers(0, 99))
def test_pooling_reduces_each_patch_over_its_own_pixels(size, m, pooling, seed):
    maps = integer_maps(seed, size) - 2
    pooled = patch_pool(maps, m, pooling)
    assert pooled.shape == (2, -(-size[0] // m), -(-size[1] // m))
    for b in range(2):
        for i in range(pooled.shape[1]):
            for j in range(pooled.shape[2]):
                patch = maps[b, i * m : (i + 1) * m, j * m : (j + 1) * m]
                assert pooled[b, i, j].item() == pytest.approx(REDUCE[pooling](patch).item(), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_fraction_rank_is_the_number_of_strictly_greater_values(values):
    ranks = patch_ranks(torch.tensor([values]).double(), "fraction")[0].tolist()
    assert ranks == [sum(other > value for other in values) for value in values]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_stable_rank_is_raster_order_among_ties(values):
    ranks = patch_ranks(torch.tensor([values]).double(), "stable")[0].tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [order.index(i) for i in range(len(values))] == ranks


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_top_patches_are_the_first_in_stable_order(values, data):
    count = data.draw(st.integers(1, len(values)))
    row = torch.tensor([values, values[::-1]], dtype=torch.float64)
    assert torch.equal(top_patches(row, count), patch_ranks(row, "stable") < count)


def test_random_ties_keep_the_order_of_values_and_depend_on_seed_and_index_only():
    values = torch.tensor([[1.0, 2.0, 1.0, 3.0] + [0.0] * 30] * 3)
    indices = torch.tensor([7, 8, 7])
    ranks = patch_ranks(values, "random", seed=1, indices=indices)
    assert ranks.sort(1).values.equal(torch.arange(34).expand(3, -1))
    assert (ranks[:, 3] == 0).all()
    assert (ranks[:, 1] == 1).all()
    assert ranks[0].equal(ranks[2])
    assert not ranks[0].equal(ranks[1])
    assert ranks[1:2].equal(patch_ranks(values[1:2], "random", seed=1, indices=indices[1:2]))
    assert not ranks.equal(patch_ranks(values, "random", seed=2, indices=indices))


def test_random_ties_are_not_the_noise_of_the_uniform_fill():
    """With one stream, a constant map would remove the fill's brightest pixels first."""
    indices = torch.arange(50)
    ranks = patch_ranks(torch.zeros(50, 64), "random", seed=0, indices=indices)
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = make_fill("uniform", images, indices=indices, seed=0).flatten(1)
    order = noise.argsort(1, descending=True).argsort(1)
    together = torch.stack([ranks.flatten(), order.flatten()]).double().corrcoef()[0, 1]
    assert abs(together) < 0.06  # three standard errors of 3200 places are .053


@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
def test_equal_patches_stay_tied_also_at_the_edge(pooling):
    pooled = patch_pool(torch.full((1, 10, 10), 0.1), 4, pooling)
    assert len(pooled[0, :2, :2].unique()) == 1
    if pooling != "sum":
        assert len(pooled.unique()) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["fraction", "stable"]))
def test_ranks_do_not_change_under_increasing_transforms(seed, ties):
    maps = integer_maps(seed, (5, 7))
    assert patch_ranks(maps, ties).equal(patch_ranks(torch.exp(maps) * 3 - 1, ties))


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 3))
def test_every_pixel_has_the_rank_of_its_patch(size, m):
    rows, columns = patch_grid(size, m)
    ranks = torch.arange(rows * columns).flip(0).expand(2, -1)
    pixels = ranks_to_pixels(ranks, m, size)
    assert pixels.shape == (2, *size)
    assert pixels.dtype == torch.int32
    for y in range(size[0]):
        for x in range(size[1]):
            assert pixels[1, y, x] == ranks[1, (y // m) * columns + x // m]


def test_steps_come_from_the_table_or_are_a_hundredth():
    assert [default_step((224, 224), m) for m in (1, 2, 4, 8, 16, 32)] == [500, 100, 20, 10, 5, 1]
    assert [default_step((512, 512), m) for m in (1, 2, 4, 8, 16, 32, 64, 128)] == [10000, 2500, 500, 100, 20, 10, 5, 1]
    assert default_step((224, 224), 7) == 10
    assert default_step((224, 512), 16) == round(14 * 32 / 100)
    assert default_step((8, 8), 4) == 1


@pytest.mark.parametrize("m", [0, 5, 9])
def test_patch_outside_the_image_is_refused(m):
    with pytest.raises(ValueError, match="patch_size must be from 1 to 4 for 4x8 maps"):
        patch_pool(torch.zeros(1, 4, 8), m)


def test_unknown_options_are_refused_by_name():
    with pytest.raises(ValueError, match="pooling must be one of"):
        patch_pool(torch.zeros(1, 4, 4), 2, "median")
    with pytest.raises(ValueError, match="ties must be one of"):
        patch_ranks(torch.zeros(1, 4), "together")
