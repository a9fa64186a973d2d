"""Sobol attribution: the share of the score's variance under random masks that each cell takes part in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from labn.errors import InputError
from labn.explainers.perturbation.cells import CellMasks


class SobolAttribution(CellMasks):
    """Total Sobol indices of a grid of cells (Fel et al., NeurIPS 2021), by Jansen's estimator.

        T_i = mean over masks of (f(a) - f(a with cell i of b))^2 / (2 Var f),   a, b of a scrambled Sobol sequence

    T_i, at least 0, is the share of the variance of y_c under independent uniform masks that cell i has a part in,
    alone or with others; it has no sign. One set of masks serves all images, n_masks * (grid^2 + 1) forwards per image.

    Args:
        grid: cells per side, at most 102.
        n_masks: number of masks a, at least 2; powers of 2 fill the space of masks evenly.
        seed: seed of the scrambling.
        baseline: colour of a hidden cell, one number or one per channel, in normalised units; 0 is the mean colour.
        score: "logit" or "probability".
        chunk_size: masked images per forward; None: chosen by the engine. The map does not depend on it.
        fold: whether the forwards may run on a copy with BatchNorm folded, which is equal up to rounding.

    Raises:
        InputError: an argument outside of these values.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import SobolAttribution
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> image = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]])
        >>> maps = SobolAttribution(grid=2, n_masks=512)(model, image, torch.tensor([0]))
        >>> maps.round(decimals=1)
        tensor([[[0.0000, 0.2000],
                 [0.8000, 0.0000]]])
    """

    def __init__(
        self,
        grid: int = 8,
        n_masks: int = 32,
        seed: int = 0,
        baseline: float | Sequence[float] = 0.0,
        score: str = "logit",
        chunk_size: int | None = None,
        fold: bool = True,
    ) -> None:
        super().__init__(grid, baseline, score, chunk_size, fold)
        if 2 * grid**2 > SobolEngine.MAXDIM:
            raise InputError(f"grid must be at most 102, the Sobol sequence has too few dimensions; got {grid}.")
        if n_masks < 2:
            raise InputError(f"n_masks must be at least 2, got {n_masks}.")
        self.n_masks, self.seed = n_masks, seed

    def masks(self) -> Tensor:
        """The masks a (n_masks), and for every cell those with this cell of b."""
        a, b = self._pairs()
        swapped = a.expand(self.grid**2, -1, -1).clone()
        swapped.diagonal(dim1=0, dim2=2).copy_(b)
        return torch.cat([a, swapped.flatten(0, 1)])

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Masks a and b (n_masks, cells) float64."""
        points = SobolEngine(2 * self.grid**2, scramble=True, seed=self.seed).draw(self.n_masks, dtype=torch.float64)
        a, b = points.chunk(2, 1)
        return a, b

    def maps(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Total indices (B, grid, grid); 0 where the score does not vary."""
        whole, swapped = scores[:, : self.n_masks], scores[:, self.n_masks :].unflatten(1, (-1, self.n_masks))
        variance = whole.var(1, keepdim=True)
        parts = (whole[:, None] - swapped).square().mean(2) / 2
        indices = torch.where(variance > 0, parts / torch.where(variance > 0, variance, 1), 0)
        return indices.unflatten(1, (self.grid, self.grid))
