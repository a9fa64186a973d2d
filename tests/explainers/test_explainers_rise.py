"""RISE against its definition, the statistics of its samplers, and invariances of its map."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import DeepTail, pictures, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labn.explainers import RISE, ReleasedRISE
from labn.explainers.perturbation.rise import GROUP, MaskBank
from labn.results.fingerprints import describe

TARGETS = torch.tensor([0, 2])
UNBIASED = ["bernoulli", "stratified", "orthogonal"]


def masks_by_definition(bank: MaskBank, size: tuple[int, int]) -> Tensor:
    """Enlarge every grid to (s + 1) cells, crop at its shift: one mask at a time."""
    side = bank.grids.shape[-1]
    cells = [-(-length // side) for length in size]
    masks = []
    for grid, shift in zip(bank.grids, bank.shifts):
        large = [(side + 1) * cell for cell in cells]
        up = F.interpolate(grid[None, None].double(), large, mode="bilinear", align_corners=False)[0, 0]
        top, left = (int(part * cell) for part, cell in zip(shift, cells))
        masks.append(up[top : top + size[0], left : left + size[1]])
    return torch.stack(masks)


@pytest.mark.parametrize("sampler", [*UNBIASED, "released"])
@pytest.mark.parametrize("size", [(16, 20), (21, 9)])
def test_masks_equal_their_definition(sampler: str, size: tuple[int, int]) -> None:
    bank = MaskBank.draw(130, 4, 0.5, 3, sampler)
    rendered = bank.render(0, 130, pictures(1, *size))
    assert torch.allclose(rendered, masks_by_definition(bank, size), atol=1e-12)
    assert torch.equal(rendered[50:60], bank.render(50, 60, pictures(1, *size)))
    assert len(bank) == 130
    assert bank.shifts.min() >= 0
    assert bank.shifts.max() < 1


@pytest.mark.parametrize("sampler", [*UNBIASED, "released"])
def test_fewer_masks_are_the_first_ones(sampler: str) -> None:
    few, many = MaskBank.draw(100, 3, 0.5, 1, sampler), MaskBank.draw(400, 3, 0.5, 1, sampler)
    assert torch.equal(few.grids, many.grids[:100])
    assert torch.equal(few.shifts, many.shifts[:100])
    assert not torch.equal(few.grids, MaskBank.draw(100, 3, 0.5, 2, sampler).grids)


@pytest.mark.parametrize(("sampler", "p"), [("bernoulli", 0.3), ("stratified", 0.3), ("orthogonal", 0.5)])
def test_every_cell_is_kept_with_probability_p(sampler: str, p: float) -> None:
    """Over independent banks this holds for the first mask alone too: each mask is a Bernoulli(p) grid."""
    first = torch.stack([MaskBank.draw(1, 3, p, seed, sampler).grids[0] for seed in range(2000)]).double()
    error = (p * (1 - p) / 2000) ** 0.5
    assert (first.mean(0) - p).abs().max() < 4 * error
    pairs = torch.corrcoef(first.flatten(1).T) - torch.eye(9)
    assert pairs.abs().max() < 4.5 / 2000**0.5
    mean = MaskBank.draw(20_000, 7, p, 0, sampler).render(0, 20_000, pictures(1, 14, 14)).mean(0)
    assert (mean - p).abs().max() < 0.015


def test_released_sampler_keeps_the_share_phi_of_p() -> None:
    grids = MaskBank.draw(5000, 9, 0.3, 0, "released").grids
    assert abs(float(grids.double().mean()) - 0.6179) < 0.003
    explainer = ReleasedRISE()
    assert (explainer.n_masks, explainer.grid, explainer.p, explainer.sampler) == (10_000, 9, 0.3, "released")


@pytest.mark.parametrize(("sampler", "p"), [("stratified", 0.25), ("orthogonal", 0.5)])
def test_balanced_groups_keep_every_pixel_equally(sampler: str, p: float) -> None:
    bank = MaskBank.draw(2 * GROUP, 7, p, 0, sampler)
    for start in (0, GROUP):
        mean = bank.render(start, start + GROUP, pictures(1, 30, 30)).mean(0)
        assert torch.allclose(mean, torch.full_like(mean, p), atol=1e-12)
        assert len(bank.shifts[start : start + GROUP].unique(dim=0)) == 1
    assert not torch.equal(bank.shifts[0], bank.shifts[GROUP])


def test_orthogonal_shows_three_cells_in_all_states_equally() -> None:
    cells = MaskBank.draw(GROUP, 7, 0.5, 5, "orthogonal").grids.flatten(1)
    for three in itertools.islice(itertools.combinations(range(0, 49, 4), 3), 100):
        state = (cells[:, list(three)].long() * torch.tensor([1, 2, 4])).sum(1)
        assert torch.bincount(state, minlength=8).tolist() == [GROUP // 8] * 8


@pytest.mark.parametrize("sampler", UNBIASED)
def test_rise_equals_its_definition(sampler: str) -> None:
    model, images = seeded(DeepTail), pictures()
    masks = masks_by_definition(MaskBank.draw(200, 5, 0.5, 2, sampler), (16, 20))
    expected = []
    with torch.no_grad():
        for image, target in zip(images, TARGETS):
            p = model(image * masks[:, None]).softmax(1)[:, target]
            expected.append((p[:, None, None] * masks).sum(0) / (200 * 0.5))
    found = RISE(200, grid=5, seed=2, sampler=sampler)(model, images, TARGETS)
    assert torch.allclose(found, torch.stack(expected).float(), atol=1e-6)


def test_maps_of_all_classes_equal_single_maps() -> None:
    model, images, rise = seeded(DeepTail), pictures(), RISE(300)
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    every = torch.arange(4).expand(2, 4)
    found = rise.explain_classes(model, images, every, standard_error=True)
    assert sum(calls) <= 300 * 2 + 4  # and the engine's probes
    assert found.maps.shape == found.standard_error.shape == (2, 4, 16, 20)
    for c in range(4):
        assert torch.allclose(found.maps[:, c].float(), rise(model, images, torch.full((2,), c)), atol=1e-6)
    # Probabilities sum to 1, so the maps sum to the masks' own mean over p.
    mean = MaskBank.draw(300, 7, 0.5, 0, "bernoulli").render(0, 300, images).mean(0) / 0.5
    assert torch.allclose(found.maps.sum(1), mean.expand(2, -1, -1), atol=1e-6)


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in tensors that were made inside and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.views: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.views[storage._cdata] += 1
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(tensor, self._release, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out

    def _release(self, key: int) -> None:
        self.views[key] -= 1
        if not self.views[key]:
            del self.views[key], self.sizes[key]


def peak_of_rise(n_masks: int, classes: int, images: Tensor) -> int:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = pooled.append(nn.Linear(4, classes)).eval()
    with LiveBytes() as live:
        RISE(n_masks)(model, images, torch.tensor([1]))
    return live.peak


def test_memory_depends_neither_on_the_number_of_masks_nor_on_that_of_classes() -> None:
    """A mask of 96 x 96 is 36 KiB, a grid with its shift 65 bytes (twice that, and the draw, while it is made)."""
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    few = peak_of_rise(256, 10, images)
    assert few > 128 * 96 * 96 * 4  # the masks of a group are seen
    assert peak_of_rise(2048, 10, images) - few < (2048 - 256) * 400
    # A map in float64 per class would be 72 KiB; a row of logits per mask of a group is 0.5 KiB per class.
    assert peak_of_rise(256, 1000, images) - few < (1000 - 10) * 96 * 96 * 8 / 20


class Constant(nn.Module):
    """Probabilities (0.25, 0.75) for every image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * 0 + torch.tensor([0.25, 0.75], dtype=x.dtype).log()


