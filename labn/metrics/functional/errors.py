"""Kinds of failure of a map: insufficiently, over- or wrongly attended, or other (C3-LRP, JSAI 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError

KINDS = ("insufficient", "over", "wrong", "other")


@dataclass(frozen=True)
class ErrorThresholds:
    """Borders between the kinds of failure, each a share in [0, 1].

    Attributes:
        low_coverage: a map that covers less than this share of the box is insufficiently attended.
        high_outside: a map of which more than this share of the area lies outside of the box is over-attended, if it
            also covers more than `high_coverage` of the box.
        high_coverage: share of the box that an over-attended map covers.
        low_mass: a map with less than this share of its relevance in the box is wrongly attended.

    Raises:
        InputError: a value outside [0, 1].

    Example:
        >>> ErrorThresholds(low_coverage=0.1).high_outside
        0.5
    """

    low_coverage: float = 0.25
    high_outside: float = 0.5
    high_coverage: float = 0.75
    low_mass: float = 0.25

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; it is a share and must lie in [0, 1].")


def region_shares(areas: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage of a region by the area of a map, and the share of that area outside of the region.

        coverage = |area & region| / |region|,   outside = |area - region| / |area|

    Args:
        areas: (B, H, W) bool, pixels above the map's threshold.
        regions: (B, H, W) bool, the ground truth.

    Returns:
        coverage and outside, (B,) float64 in [0, 1]; outside is 0 for an empty area, both are NaN for an empty region.

    Example:
        >>> areas = torch.tensor([[[True, True, False, False]]])
        >>> regions = torch.tensor([[[False, True, True, False]]])
        >>> region_shares(areas, regions)
        (tensor([0.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    area, region = areas.flatten(1), regions.to(areas.device).flatten(1)
    both, size = (area & region).sum(1).double(), region.sum(1).double()
    # clamp(min=1) avoids 0 / 0: an empty area has nothing outside, and an empty region becomes NaN below.
    outside = (area.sum(1) - both) / area.sum(1).clamp(min=1)
    return torch.where(size > 0, both / size.clamp(min=1), torch.nan), torch.where(size > 0, outside, torch.nan)


def kinds_of_error(coverage: Tensor, outside: Tensor, mass: Tensor, thresholds: ErrorThresholds) -> Tensor:
    """The one kind of each failure: `wrong` before `over` before `insufficient`, and `other` where none applies.

    `wrong` is tested first because a map that lies elsewhere also covers little of the box. `over` and `insufficient`
    exclude each other unless `high_coverage` lies below `low_coverage`.

    Args:
        coverage: (n,) share of the box that the map's area covers.
        outside: (n,) share of the map's area that lies outside of the box.
        mass: (n,) share of the relevance that lies in the box.
        thresholds: the borders.

    Returns:
        (n,) int64, positions in `KINDS`.

    Example:
        >>> coverage, outside = torch.tensor([0.1, 0.9, 0.1]), torch.tensor([0.0, 0.8, 1.0])
        >>> mass = torch.tensor([0.9, 0.4, 0.1])
        >>> [KINDS[kind] for kind in kinds_of_error(coverage, outside, mass, ErrorThresholds())]
        ['insufficient', 'over', 'wrong']
    """
    wrong = mass < thresholds.low_mass
    over = (outside > thresholds.high_outside) & (coverage > thresholds.high_coverage)
    insufficient = coverage < thresholds.low_coverage
    kinds = torch.full_like(mass, KINDS.index("other"), dtype=torch.int64)
    # The last assignment wins, so the order is the reverse of the precedence.
    for name, applies in (("insufficient", insufficient), ("over", over), ("wrong", wrong)):
        kinds[applies] = KINDS.index(name)
    return kinds


def count_errors(
    scores: Tensor, coverage: Tensor, outside: Tensor, mass: Tensor, n_failures: int, thresholds: ErrorThresholds
) -> dict[str, int]:
    """Number of failures of each kind among the `n_failures` samples with the lowest score.

    Args:
        scores: (n,) insertion-deletion score per sample. Samples with NaN here or in the next three are left out.
        coverage: (n,), see `kinds_of_error`.
        outside: (n,), likewise.
        mass: (n,), likewise.
        n_failures: number of samples that count as failures; all samples where there are fewer.
        thresholds: the borders.

    Returns:
        `failures` and the number of each kind in `KINDS`; the kinds add up to `failures`.

    Example:
        >>> scores = torch.tensor([0.1, 0.2, 0.9])
        >>> coverage, outside = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.0, 0.8, 0.0])
        >>> mass = torch.tensor([0.9, 0.4, 0.9])
        >>> count_errors(scores, coverage, outside, mass, n_failures=2, thresholds=ErrorThresholds())
        {'failures': 2, 'insufficient': 1, 'over': 1, 'wrong': 0, 'other': 0}
    """
    columns = torch.stack([scores, coverage, outside, mass])
    columns = columns[:, ~columns.isnan().any(0)]
    # A stable sort takes tied scores by position, so that the counts do not depend on the machine.
    worst = columns[:, columns[0].argsort(stable=True)[:n_failures]]
    kinds = kinds_of_error(worst[1], worst[2], worst[3], thresholds)
    return {"failures": len(kinds), **{kind: int((kinds == k).sum()) for k, kind in enumerate(KINDS)}}
