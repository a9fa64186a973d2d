"""KernelSHAP over patches: Shapley values of cells of the image by weighted least squares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from labn.errors import InputError
from labn.explainers.perturbation.cells import CellMasks, cells_to_pixels
from labn.perturbation.coalitions import Design, kernel_design


@lru_cache(maxsize=4)
def _design(cells: int, coalitions: int, seed: int) -> Design:
    return kernel_design(cells, coalitions, seed)


class KernelSHAP(CellMasks):
    """KernelSHAP (Lundberg and Lee, NeurIPS 2017) over a grid of cells: see `labn.perturbation.coalitions`.

    The Shapley value of a cell is spread evenly over its pixels, so that the map sums to y_c(x) - y_c(baseline). With
    2^(grid^2) - 2 <= `coalitions` the values are exact. One set of coalitions serves all images.

    Args:
        grid: cells per side.
        coalitions: largest number of shown sets of cells, besides none and all; one forward each.
        seed: seed of the drawn sets.
        baseline: colour of a hidden cell, one number or one per channel, in normalised units; 0 is the mean colour.
        score: "logit" or "probability".
        chunk_size: masked images per forward; None: chosen by the engine. The map does not depend on it.
        fold: whether the forwards may run on a copy with BatchNorm folded, which is equal up to rounding.

    Raises:
        InputError: an argument outside of these values.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import KernelSHAP
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> KernelSHAP(grid=2)(model, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0]))
        tensor([[[1., 2.],
                 [3., 4.]]])
    """

    def __init__(
        self,
        grid: int = 7,
        coalitions: int = 1024,
        seed: int = 0,
        baseline: float | Sequence[float] = 0.0,
        score: str = "logit",
        chunk_size: int | None = None,
        fold: bool = True,
    ) -> None:
        super().__init__(grid, baseline, score, chunk_size, fold)
        if coalitions < 2:
            raise InputError(f"coalitions must be at least 2, got {coalitions}.")
        self.coalitions, self.seed = coalitions, seed

    @property
    def design(self) -> Design:
        """The coalitions, and the weights of their scores in every cell's value."""
        return _design(self.grid**2, self.coalitions, self.seed)

    def masks(self) -> Tensor:
        """The coalitions."""
        return self.design.kept

    def maps(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Shapley values over the number of pixels of their cell, at every pixel (B, H, W)."""
        values = scores @ self.design.weights.T.to(scores.device)
        cells = torch.arange(self.grid**2, device=scores.device)
        pixels = cells_to_pixels(cells, self.grid, size).flatten().bincount()
        return cells_to_pixels(values / pixels, self.grid, size)
