"""Completeness, sensitivity-n, mu-fidelity, infidelity, ROAD: closed forms in float64."""

import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers import IntegratedGradients
from labn.metrics import ROAD, Completeness, Infidelity, MuFidelity, SensitivityN, metric_by_name
from labn.metrics.functional import completeness_gap, scaled_infidelity, subset_correlation
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.imputation import NEIGHBOURS, linear_imputation

SIZE = 12
INDICES, TARGETS = torch.tensor([4, 7]), torch.tensor([0, 1])


class Linear(nn.Module):
    """Logits w_c x."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (2, channels, SIZE, SIZE)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight)


def pictures(channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, channels, SIZE, SIZE, generator=generator, dtype=torch.float64)


def contributions(model: Linear, images: Tensor) -> Tensor:
    """w_c x, which sums to the logit; black is 0."""
    return (images * model.weight[TARGETS]).sum(1).detach()


def score(metric, maps: Tensor, model: nn.Module | None = None, images: Tensor | None = None, **more) -> Tensor:
    model, images = model or Linear(), pictures() if images is None else images
    values = metric.score(model, images, maps, TARGETS, INDICES, **more)
    return values[metric.names[0]]


def test_contributions_of_a_linear_model_are_faithful_in_every_sense():
    maps = contributions(Linear(), pictures())
    options = {"draws": 8, "patch_size": 3}
    assert score(Completeness(), maps).abs().max() < 1e-12
    assert (score(SensitivityN(**options), maps) - 1).abs().max() < 1e-12
    assert score(Infidelity(**options), maps).abs().max() < 1e-12
    # Another unit does not matter to correlation and scaled infidelity, and a wrong sign does to the correlation.
    assert (score(SensitivityN(**options), -3 * maps) + 1).abs().max() < 1e-12
    assert score(Infidelity(**options), -3 * maps).abs().max() < 1e-12
    assert (score(Completeness(), 3 * maps) - 2).abs().max() < 1e-12


def test_mu_fidelity_of_a_linear_model_is_one_and_that_of_no_information_zero():
    maps = contributions(Linear(), pictures())
    metric = MuFidelity(draws=16, grid=4)
    assert (score(metric, maps) - 1).abs().max() < 1e-12
    assert (score(metric, -3 * maps) + 1).abs().max() < 1e-12
    assert score(metric, torch.ones(2, SIZE, SIZE)).tolist() == [0, 0]


@pytest.mark.parametrize(("grid", "side"), [(4, 3), (5, 3), (12, 1)])
def test_mu_fidelity_is_sensitivity_n_at_one_size_on_cells(grid, side):
    """The same sets of the same patches, and so the same forwards, where the patches are the cells."""
    maps = torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    engine = PerturbationEngine(Linear(), pictures(), indices=INDICES)
    found = score(MuFidelity(draws=16, share=0.3, grid=grid), maps, cache=engine)
    ran = engine.forwards
    assert ran == 2 * 17
    assert torch.equal(found, score(SensitivityN(draws=16, sizes=[0.3], patch_size=side), maps, cache=engine))
    assert engine.forwards == ran


def test_completeness_of_integrated_gradients_and_other_fills():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    maps = IntegratedGradients(60, 0.0)(model, pictures(), TARGETS)
    assert score(Completeness(fill="mean"), maps, model).max() < 1e-5  # maps are float32
    assert score(Completeness(fill="black", mean=[0.5], std=[0.5]), maps, model).min() > 1e-3
    with torch.no_grad():
        drops = (model(pictures()) - model(torch.zeros_like(pictures()))).softmax(1)  # any numbers
    assert completeness_gap(maps, torch.zeros(2)).isnan().all()
    assert drops.shape == (2, 2)


def test_a_map_without_information_has_the_values_of_chance():
    constant = torch.ones(2, SIZE, SIZE)
    options = {"draws": 8, "patch_size": 3}
    assert score(SensitivityN(**options), constant).tolist() == [0, 0]
    zero = score(Infidelity(**options), torch.zeros(2, SIZE, SIZE))
    assert (score(Infidelity(**options), constant) <= zero + 1e-12).all()
    assert (zero > 0).all()


def test_infidelity_with_the_optimal_scale_is_a_least_squares_residual():
    generator = torch.Generator().manual_seed(0)
    sums, drops = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for s, d, found in zip(sums.flatten(1), drops.flatten(1), scaled_infidelity(sums, drops)):
        _, residual, *_ = np.linalg.lstsq(s.numpy()[:, None], d.numpy(), rcond=None)
        assert float(found) == pytest.approx(residual[0] / 20, abs=1e-12)


def test_sensitivity_n_is_the_mean_of_pearsons_correlations():
    generator = torch.Generator().manual_seed(0)
    sums, drops = (torch.randn(2, 3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = [np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, d)]) for s, d in zip(sums.numpy(), drops.numpy())]
    assert subset_correlation(sums, drops).tolist() == pytest.approx(expected, abs=1e-12)
    sums[:, 1] = 4.0
    expected = [
        np.mean([np.corrcoef(s[k], d[k])[0, 1] for k in (0, 2)]) * 2 / 3 for s, d in zip(sums.numpy(), drops.numpy())
    ]
    assert subset_correlation(sums, drops).tolist() == pytest.approx(expected, abs=1e-12)


def test_sets_are_shared_by_maps_and_metrics_and_depend_on_the_index_alone():
    model, images = Linear(), pictures()
    engine = PerturbationEngine.for_model(model, images, indices=INDICES)
    options = {"draws": 4, "sizes": [0.25, 0.5], "patch_size": 3}
    for seed in range(3):
        maps = torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        both = [score(kind(**options), maps, model, images, cache=engine) for kind in (SensitivityN, Infidelity)]
    assert engine.forwards == 2 * (4 * 2 + 1)
    for kind, whole in zip((SensitivityN, Infidelity), both):
        one = kind(**options).score(model, images[1:], maps[1:], TARGETS[1:], INDICES[1:])
        assert torch.allclose(one[kind.name], whole[1:], atol=1e-12)
        other = kind(**options, seed=1).score(model, images[1:], maps[1:], TARGETS[1:], INDICES[1:])
        assert not torch.allclose(one[kind.name], other[kind.name])


def solved(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The imputed image by a direct sparse solver, pixel by pixel."""
    height, width = known.shape
    number = -np.ones(known.shape, dtype=int)
    number[~known] = np.arange((~known).sum())
    matrix, right = lil_matrix(((~known).sum(), (~known).sum())), np.zeros((~known).sum())
    for y, x in np.argwhere(~known):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                inside, weight = 0 <= y + dy < height and 0 <= x + dx < width, NEIGHBOURS[dy + 1][dx + 1]
                if not inside or weight == 0:
                    continue
                matrix[number[y, x], number[y, x]] += weight
                if known[y + dy, x + dx]:
                    right[number[y, x]] += weight * image[y + dy, x + dx]
                else:
                    matrix[number[y, x], number[y + dy, x + dx]] -= weight
    filled = image.copy()
    filled[~known] = spsolve(matrix.tocsr(), right)
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_imputation_equals_a_direct_solver(share):
    generator = torch.Generator().manual_seed(0)
    images = pictures(2)
    known = torch.rand(2, SIZE, SIZE, generator=generator) > share
    found = linear_imputation(images, known, tolerance=1e-12)
    for image, mask, filled in zip(images, known, found):
        for channel, result in zip(image, filled):
            assert result.numpy() == pytest.approx(solved(channel.numpy(), mask.numpy()), abs=1e-9)
    assert torch.equal(found[:, :, known.all(0)], images[:, :, known.all(0)])


