"""RISE's random masks: coarse grids and shifts in memory, masks made from them when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128  # masks that are drawn together, and per step of the stream


def _bernoulli(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    return torch.rand(count, cells, generator=generator) < p


def _released(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    """The released LABN code compares normal numbers with p, so that Phi(p) of the cells are kept."""
    return torch.randn(count, cells, generator=generator) < p


def _stratified(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    """Every cell is kept in the same share p of the masks, up to one mask that is drawn (Latin hypercube sampling)."""
    wanted = p * count
    kept = int(wanted) + (torch.rand(cells, generator=generator) < wanted - int(wanted)).long()
    return torch.rand(count, cells, generator=generator).argsort(dim=0).argsort(dim=0) < kept


def _orthogonal(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    """A Hadamard matrix and its negative, an orthogonal array of strength 3: 3 cells show all 8 states evenly.

    That takes the additive part of the model's response out of the noise. Columns change their sign at random, so that
    every single mask is a Bernoulli(1/2) grid.
    """
    order = max(2, 1 << (cells - 1).bit_length())
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rows: list[Tensor] = []
    for _ in range(-(-count // (2 * order))):
        columns = torch.randperm(order, generator=generator)[:cells]
        signs = torch.randint(0, 2, (cells,), generator=generator) * 2 - 1
        half = matrix[torch.randperm(order, generator=generator)][:, columns] * signs
        rows.append(torch.stack([half, -half], dim=1).flatten(0, 1))
    return torch.cat(rows)[:count] > 0


Draw = Callable[[torch.Generator, int, int, float], Tensor]

# (generator, masks, cells, p) -> (masks, cells) bool. Each mask alone is a grid of independent cells; what differs is
# how the masks of a group depend on each other.
SAMPLERS: dict[str, Draw] = {
    "bernoulli": _bernoulli,
    "stratified": _stratified,
    "orthogonal": _orthogonal,
    "released": _released,
}
SHARING = ("stratified", "orthogonal")
"""Samplers whose groups share one shift: only then is a pixel, and not only a cell, balanced over the group."""

_PLASTIC = 1.3247179572447460
_LATTICE = (1 / _PLASTIC, 1 / _PLASTIC**2)  # steps of the R2 sequence, which fills the square evenly from the start


@dataclass(frozen=True)
class MaskBank:
    """A fixed set of masks M (RISE, Petsiuk et al., BMVC 2018, section 3.2), a function of the arguments alone.

    A grid x grid pattern is enlarged bilinearly to (grid + 1) cells of ceil(H / grid) pixels and cropped at a random
    shift of less than one cell.

    Attributes:
        grids: (N, grid, grid) bool.
        shifts: (N, 2) in [0, 1), the shift as a fraction of a cell, vertical first.
    """

    grids: Tensor
    shifts: Tensor

    @classmethod
    def draw(cls, count: int, grid: int, p: float, seed: int, sampler: str) -> MaskBank:
        """Draw `count` masks, in groups of `GROUP` so that the first masks do not depend on how many follow."""
        generator = torch.Generator().manual_seed(seed)
        origin = torch.rand(2, generator=generator, dtype=torch.float64)
        grids, shifts = [], []
        for number in range(-(-count // GROUP)):
            grids.append(SAMPLERS[sampler](generator, GROUP, grid * grid, p).view(GROUP, grid, grid))
            own = torch.rand(GROUP, 2, generator=generator, dtype=torch.float64)
            shared = (origin + number * torch.tensor(_LATTICE, dtype=torch.float64)).frac().expand(GROUP, 2)
            shifts.append(shared if sampler in SHARING else own)
        return cls(torch.cat(grids)[:count], torch.cat(shifts)[:count])

    def __len__(self) -> int:
        return len(self.grids)

    def render(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Masks number `start` to `stop - 1` as (n, H, W) in [0, 1].

        Args:
            start: first mask.
            stop: one behind the last.
            like: (B, C, H, W), for size, device and dtype.
        """
        grids = self.grids[start:stop].to(like)
        shifts = self.shifts[start:stop].to(like.device)
        rows = self._interpolation(shifts[:, 0], like.shape[-2], like)
        columns = self._interpolation(shifts[:, 1], like.shape[-1], like)
        return rows @ grids @ columns.mT

    def _interpolation(self, shifts: Tensor, length: int, like: Tensor) -> Tensor:
        """Bilinear enlargement along one axis, shifted and cropped, as matrices (n, length, grid)."""
        side = self.grids.shape[-1]
        cell = -(-length // side)
        unit = torch.eye(side, device=like.device, dtype=like.dtype).unsqueeze(1)
        matrix = F.interpolate(unit, size=(side + 1) * cell, mode="linear", align_corners=False).squeeze(1).T
        first = (shifts * cell).long().clamp(max=cell - 1)
        return matrix[first[:, None] + torch.arange(length, device=like.device)]
