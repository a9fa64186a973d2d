"""Masks over a coarse grid of cells: what methods that show or hide cells of the image have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, check_targets
from labn.explainers.cam.features import wide
from labn.explainers.cam.score import SCORES
from labn.explainers.gradient import channel_values
from labn.perturbation.engine import PerturbationEngine


def cell_of(length: int, grid: int) -> Tensor:
    """The cell (length,) int64 of every position along one axis; cells differ by at most one position."""
    return torch.arange(length) * grid // length


def cells_to_pixels(values: Tensor, grid: int, size: tuple[int, int]) -> Tensor:
    """Values (..., grid * grid) of cells at every pixel (..., H, W) of the cell."""
    rows, columns = (cell_of(length, grid).to(values.device) for length in size)
    return values.unflatten(-1, (grid, grid))[..., rows, :][..., columns]


class CellMasks(Explainer):
    """Base of the methods that run the image under masks m over a grid of cells: x * m + baseline * (1 - m).

    Args:
        grid: cells per side.
        baseline: colour of a hidden cell, one number or one per channel, in normalised units; 0 is the mean colour.
        score: "logit" or "probability".
        chunk_size: masked images per forward; None: chosen by the engine. The map does not depend on it.
        fold: whether the forwards may run on a copy with BatchNorm folded, which is equal up to rounding.

    Raises:
        InputError: `grid` below 1 or an unknown score; on call, an image with fewer pixels than cells per side.
    """

    def __init__(
        self,
        grid: int,
        baseline: float | Sequence[float] = 0.0,
        score: str = "logit",
        chunk_size: int | None = None,
        fold: bool = True,
    ) -> None:
        if grid < 1:
            raise InputError(f"grid must be at least 1, got {grid}.")
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
        self.grid, self.baseline, self.score = grid, baseline, score
        self.chunk_size, self.fold = chunk_size, fold

    @abstractmethod
    def masks(self) -> Tensor:
        """The masks (K, grid * grid) in [0, 1], on the CPU; equal for all images."""

    @abstractmethod
    def maps(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (B, h, w) from the scores (B, K) float64 of the masked images, of images of this (height, width)."""

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w)."""
        size = (images.shape[-2], images.shape[-1])
        if self.grid > min(size):
            raise InputError(f"grid must be at most {min(size)}, the shorter side of the images; got {self.grid}.")
        masks, baseline = self.masks().to(images), channel_values(self.baseline, images, "baseline")
        engine = PerturbationEngine.for_model(model, images, chunk_size=self.chunk_size, fold=self.fold)
        check_targets(targets, engine.original().shape[1])
        scores = []
        for image, target in zip(images, targets):

            def cover(position: Tensor, image: Tensor = image) -> Tensor:
                weights = cells_to_pixels(masks[position], self.grid, size).unsqueeze(1)
                return torch.lerp(baseline, image, weights)

            scores.append(SCORES[self.score](wide(engine.run(cover, len(masks))))[:, target])
        return self.maps(torch.stack(scores).double(), size)
