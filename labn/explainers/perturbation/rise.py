"""RISE: the mean of random masks, weighted by the class probability of the masked images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, check_targets
from labn.perturbation.engine import REDUCED_REVISION, PerturbationEngine

GROUP = 128  # masks that are drawn, and run, together


def _bernoulli(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    return torch.rand(count, cells, generator=generator) < p


def _released(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    """As in the released LABN code: normal numbers are compared with p, which keeps the share Phi(p) of the cells."""
    return torch.randn(count, cells, generator=generator) < p


def _stratified(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    """Every cell is kept in the share p of the masks, rounded up or down at random (Latin hypercube sampling)."""
    expected = p * count
    number = int(expected) + (torch.rand(cells, generator=generator) < expected - int(expected)).long()
    # A double argsort gives each mask a random rank per cell.
    return torch.rand(count, cells, generator=generator).argsort(dim=0).argsort(dim=0) < number


def _orthogonal(generator: torch.Generator, count: int, cells: int, p: float) -> Tensor:
    """Masks from a Hadamard matrix and its negative, an orthogonal array of strength 3: any 3 cells show all 8 states
    equally often.

    The balance removes the additive part of the model's response from the noise. Columns change their sign at random,
    so that every single mask is a Bernoulli(1/2) grid.
    """
    # The next power of two: Sylvester matrices exist for these orders.
    order = max(2, 1 << (cells - 1).bit_length())
    matrix = torch.ones(1, 1)
    while len(matrix) < order:  # Sylvester's construction
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks: list[Tensor] = []
    for _ in range(-(-count // (2 * order))):
        columns = torch.randperm(order, generator=generator)[:cells]
        signs = torch.randint(0, 2, (cells,), generator=generator) * 2 - 1
        half = matrix[torch.randperm(order, generator=generator)][:, columns] * signs
        blocks.append(torch.stack([half, -half], dim=1).flatten(0, 1))
    return torch.cat(blocks)[:count] > 0


Draw = Callable[[torch.Generator, int, int, float], Tensor]

# (generator, masks, cells, p) -> (masks, cells) bool. Each mask alone is a grid of independent cells; the samplers
# differ in how the masks of one group depend on each other.
SAMPLERS: dict[str, Draw] = {
    "bernoulli": _bernoulli,
    "stratified": _stratified,
    "orthogonal": _orthogonal,
    "released": _released,
}

SHARING = ("stratified", "orthogonal")
"""Samplers whose groups share one shift, without which only cells and not pixels would be balanced over a group."""

_PLASTIC = 1.3247179572447460

_LATTICE = (1 / _PLASTIC, 1 / _PLASTIC**2)  # steps of the R2 sequence, which fills the square evenly from the start


@dataclass(frozen=True)
class MaskBank:
    """A fixed set of masks M (RISE, Petsiuk et al., BMVC 2018, section 3.2), which depends on the arguments alone.

    A grid x grid pattern is enlarged bilinearly to (grid + 1) cells of ceil(H / grid) pixels per side and cropped at a
    random shift of less than one cell.

    Attributes:
        grids: (N, grid, grid) bool.
        shifts: (N, 2) in [0, 1), the shift as a fraction of a cell, vertical first.
    """

    grids: Tensor
    shifts: Tensor

    @classmethod
    def draw(cls, count: int, grid: int, p: float, seed: int, sampler: str) -> MaskBank:
        """Draw `count` masks in groups of `GROUP`, so that the first masks do not depend on the number of masks."""
        generator = torch.Generator().manual_seed(seed)
        # Shared shifts follow a low-discrepancy sequence from a random origin, so that few groups cover all shifts.
        origin = torch.rand(2, generator=generator, dtype=torch.float64)
        grids, shifts = [], []
        for number in range(-(-count // GROUP)):
            grids.append(SAMPLERS[sampler](generator, GROUP, grid * grid, p).view(GROUP, grid, grid))
            # Both are drawn for every sampler, so that the grids of a seed do not depend on the kind of shift.
            own = torch.rand(GROUP, 2, generator=generator, dtype=torch.float64)
            shared = (origin + number * torch.tensor(_LATTICE, dtype=torch.float64)).frac().expand(GROUP, 2)
            shifts.append(shared if sampler in SHARING else own)
        return cls(torch.cat(grids)[:count], torch.cat(shifts)[:count])

    def __len__(self) -> int:
        return len(self.grids)

    def render(self, start: int, stop: int, like: Tensor) -> Tensor:
        """The masks `start` to `stop - 1` as (n, H, W) in [0, 1].

        Args:
            start: number of the first mask.
            stop: number after that of the last mask.
            like: (B, C, H, W), for size, device and dtype.
        """
        grids = self.grids[start:stop].to(like)
        shifts = self.shifts[start:stop].to(like.device)
        rows = self._interpolation(shifts[:, 0], like.shape[-2], like)
        columns = self._interpolation(shifts[:, 1], like.shape[-1], like)
        # Bilinear interpolation is separable: one matrix per axis, both with the shift of the mask.
        return rows @ grids @ columns.mT

    def pooled(self, masks: Tensor) -> Tensor:
        """Means (n, grid * grid) of masks (n, H, W) over equal parts of the image, float64."""
        return F.adaptive_avg_pool2d(masks.double(), self.grids.shape[-1]).flatten(1)

    def pooled_covariance(self, like: Tensor) -> Tensor:
        """Covariances (grid * grid, H, W) of the pooled values with all pixels over all masks, for cells of variance 1.

        Cells are independent and the shifts of both axes too, so that the covariance is a product of one matrix per
        axis: the mean over the shifts of the products of interpolation weights, summed over the cells.

        Args:
            like: (B, C, H, W), for size and device.
        """
        rows, columns = (self._axis_covariance(length, like.double()) for length in like.shape[-2:])
        return torch.einsum("ih,jw->ijhw", rows, columns).flatten(0, 1)

    def _axis_covariance(self, length: int, like: Tensor) -> Tensor:
        """The covariance along one axis (grid, length)."""
        side = self.grids.shape[-1]
        cell = -(-length // side)
        weights = self._interpolation((torch.arange(cell, device=like.device) + 0.5) / cell, length, like)
        return (F.adaptive_avg_pool1d(weights.mT, side).mT @ weights.mT).mean(0)

    def _interpolation(self, shifts: Tensor, length: int, like: Tensor) -> Tensor:
        """Bilinear enlargement along one axis, shifted and cropped, as matrices (n, length, grid)."""
        side = self.grids.shape[-1]
        cell = -(-length // side)
        unit = torch.eye(side, device=like.device, dtype=like.dtype).unsqueeze(1)
        # Enlarging the unit vectors gives the interpolation matrix; rows of it are positions of the enlarged grid.
        matrix = F.interpolate(unit, size=(side + 1) * cell, mode="linear", align_corners=False).squeeze(1).T
        # Float64 shifts just below 1 may round up to a whole cell.
        first = (shifts * cell).long().clamp(max=cell - 1)
        return matrix[first[:, None] + torch.arange(length, device=like.device)]


@dataclass(frozen=True)
class RiseMaps:
    """Maps of several classes from one pass over the masks.

    Attributes:
        maps: (B, T, H, W).
        standard_error: (B, T, H, W), standard error of every pixel of the maps; None if it was not asked for.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import RISE
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
        >>> explainer = RISE(n_masks=256, grid=2)
        >>> classes = torch.tensor([[0, 3]])
        >>> result = explainer.explain_classes(model, torch.rand(1, 3, 8, 8), classes, standard_error=True)
        >>> result.maps.shape, result.standard_error.shape
        (torch.Size([1, 2, 8, 8]), torch.Size([1, 2, 8, 8]))
    """

    maps: Tensor
    standard_error: Tensor | None


class RISE(Explainer):
    """RISE (Petsiuk et al., BMVC 2018, eq. 6): S_c = 1 / (N p) sum_i p(c | x * M_i) M_i.

    One bank of masks serves all images. Masks are rendered when they are needed, so that memory depends neither on
    their number nor on the number of classes (`control` keeps some values of every mask). A masked pixel is 0, the mean
    colour after normalisation.

    Args:
        n_masks: N.
        grid: cells per side of the coarse pattern.
        p: probability that a cell is kept.
        seed: seed of the masks.
        chunk_size: masked images per forward; None: chosen by the engine. The map does not depend on it.
        sampler: "bernoulli": independent masks; "stratified": every cell is kept equally often in each group of 128
            masks, which share a shift; "orthogonal" (p = 0.5 only): any three cells are balanced in each group, which
            removes the noise of what is additive in the cells; "released": the normal numbers of the released LABN
            code. The first three have the same expectation.
        fold: whether the forwards may run on a copy with BatchNorm folded, which is equal up to rounding.
        precision: precision of the forwards, "fp32" (the images' own dtype) or "bf16" (autocast).
        control: subtract the part of the probabilities that is linear in the masks before the mean is taken, and add
            its exact expectation (control variates). The expectation of the map stays the same up to the order of
            1 / N; the noise of few masks is lower where the model is partly linear in them.

    Raises:
        InputError: `n_masks` or `grid` below 1, p outside of (0, 1], or an unknown sampler; "orthogonal" needs p = 0.5.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import RISE
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        >>> RISE(n_masks=16, grid=2)(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        n_masks: int = 8000,
        grid: int = 7,
        p: float = 0.5,
        seed: int = 0,
        chunk_size: int | None = None,
        sampler: str = "bernoulli",
        fold: bool = True,
        precision: str = "fp32",
        control: bool = False,
    ) -> None:
        if n_masks < 1 or grid < 1:
            raise InputError(f"n_masks and grid must be at least 1, got {n_masks} and {grid}.")
        if not 0 < p <= 1:
            raise InputError(f"p must be above 0 and at most 1, got {p}.")
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
        if sampler == "orthogonal" and p != 0.5:
            raise InputError(f"sampler='orthogonal' needs p=0.5, got {p}; take stratified.")
        self.n_masks, self.grid, self.p, self.seed = n_masks, grid, p, seed
        self.chunk_size, self.sampler, self.fold, self.precision = chunk_size, sampler, fold, precision
        self.control = control

    @property
    def revision(self) -> int:
        """Earlier versions also reduced layers that a model keeps outside of autocast."""
        return super().revision + (REDUCED_REVISION if self.precision != "fp32" else 0)

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        return self._stream(model, images, targets[:, None], error=False).maps[:, 0]

    def explain_classes(
        self, model: nn.Module, images: Tensor, classes: Tensor, standard_error: bool = False
    ) -> RiseMaps:
        """Maps of several classes per image, for the cost of one class.

        Args:
            model: any module that returns logits or an object with `.logits`.
            images: (B, C, H, W).
            classes: (B, T) int64.
            standard_error: also estimate the standard error of every pixel, from the spread of the groups of 128 masks.

        Raises:
            InputError: a class out of range, another number of rows than of images, or fewer than two groups of masks
                for the standard error.
        """
        if classes.ndim != 2 or len(classes) != len(images):
            raise InputError(f"classes must be ({len(images)}, T), got {tuple(classes.shape)}.")
        if standard_error and self.n_masks < 2 * GROUP:
            raise InputError(f"standard_error needs n_masks of at least {2 * GROUP}, got {self.n_masks}.")
        return self._stream(model, images, classes.to(images.device), standard_error)

    def _stream(self, model: nn.Module, images: Tensor, classes: Tensor, error: bool) -> RiseMaps:
        bank = MaskBank.draw(self.n_masks, self.grid, self.p, self.seed, self.sampler)
        options = {"chunk_size": self.chunk_size, "fold": self.fold, "precision": self.precision}
        engine = PerturbationEngine.for_model(model, images, **options)  # type: ignore[arg-type]
        moments = _Moments((*classes.shape, *images.shape[-2:]), images.device, error)
        if self.control:
            return self._controlled(bank, engine, classes, moments)
        for masks in _groups(bank, images):
            moments.add(_probabilities(engine, masks, classes), masks)
        return moments.maps(self.p, images.dtype)

    def _controlled(self, bank: MaskBank, engine: PerturbationEngine, classes: Tensor, moments: _Moments) -> RiseMaps:
        """The maps with control variates; the masks are rendered twice, and the model runs once."""
        images, kept = engine.images, self._kept
        pooled, found = [], []
        for masks in _groups(bank, images):
            pooled.append(bank.pooled(masks) - kept)
            found.append(_probabilities(engine, masks, classes))
        covariance = kept * (1 - kept) * bank.pooled_covariance(images)
        variance = bank.pooled(covariance).diagonal().mean()
        line = _Line.fit(torch.cat(pooled), torch.cat(found).double().flatten(1), variance)
        rest = line.residuals.view(-1, *classes.shape).split(GROUP)
        for masks, residuals in zip(_groups(bank, images), rest):
            # The residuals sum to zero, so that the masks need not be centred; the error is that of residual and mean.
            moments.add(residuals, masks.double())
        found_maps = moments.maps(self.p, torch.float64)
        maps, error = found_maps.maps, found_maps.standard_error
        exact = (line.mean[:, None] * kept + line.slopes @ covariance.flatten(1)) / self.p
        total = (maps + exact.view_as(maps)).to(images.dtype)
        return RiseMaps(total, None if error is None else error.to(images.dtype))

    @property
    def _kept(self) -> float:
        """The probability that a cell is kept."""
        return NormalDist().cdf(self.p) if self.sampler == "released" else self.p


def _groups(bank: MaskBank, like: Tensor) -> Iterator[Tensor]:
    """The masks (n, H, W) of every group."""
    for start in range(0, len(bank), GROUP):
        yield bank.render(start, min(start + GROUP, len(bank)), like)


class _Line(NamedTuple):
    """Probabilities R of N masks as a linear function of J pooled values, f = mean + slopes x.

    Attributes:
        mean: (R,), estimate of the expectation of f.
        slopes: (R, J).
        residuals: (N, R), f less the line.
    """

    mean: Tensor
    slopes: Tensor
    residuals: Tensor

    @classmethod
    def fit(cls, pooled: Tensor, probabilities: Tensor, variance: Tensor) -> _Line:
        """Ridge regression on pooled values x (N, J) of expectation 0; the weight is J / N of their variance."""
        centred = pooled - pooled.mean(0)
        count, size = pooled.shape
        # Masks that keep every cell (p = 1) have no variance, and get slopes of zero.
        ridge = (size / count * variance).clamp(min=torch.finfo(pooled.dtype).tiny)
        gram = centred.T @ centred / count + ridge * torch.eye(size, dtype=pooled.dtype, device=pooled.device)
        slopes = torch.linalg.solve(gram, centred.T @ probabilities / count).T
        rest = probabilities - pooled @ slopes.T
        return cls(rest.mean(0), slopes, rest - rest.mean(0))


def _probabilities(engine: PerturbationEngine, masks: Tensor, classes: Tensor) -> Tensor:
    """Probabilities p(c | x * M_i) (n, B, T) of all images and their classes under the masks (n, H, W)."""
    count = len(engine.images)

    def masked(position: Tensor) -> Tensor:
        return masks[position // count].unsqueeze(1) * engine.images[position % count]

    logits = engine.run(masked, len(masks) * count)
    check_targets(classes.flatten(), logits.shape[1])
    probabilities = logits.softmax(dim=1).unflatten(0, (len(masks), count))
    return probabilities.gather(2, classes.expand(len(masks), -1, -1))


class _Moments:
    """Running sums over the groups of masks, in float64."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, error: bool) -> None:
        self.masks = self.groups = 0
        self.total = torch.zeros(shape, device=device, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total) if error else None

    def add(self, probabilities: Tensor, masks: Tensor) -> None:
        """Add one group: probabilities (n, B, T) and masks (n, H, W)."""
        # One matrix product per group: (B T, n) x (n, H W).
        sums = (probabilities.flatten(1).T @ masks.flatten(1)).view_as(self.total).double()
        self.total += sums
        self.masks += len(masks)
        self.groups += 1
        if self.squares is not None:
            self.squares += sums.square() / len(masks)

    def maps(self, p: float, dtype: torch.dtype) -> RiseMaps:
        """The means divided by p, and their standard errors from the spread of the groups' means."""
        mean = self.total / self.masks
        error = None
        if self.squares is not None:
            # sum_g n_g (m_g - m)^2 / (G - 1) estimates the variance of one mask's term.
            variance = (self.squares - self.masks * mean.square()).clamp(min=0) / (self.groups - 1)
            error = (variance / self.masks).sqrt().div(p).to(dtype)
        return RiseMaps((mean / p).to(dtype), error)


class ReleasedRISE(RISE):
    """RISE as the released LABN code runs it: 10 000 masks of 9 x 9 cells, p = 0.3, of which Phi(0.3) = 0.618 are kept.

    As in that code the map is divided by 0.3; its ranking of the pixels is that of RISE with p = 0.618.

    Args:
        n_masks: N.
        seed: seed of the masks.
        chunk_size: masked images per forward.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import ReleasedRISE
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(300, 2))
        >>> ReleasedRISE(n_masks=16)(model, torch.rand(2, 3, 10, 10), torch.tensor([0, 1])).shape
        torch.Size([2, 10, 10])
    """

    def __init__(self, n_masks: int = 10_000, seed: int = 0, chunk_size: int | None = None) -> None:
        super().__init__(n_masks, grid=9, p=0.3, seed=seed, chunk_size=chunk_size, sampler="released")