def test_the_map_of_a_constant_model_is_the_mean_mask() -> None:
    found = RISE(512, sampler="stratified")(Constant(), pictures(), torch.tensor([0, 1]))
    plain = RISE(512)(Constant(), pictures(), torch.tensor([0, 1]))
    mean = MaskBank.draw(512, 7, 0.5, 0, "bernoulli").render(0, 512, pictures()).mean(0).float()
    assert torch.allclose(plain[1], 0.75 * mean / 0.5, atol=1e-6)
    assert (plain[1] - 0.75).abs().max() > 0.01
    assert torch.allclose(found[1], torch.tensor(0.75), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"p": 0.3}, {"sampler": "orthogonal"}, {"sampler": "released"}])
def test_control_makes_the_map_of_a_constant_model_constant(options: dict[str, Any]) -> None:
    """Exactly, with any number of masks: the plain map shows which pixels were kept more often."""
    kept = 0.6914624612740131 if options.get("sampler") == "released" else options.get("p", 0.5)
    for n_masks in (1, 200):
        found = RISE(n_masks, control=True, **options)(Constant(), pictures().double(), torch.tensor([0, 1]))
        for c, probability in enumerate((0.25, 0.75)):
            expected = torch.tensor(probability * kept / options.get("p", 0.5))
            assert torch.allclose(found[c].float(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 20), (21, 9)])
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_pooled_covariance_is_that_of_many_masks(size: tuple[int, int], p: float) -> None:
    bank, like = MaskBank.draw(20_000, 3, p, 0, "bernoulli"), torch.zeros(1, 1, *size, dtype=torch.float64)
    masks = bank.render(0, len(bank), like)
    pooled = bank.pooled(masks) - p
    sampled = (pooled.T @ masks.flatten(1) / len(bank)).view(-1, *size)
    assert torch.allclose(sampled, p * (1 - p) * bank.pooled_covariance(like), atol=0.006)


class OfPooledMask(nn.Module):
    """Probability of class 1: 0.1 and a power of a weighted mean of the 9 parts of an image."""

    weights = torch.linspace(0, 0.2, 9, dtype=torch.float64)

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        p = 0.1 + (F.adaptive_avg_pool2d(x.double().mean(1), 3).flatten(1) @ self.weights) ** self.power
        return torch.stack([1 - p, p], 1).log()


