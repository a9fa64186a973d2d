"""C3, C1C, quantisation and normalisation against closed forms and simple reimplementations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labn.postprocess import Options, apply, c1c, c3, c3_fallback, check_names, normalise, quantise, with_sign
from labn.postprocess.regions import component_mask, contour_mask, threshold


def two_blobs():
    """4x4 with the maximum, and 15x15 with a hole of 4x4."""
    maps = torch.zeros(1, 40, 40, dtype=torch.float64)
    maps[0, 2:6, 2:6] = 3
    maps[0, 20:35, 20:35] = 1
    maps[0, 25:29, 25:29] = 0
    return maps


def random_maps(seed, count=4, side=24):
    coarse = torch.randn(count, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0]


def flooded(binary, start, neighbours):
    """Pixels connected to `start`, without OpenCV."""
    found, frontier = set(), [start]
    while frontier:
        row, column = frontier.pop()
        if (row, column) in found or not (0 <= row < binary.shape[0] and 0 <= column < binary.shape[1]):
            continue
        if binary[row, column]:
            found.add((row, column))
            frontier += [(row + i, column + j) for i, j in neighbours]
    return found


SIDES = [(0, 1), (1, 0), (0, -1), (-1, 0)]
CORNERS = [*SIDES, (1, 1), (1, -1), (-1, 1), (-1, -1)]


def as_mask(pixels, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, column in pixels:
        mask[row, column] = True
    return mask


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_component_equals_a_flood_fill_from_the_maximum(seed, connectivity):
    one = torch.rand(17, 19, generator=torch.Generator().manual_seed(seed))
    binary = one > 0.55
    row, column = divmod(int(one.argmax()), 19)
    expected = as_mask(flooded(binary, (row, column), SIDES if connectivity == 4 else CORNERS), (17, 19))
    assert torch.equal(component_mask(one, binary, Options(connectivity=connectivity)), expected)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_largest_contour_is_the_largest_filled_component(seed, density):
    """A filled outer contour is the complement of a flood fill of the background from outside, per component."""
    binary = torch.rand(15, 18, generator=torch.Generator().manual_seed(seed)) < density
    areas = []
    left = binary.clone()
    while left.any():
        row, column = divmod(int(left.flatten().int().argmax()), 18)
        mask = as_mask(flooded(binary, (row, column), CORNERS), (15, 18))
        outside = flooded(torch.nn.functional.pad(~mask, (1, 1, 1, 1), value=True), (0, 0), SIDES)
        areas.append(17 * 20 - len(outside))
        left &= ~mask
    got = contour_mask(binary.double(), binary, Options())
    assert int(got.sum()) == max(areas)


def test_contour_fills_the_hole_of_a_blob_and_component_does_not():
    one = two_blobs()[0]
    binary = one > 0
    assert int(contour_mask(one, binary, Options()).sum()) == 225
    assert int(component_mask(one, binary, Options(component="largest")).sum()) == 209
    assert int(component_mask(one, binary, Options()).sum()) == 16


def test_c3_keeps_the_overlap_of_contour_and_component():
    maps = two_blobs()
    assert int((c3(maps, component="largest") > 0).sum()) == 209
    assert int((c3(maps, contour="contains_max") > 0).sum()) == 16
    assert not c3_fallback(maps, component="largest").any()


def test_c3_falls_back_to_the_component_without_an_overlap():
    maps = two_blobs()
    assert c3_fallback(maps).tolist() == [True]
    assert torch.equal(c3(maps), c1c(maps))


def test_c3_and_c1c_agree_on_a_single_blob_without_hole():
    maps = torch.zeros(1, 20, 20)
    maps[0, 5:12, 4:9] = torch.rand(7, 5) + 1
    assert torch.equal(c3(maps), c1c(maps))
    assert torch.equal(c3(maps), maps)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_c3_equals_the_map_on_a_subset_of_both_masks(seed):
    maps = random_maps(seed)
    before = maps.clone()
    for one, kept, fallback in zip(maps, c3(maps), c3_fallback(maps)):
        binary = one > one.mean()
        mask = component_mask(one, binary, Options())
        if not fallback:
            mask = mask & contour_mask(one, binary, Options())
        assert torch.equal(kept, torch.where(mask, one, 0))
    assert torch.equal(maps, before)


def test_thresholding_a_signed_map_at_the_mean_again_cuts_deeper():
    maps = torch.full((1, 9, 9), -1.0)
    maps[0, 2:7, 2:5], maps[0, 2:7, 5:7] = -0.5, 2.0
    once = c3(maps)
    assert int((once != 0).sum()) == 25
    assert int((c3(once) != 0).sum()) == 10


def test_constant_map_is_unchanged():
    maps = torch.full((1, 6, 6), 2.0)
    for step in (c3, c1c):
        assert torch.equal(step(maps), maps)


def test_every_option_changes_the_region_as_documented():
    maps = random_maps(3)
    assert torch.equal(c1c(maps, gain=3), 3 * c1c(maps))
    low = c1c(maps, outside="min")
    assert torch.equal(low.amin((1, 2)), maps.amin((1, 2)))
    coarse = c1c(maps, resolution=8)
    assert all(
        ((cell == 0).all() or (cell != 0).all()) for one in coarse for row in one.split(3) for cell in row.split(3, 1)
    )
    assert threshold(maps[0], Options(threshold="absolute", level=0.25)) == 0.25
    assert threshold(maps[0], Options(threshold="quantile", level=0.9)) == pytest.approx(float(maps[0].quantile(0.9)))


@given(st.integers(0, 99), st.floats(-1e-7, 1e-7))
def test_rounding_of_a_zero_sum_does_not_change_the_region(seed, rest):
    """A contrastive map: positive and negative relevance cancel, dead pixels are exactly zero."""
    one = random_maps(seed, count=1)[0]
    one[:12] = 0
    one[12:] -= one[12:].mean()
    moved = one.clone()
    moved[12:] += rest * one.abs().mean()
    assert threshold(one, Options()) == threshold(moved, Options()) == 0
    assert threshold(one + 0.1, Options()) == pytest.approx(0.1)


@pytest.mark.parametrize("value", [0.1, 0.3, -0.7, 0.0])
def test_no_pixel_exceeds_the_mean_of_a_constant_map(value):
    for side in (7, 10, 32, 50):
        for dtype in (torch.float32, torch.float64):
            one = torch.full((side, side), value, dtype=dtype)
            assert not (one > threshold(one, Options())).any()


def test_maps_in_bfloat16_have_the_region_of_their_float32_values():
    maps = random_maps(3).bfloat16()
    for name in ("c3", "c1c", "c3:threshold=quantile", "c1c:threshold=otsu"):
        assert torch.equal(apply(maps, [name]) != 0, apply(maps.double(), [name]) != 0)


def test_otsu_splits_two_populations():
    one = torch.cat([torch.full((10, 20), 1.0), torch.full((10, 20), 5.0)]) + 0.1 * torch.rand(20, 20)
    found = threshold(one, Options(threshold="otsu"))
    assert 1.1 <= found < 5.0


def test_quantisation_equals_its_closed_form():
    maps = random_maps(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    expected = low + ((maps - low) / (high - low) * 7).floor() * (high - low) / 7
    assert torch.allclose(quantise(maps, 8), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from(["floor", "round", "quantile"]))
def test_quantisation_is_monotone_idempotent_and_has_few_levels(seed, levels, mode):
    maps = random_maps(seed).float()
    got = quantise(maps, levels, mode)
    assert torch.equal(quantise(got, levels, mode), got)
    for one, out in zip(maps, got):
        assert len(out.unique()) <= levels
        assert (out.flatten()[one.flatten().argsort()].diff() >= 0).all()
        assert float(out.min()) == float(one.min())
        if mode != "quantile":
            assert float(out.max()) == float(one.max())


def test_quantile_levels_hold_equally_many_pixels():
    maps = torch.randperm(64, generator=torch.Generator().manual_seed(0)).double().view(1, 8, 8)
    _, counts = quantise(maps, 8, "quantile").unique(return_counts=True)
    assert counts.tolist() == [8] * 8


def test_constant_map_is_not_quantised():
    assert torch.equal(quantise(torch.full((2, 4, 4), -1.5)), torch.full((2, 4, 4), -1.5))


def test_with_sign_selects_each_sign():
    maps = torch.tensor([[[-2.0, 0.0, 3.0]]])
    expected = {"all": [-2, 0, 3], "positive": [0, 0, 3], "negative": [2, 0, 0], "absolute": [2, 0, 3]}
    for sign, values in expected.items():
        assert with_sign(maps, sign).flatten().tolist() == values


def test_normalisation_equals_its_definition_by_percentile():
    """Of the mass 1 + 2 + 3 + 4 = 10, 60 % is reached at 3."""
    maps = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]])
    assert normalise(maps, percentile=60).flatten().tolist() == pytest.approx([1 / 3, -2 / 3, 1, 1])
    assert normalise(maps, percentile=100).flatten().tolist() == [0.25, -0.5, 0.75, 1]
    assert torch.equal(normalise(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def test_names_are_applied_in_order():
    maps = random_maps(5)
    assert torch.equal(apply(maps, ["c3", "hq4"]), quantise(c3(maps), 4))
    assert torch.equal(apply(maps, ["hq4", "c3"]), c3(quantise(maps, 4)))
    assert apply(maps, []) is maps


def test_options_after_the_colon_are_applied():
    maps = random_maps(5) - 0.7
    as_published = apply(maps, ["c1c:resolution=8, gain=3"])
    assert torch.equal(as_published, c1c(maps, resolution=8, gain=3))
    assert torch.equal(apply(maps, ["c3:outside=min,threshold=quantile,level=0.8"]), c3(
        maps, outside="min", threshold="quantile", level=0.8
    ))  # fmt: skip
    assert torch.equal(apply(maps, ["hq4:mode=round"]), quantise(maps, 4, "round"))
    assert torch.equal(apply(maps, ["normalise:sign=positive,percentile=90"]), normalise(maps, "positive", 90))


def test_outside_at_the_minimum_ranks_last_in_a_signed_map():
    maps = torch.full((1, 9, 9), -1.0)
    maps[0, 2:7, 2:5], maps[0, 2:7, 5:7] = -0.5, 2.0
    kept = maps > maps.mean()
    assert apply(maps, ["c3"])[kept].min() < apply(maps, ["c3"])[~kept].max()
    assert apply(maps, ["c3:outside=min"])[kept].min() > apply(maps, ["c3:outside=min"])[~kept].max()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: check_names(["c3:holes=2"]), "option 'holes=2'; options are key=value of threshold, level"),
    (lambda: check_names(["c3:outside"]), "option 'outside'"),
    (lambda: check_names(["c1c:contour=first"]), "option 'contour=first'"),
    (lambda: check_names(["absolute:gain=2"]), "of none"),
    (lambda: check_names(["c3:outside=max"]), "outside='max' is not one of"),
    (lambda: check_names(["hq1"]), "levels must be at least 2"),
    (lambda: check_names(["c4"]), "'c4' is not one of c1c, c3"),
    (lambda: c3(torch.zeros(1, 1, 4, 4)), r"maps must be \(B, H, W\)"),
    (lambda: c3(torch.zeros(1, 4, 4), contour="second"), "contour='second'"),
    (lambda: Options(threshold="quantile", level=2), "level must lie in"),
    (lambda: quantise(torch.zeros(1, 2, 2), 1), "levels must be at least 2"),
    (lambda: quantise(torch.zeros(1, 2, 2), 8, "ceil"), "mode='ceil'"),
    (lambda: normalise(torch.zeros(1, 2, 2), percentile=0), "percentile must lie in"),
    (lambda: with_sign(torch.zeros(1, 2, 2), "up"), "sign='up'"),
])  # fmt: skip
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_first_contour_is_one_of_the_contours():
    one = two_blobs()[0]
    got = contour_mask(one, one > 0, Options(contour="first"))
    assert int(got.sum()) in (16, 225)
    assert np.isfinite(c3(two_blobs(), contour="first").numpy()).all()
