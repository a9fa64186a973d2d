"""Why a map failed: too little of the object, too much around it, or something else altogether (C3-LRP, JSAI 2024)."""

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
        low_coverage: insufficiently attended: less than this share of the box is covered.
        high_outside: over-attended: more than this share of the map's area lies outside of the box, and
        high_coverage: more than this share of the box is covered.
        low_mass: wrongly attended: less than this share of the relevance lies in the box.
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
    """How the area of a map and a region lie to each other.

        coverage = |area & region| / |region|,   outside = |area - region| / |area|

    Args:
        areas: (B, H, W) bool, the pixels that the map attends to.
        regions: (B, H, W) bool, the ground truth.

    Returns:
        coverage and outside, (B,) float64 in [0, 1]; outside is 0 for an empty area, both are NaN for an empty region.
    """
    area, region = areas.flatten(1), regions.to(areas.device).flatten(1)
    both, size = (area & region).sum(1).double(), region.sum(1).double()
    outside = (area.sum(1) - both) / area.sum(1).clamp(min=1)
    return torch.where(size > 0, both / size.clamp(min=1), torch.nan), torch.where(size > 0, outside, torch.nan)


def kinds_of_error(coverage: Tensor, outside: Tensor, mass: Tensor, thresholds: ErrorThresholds) -> Tensor:
    """The kind of each failure, one only: wrong before over before insufficient, `other` where none applies.

    A map that lies elsewhere also covers little of the box, so that `wrong` is asked first; `over` and `insufficient`
    exclude each other by their coverage.

    Args:
        coverage: (n,) share of the box that the map's area covers.
        outside: (n,) share of the map's area that lies outside of the box.
        mass: (n,) share of the relevance that lies in the box.
        thresholds: the borders.

    Returns:
        (n,) int64, positions in `KINDS`.
    """
    wrong = mass < thresholds.low_mass
    over = (outside > thresholds.high_outside) & (coverage > thresholds.high_coverage)
    insufficient = coverage < thresholds.low_coverage
    kinds = torch.full_like(mass, KINDS.index("other"), dtype=torch.int64)
    for name, applies in (("insufficient", insufficient), ("over", over), ("wrong", wrong)):
        kinds[applies] = KINDS.index(name)
    return kinds


def count_errors(
    scores: Tensor, coverage: Tensor, outside: Tensor, mass: Tensor, n_failures: int, thresholds: ErrorThresholds
) -> dict[str, int]:
    """Numbers of each kind among the `n_failures` samples of the lowest score (of all, where there are fewer).

    Args:
        scores: (n,) insertion-deletion score per sample; ties go by position. NaN here or in the others: left out.
        coverage, outside, mass: as in `kinds_of_error`.
        n_failures: how many samples count as failures.
        thresholds: the borders.

    Returns:
        `failures`, and per kind in `KINDS` a number; the kinds add up to `failures`.
    """
    columns = torch.stack([scores, coverage, outside, mass])
    columns = columns[:, ~columns.isnan().any(0)]
    worst = columns[:, columns[0].argsort(stable=True)[:n_failures]]
    found = kinds_of_error(worst[1], worst[2], worst[3], thresholds)
    return {"failures": len(found), **{kind: int((found == k).sum()) for k, kind in enumerate(KINDS)}}
