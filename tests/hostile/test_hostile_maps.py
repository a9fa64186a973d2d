"""Maps of any shape and any value: stored as they are, scored within their bounds, or refused with a sentence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from labn import evaluate
from labn.results.store import ResultStore

SIDES = st.integers(1, 24)
VALUES = st.sampled_from([math.nan, math.inf, -math.inf])


class Bright(nn.Module):
    """Two classes by brightness."""

    def forward(self, images):
        level = images.mean(dim=(1, 2, 3))
        return torch.stack([-level, level], dim=1)


@settings(max_examples=50, deadline=None)
@given(height=SIDES, width=SIDES, patch=st.integers(1, 30), seed=st.integers(0, 999), ties=st.booleans())
def test_any_shape_and_patch_size_scores_within_bounds_or_raises(height, width, patch, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    images, maps = (
        torch.randn(2, 3, height, width, generator=generator),
        torch.randn(2, height, width, generator=generator),
    )
    maps = maps.round() if ties else maps
    given_to = Bright(), images, maps, torch.tensor([0, 1]), [f"pid{patch}"]
    if patch > min(height, width):
        with pytest.raises(ValueError, match=rf"patch_size must be from 1 to {min(height, width)} .*, got {patch}\.$"):
            evaluate(*given_to, mean=None, std=None)
        return
    scores = evaluate(*given_to, mean=None, std=None)
    value = scores[f"pid{patch}"]
    assert value.shape == (2,)
    assert ((value >= -1) & (value <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(height=SIDES, width=SIDES, value=VALUES, data=st.data())
def test_a_map_that_is_not_finite_raises(height, width, value, data):
    maps = torch.zeros(2, height, width)
    place = data.draw(st.tuples(st.integers(0, 1), st.integers(0, height - 1), st.integers(0, width - 1)))
    maps[place] = value
    with pytest.raises(ValueError, match=r"NaN|finite|infinite"):
        evaluate(Bright(), torch.rand(2, 3, height, width), maps, metrics=["pid1"], mean=None, std=None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), SIDES, SIDES, st.one_of(st.none(), VALUES), st.integers(0, 10**8))
def test_stored_maps_of_any_shape_are_read_bit_by_bit(tmp_path_factory, count, height, width, special, first):
    maps = torch.randn(count, height, width)
    if special is not None:
        maps[0, 0, 0] = special
    store = ResultStore(tmp_path_factory.mktemp("maps"))
    store.add_maps("a", "k", torch.arange(first, first + count), maps)
    found = store.maps("a", "k", range(first, first + count + 1))
    assert sorted(found) == list(range(first, first + count))
    for number in range(count):
        assert torch.equal(found[first + number].view(torch.int32), maps[number].view(torch.int32))


def test_zero_images_raise():
    with pytest.raises(ValueError, match="images is an empty batch; give at least one"):
        evaluate(Bright(), torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8), metrics=["pid4"], mean=None, std=None)