def test_control_is_exact_where_the_model_is_linear_in_the_mask() -> None:
    images, target = torch.ones(1, 1, 12, 12, dtype=torch.float64), torch.tensor([1])
    covariance = MaskBank.draw(1, 3, 0.5, 0, "bernoulli").pooled_covariance(images).flatten(1)
    expected = 0.1 + 0.5 * OfPooledMask.weights.sum() + 0.5 * OfPooledMask.weights @ covariance
    plain, found = (RISE(500, grid=3, control=c)(OfPooledMask(1), images, target).flatten() for c in (False, True))
    assert (found - expected).abs().max() < 2e-3  # what the ridge of 9 / 500 leaves
    assert (plain - expected).abs().max() > 0.02


def test_control_does_not_change_the_expectation() -> None:
    images, target = torch.ones(1, 1, 12, 12, dtype=torch.float64), torch.tensor([1])
    many = RISE(40_000, grid=3, chunk_size=4096)(OfPooledMask(2), images, target)
    maps = torch.cat([RISE(500, 3, seed=s, control=True)(OfPooledMask(2), images, target) for s in range(10)])
    plain = torch.cat([RISE(500, 3, seed=s)(OfPooledMask(2), images, target) for s in range(10)])
    assert (maps.mean(0) - many).abs().max() < 0.02
    assert maps.std(0).mean() < 0.3 * plain.std(0).mean()


def test_the_error_of_controlled_maps_is_their_spread_over_seeds() -> None:
    images, classes = torch.ones(1, 1, 12, 12, dtype=torch.float64), torch.tensor([[1]])
    rises = [RISE(400, grid=3, seed=seed, control=True) for seed in range(40)]
    found = [rise.explain_classes(OfPooledMask(3), images, classes, standard_error=True) for rise in rises]
    spread = torch.stack([one.maps for one in found]).std(0).mean()
    told = torch.stack([one.standard_error for one in found]).mean()
    assert 0.75 < float(told / spread) < 1.3


def test_control_works_where_no_mask_removes_anything() -> None:
    found = RISE(4, p=1.0, control=True)(seeded(DeepTail), pictures(), torch.tensor([0, 1]))
    assert torch.allclose(found, RISE(4, p=1.0)(seeded(DeepTail), pictures(), torch.tensor([0, 1])), atol=1e-6)


def test_controlled_maps_of_classes_equal_single_maps_and_have_errors() -> None:
    model, images, rise = seeded(DeepTail), pictures(), RISE(300, control=True)
    classes = torch.arange(4).expand(2, 4)
    found = rise.explain_classes(model, images, classes, standard_error=True)
    plain = RISE(300).explain_classes(model, images, classes, standard_error=True)
    assert (found.standard_error.mean((2, 3)) < plain.standard_error.mean((2, 3))).all()
    assert torch.allclose(found.maps[:, 2], rise(model, images, torch.full((2,), 2)).to(found.maps), atol=1e-6)
    # Probabilities sum to 1, and the controlled map of the constant 1 is 1.
    assert torch.allclose(found.maps.sum(1), torch.tensor(1.0).to(found.maps), atol=1e-5)


def test_control_is_no_part_of_the_key_by_default() -> None:
    assert "control" not in describe(RISE())
    assert "control" not in describe(ReleasedRISE())
    assert describe(RISE(control=True))["control"] is True


def test_standard_error_predicts_the_spread_over_seeds() -> None:
    model, images = seeded(DeepTail), pictures(1)
    found = [
        RISE(1280, seed=seed).explain_classes(model, images, torch.tensor([[1]]), standard_error=True)
        for seed in range(12)
    ]
    spread = torch.stack([f.maps for f in found]).std(0).mean()
    claimed = torch.stack([f.standard_error for f in found]).mean()
    assert 0.75 < float(claimed / spread) < 1.33


def test_rise_map_does_not_depend_on_chunk_and_batch_size() -> None:
    model, images = seeded(DeepTail), pictures(3)
    whole = RISE(150)(model, images, torch.tensor([0, 1, 2]))
    for chunk in (1, 7, 1000):
        assert torch.allclose(RISE(150, chunk_size=chunk)(model, images, torch.tensor([0, 1, 2])), whole, atol=1e-6)
    alone = torch.cat([RISE(150)(model, images[i : i + 1], torch.tensor([i])) for i in range(3)])
    assert torch.allclose(alone, whole, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_masks": 0}, "n_masks and grid must be at least 1"),
        ({"grid": 0}, "n_masks and grid must be at least 1"),
        ({"p": 0.0}, "p must be above 0"),
        ({"sampler": "sobol"}, "sampler must be one of"),
        ({"sampler": "orthogonal", "p": 0.3}, "needs p=0.5"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RISE(**arguments)


def test_bad_classes_and_standard_errors_are_refused() -> None:
    model, images = seeded(DeepTail), pictures()
    with pytest.raises(ValueError, match=r"classes must be \(2, T\)"):
        RISE(10).explain_classes(model, images, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="standard_error needs n_masks of at least 256"):
        RISE(100).explain_classes(model, images, torch.tensor([[1], [2]]), standard_error=True)
    with pytest.raises(ValueError, match="targets must be from 0 to 3"):
        RISE(10).explain_classes(model, images, torch.tensor([[1], [4]]))