def test_imputation_keeps_known_pixels_and_does_not_depend_on_other_images():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    known = torch.rand(6, 16, 16, generator=generator) > torch.linspace(0.05, 0.95, 6).view(6, 1, 1)
    found = linear_imputation(images, known)
    kept = known.unsqueeze(1).expand_as(images)
    assert torch.equal(found[kept], images[kept])
    assert torch.equal(linear_imputation(images, torch.ones_like(known)), images)
    for k in range(6):
        assert torch.allclose(linear_imputation(images[k : k + 1], known[k : k + 1])[0], found[k], atol=1e-6)
    flat = linear_imputation(torch.full_like(images, 0.3) * kept, known)
    assert torch.allclose(flat, torch.full_like(images, 0.3), atol=1e-4)


def test_imputation_refuses_what_it_cannot_fill():
    with pytest.raises(InputError, match="every image needs a known pixel"):
        linear_imputation(torch.zeros(1, 1, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"known must be \(1, 3, 3\)"):
        linear_imputation(torch.zeros(1, 1, 3, 3), torch.zeros(1, 3, 4, dtype=torch.bool))


class Mean(nn.Module):
    """Logits (-m, m) of the image's mean; with softmax a monotone function of it."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def test_road_by_hand():
    """One row of 0 and 1 alternating; the map is the image. Each step is solved and averaged directly."""
    images = pictures().abs()
    maps = images[:, 0].clone()
    metric = ROAD(fractions=[0.25, 0.5], noise=0.0, probability="logit")
    found = score(metric, maps, Mean(), images)
    expected = []
    for image, heat, target in zip(images[:, 0].numpy(), maps.numpy(), TARGETS.tolist()):
        order, gaps = heat.ravel().argsort(), []
        for count in (36, 72):
            values = []
            for removed in (order[:count], order[::-1][:count]):
                known = np.ones(SIZE * SIZE, dtype=bool)
                known[removed] = False
                values.append(solved(image, known.reshape(SIZE, SIZE)).mean() * (2 * target - 1))
            gaps.append(values[0] - values[1])
        expected.append(np.mean(gaps) / 2)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert (found * (2 * TARGETS - 1) > 0).all()
    assert torch.allclose(score(metric, -maps, Mean(), images), -found, atol=1e-4)


def test_road_does_not_depend_on_batch_and_chunk_and_has_noise():
    maps = torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    metric = ROAD(fractions=[0.3, 0.8])
    whole = score(metric, maps)
    one = metric.score(Linear(), pictures()[1:], maps[1:], TARGETS[1:], INDICES[1:], cache=None)["road"]
    small = ROAD(fractions=[0.3, 0.8], chunk_size=1)
    assert torch.allclose(one, whole[1:], atol=1e-6)
    assert torch.allclose(score(small, maps), whole, atol=1e-6)
    assert not torch.allclose(score(ROAD(fractions=[0.3, 0.8], noise=0.0), maps), whole, atol=1e-6)
    assert score(metric, torch.ones(2, SIZE, SIZE)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sensitivity_n", {"draws": 1}, "draws must be at least 2"),
        ("infidelity", {"sizes": [0.5, 1.0]}, "sizes between 0 and 1"),
        ("mufidelity", {"share": 1.0}, "sizes between 0 and 1"),
        ("mufidelity", {"grid": 1}, "grid must be at least 2"),
        ("irof", {"n_segments": 0}, "n_segments must be at least 1"),
        ("irof", {"probability": "logit"}, "must be softmax or sigmoid"),
        ("mprt_layers", {"n_stages": 0}, "n_stages must be at least 1"),
        ("smprt", {"draws": 0}, "draws must be at least 1"),
        ("emprt", {"bins": 1}, "bins must be at least 2"),
        ("road", {"fractions": [0.0]}, "fractions must be between 0 and 1"),
        ("max_sensitivity", {"radius": 0.0}, "radius above 0"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        metric_by_name(name, **settings)


def test_images_with_fewer_pixels_than_cells_are_refused():
    with pytest.raises(InputError, match="grid must be at most 12"):
        score(MuFidelity(grid=13), torch.ones(2, SIZE, SIZE))
