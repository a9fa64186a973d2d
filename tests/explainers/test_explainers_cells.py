"""Sobol attribution and KernelSHAP over a grid of cells: closed forms in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_networks import pictures, seeded
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers import KernelSHAP, SobolAttribution
from labn.explainers.perturbation.cells import cell_of, cells_to_pixels
from labn.inference.modes import explaining
from labn.perturbation.coalitions import kernel_design, shapley_design
from labn.perturbation.engine import PerturbationEngine

WEIGHTS = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)


class OfCells(nn.Module):
    """Logits (0, g(m)) of a white image, where m (B, 4) are the means of its four quarters, that is their masks."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        return torch.stack([torch.zeros_like(cells[:, 0]), self.function(cells)], 1)


def attribute(explainer: SobolAttribution | KernelSHAP, model: nn.Module, images: Tensor, target: int = 1) -> Tensor:
    with explaining(model):
        return explainer.attribute(model, images, torch.full((len(images),), target), None)


WHITE = torch.ones(1, 3, 6, 6, dtype=torch.float64)


def test_cells_differ_by_one_position_and_cover_the_image() -> None:
    assert cell_of(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    pixels = cells_to_pixels(torch.arange(6.0)[None, :4], 2, (3, 5))
    assert pixels.tolist() == [[[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 3, 3]]]


def test_sobol_indices_of_an_additive_network_are_its_squared_weights() -> None:
    found = attribute(SobolAttribution(2, 4096), OfCells(lambda m: m @ WEIGHTS), WHITE).flatten()
    assert torch.allclose(found, WEIGHTS**2 / 14, atol=2e-3)
    assert found[2] == 0


def test_sobol_indices_count_interactions_for_every_partner() -> None:
    """f = m0 m1: Var f = 7/144, of which 3/144 are of each alone and 1/144 of both: T = 4/7 for either."""
    found = attribute(SobolAttribution(2, 4096), OfCells(lambda m: m[:, 0] * m[:, 1]), WHITE).flatten()
    assert torch.allclose(found, torch.tensor([4 / 7, 4 / 7, 0, 0]).double(), atol=3e-3)


def test_sobol_indices_of_few_masks_equal_jansens_estimator() -> None:
    explainer, model = SobolAttribution(2, 8, seed=3), OfCells(lambda m: m.prod(1) + m[:, 3])
    a, b = explainer._pairs()
    outputs = model.function(a)
    expected = []
    for cell in range(4):
        mixed = a.clone()
        mixed[:, cell] = b[:, cell]
        expected.append((outputs - model.function(mixed)).square().sum() / (2 * 8) / outputs.var())
    assert torch.allclose(attribute(explainer, model, WHITE).flatten(), torch.stack(expected), atol=1e-12)
    assert attribute(explainer, model, WHITE, target=0).abs().max() == 0


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_kernelshap_with_all_coalitions_has_shapleys_values(cells: int) -> None:
    kernel, exact = kernel_design(cells), shapley_design(cells)
    worth = torch.randn(2**cells, generator=torch.Generator().manual_seed(cells), dtype=torch.float64)
    number = 1 << torch.arange(cells)
    found, expected = (design.weights @ worth[(design.kept * number).sum(1)] for design in (kernel, exact))
    assert torch.allclose(found, expected, atol=1e-12)


def test_kernelshap_of_a_network_is_the_exact_shapley_value_of_its_cells() -> None:
    model, images = seeded(), pictures(2, 9, 11)
    maps = attribute(KernelSHAP(2, baseline=0.3), model, images)
    design = shapley_design(4)
    for image, found in zip(images, maps):
        shown = cells_to_pixels(design.kept.double(), 2, (9, 11)).unsqueeze(1)
        with torch.no_grad():
            scores = model(image * shown + 0.3 * (1 - shown))[:, 1]
        sums = [found[:5, :6].sum(), found[:5, 6:].sum(), found[5:, :6].sum(), found[5:, 6:].sum()]
        assert torch.allclose(torch.stack(sums), design.weights @ scores, atol=1e-10)


@pytest.mark.parametrize("coalitions", [2, 10, 120])
def test_few_coalitions_keep_the_sum_and_are_exact_for_additive_networks(coalitions: int) -> None:
    design = kernel_design(16, coalitions)
    assert len(design.kept) <= coalitions + 2
    strengths = torch.linspace(-1, 2, 16, dtype=torch.float64)
    values = design.weights @ (design.kept.double() @ strengths + 5)
    assert torch.allclose(values.sum(), strengths.sum(), atol=1e-12)
    if coalitions == 120:
        assert torch.allclose(values, strengths, atol=1e-10)


def test_drawn_coalitions_come_near_the_exact_values() -> None:
    exact, drawn = shapley_design(8), kernel_design(8, 200)
    strengths = torch.linspace(0, 1, 8, dtype=torch.float64)

    def worth(kept: Tensor) -> Tensor:
        return (kept.double() @ strengths).square()

    expected = exact.weights @ worth(exact.kept)
    assert (drawn.weights @ worth(drawn.kept) - expected).abs().max() < 0.05 * expected.max()


def test_the_seed_decides_the_masks() -> None:
    for make in (lambda seed: SobolAttribution(3, 4, seed), lambda seed: KernelSHAP(4, 20, seed)):
        assert torch.equal(make(1).masks(), make(1).masks())
        assert not torch.equal(make(1).masks(), make(2).masks())


def test_one_set_of_masks_serves_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    run = PerturbationEngine.run
    monkeypatch.setattr(PerturbationEngine, "run", lambda self, make, n: (counts.append(n), run(self, make, n))[1])
    attribute(SobolAttribution(2, 4), seeded(), pictures(2))
    attribute(KernelSHAP(2), seeded(), pictures(2))
    assert counts == [2, 20, 20, 2, 16, 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SobolAttribution(0), "grid must be at least 1"),
        (lambda: SobolAttribution(103), "at most 102"),
        (lambda: SobolAttribution(n_masks=1), "n_masks must be at least 2"),
        (lambda: SobolAttribution(score="loss"), "score must be one of"),
        (lambda: KernelSHAP(coalitions=1), "coalitions must be at least 2"),
        (lambda: attribute(KernelSHAP(7), OfCells(lambda m: m.sum(1)), WHITE), "grid must be at most 6"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
