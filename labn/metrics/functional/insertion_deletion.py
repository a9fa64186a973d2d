"""The mathematics of insertion and deletion curves: counts, x axes, areas. No model, no state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def paper_counts(n_patches: int, step: int) -> Tensor:
    """Patches moved at each point, n = 0, s, 2s, ..., N; the last step may be short (JSAI 2022, eq. 8-9).

    Args:
        n_patches: N, number of patches.
        step: s, patches per step.

    Returns:
        (ceil(N / s) + 1,) int64.
    """
    return torch.cat([torch.arange(0, n_patches, step), torch.tensor([n_patches])])


def official_counts(n_patches: int, step: int) -> Tensor:
    """Counts of the released code: n_i = min(s (i + 1), N - 1) + 1 for i < ceil(N / s).

    It thresholds at the n-th value inclusively: one patch too many at every point, no point at n = 0, and the last
    point repeated where the second last already holds all patches.

    Returns:
        (ceil(N / s),) int64.
    """
    points = -(-n_patches // step)
    return (step * torch.arange(1, points + 1)).clamp(max=n_patches - 1) + 1


def kept_fractions(ranks: Tensor, counts: Tensor) -> Tensor:
    """Fraction of patches with a rank below each count, x = #{rank < n} / N: more than n / N where ties enter together.

    Args:
        ranks: (B, N) integer, as from `labn.perturbation.patches.patch_ranks`.
        counts: (K,) integer.

    Returns:
        (B, K) float64 in [0, 1].
    """
    ordered = ranks.sort(dim=1).values
    wanted = counts.to(ranks).expand(len(ranks), -1).contiguous()
    return torch.searchsorted(ordered, wanted).double() / ranks.shape[1]


def counted_fractions(ranks: Tensor, counts: Tensor) -> Tensor:
    """Fraction of patches that each count names, x = n / N, however many ties were moved with them; (B, K) float64."""
    return (counts.to(ranks.device).double() / ranks.shape[1]).expand(len(ranks), -1)


def nominal_fractions(ranks: Tensor, counts: Tensor) -> Tensor:
    """The released code's x axis: points equally spaced on [0, 1], whatever was really moved; (B, K) float64."""
    points = torch.linspace(0, 1, len(counts), dtype=torch.float64, device=ranks.device)
    return points.expand(len(ranks), -1)


def mean_height(curves: Tensor, x: Tensor, nominal: Tensor | None = None) -> Tensor:
    """The mean of a curve's points; arguments and result as `trapezoid_area`.

    Ties enter together, so that points may lie further right than they are counted. The mean is then over the curve at
    the points' own places, read off the straight lines between what was measured: every point counts the same, on an
    axis on which the nominal ones are equally spaced. Without ties nothing is moved; where all is tied the curve is one
    line, whose mean is that of its ends.
    """
    curves = curves.double()
    if nominal is None or torch.equal(x, nominal):
        return curves.mean(1)
    places = _places(x, nominal)
    wanted = torch.arange(curves.shape[1], dtype=places.dtype, device=places.device).expand_as(places).contiguous()
    right = torch.searchsorted(places.contiguous(), wanted)
    left = (right - 1).clamp(min=0)
    (start, end), (low, high) = ((t.gather(1, left), t.gather(1, right)) for t in (places, curves))
    behind = torch.where(end > start, (end - wanted) / (end - start), 0)
    return (high - behind * (high - low)).mean(1)


def _places(x: Tensor, nominal: Tensor) -> Tensor:
    """Where x (B, K) lies among the nominal points (B, K), in numbers of points: (B, K) from 0 to K - 1."""
    right = torch.searchsorted(nominal.contiguous(), x.contiguous())
    end, start = nominal.gather(1, right), nominal.gather(1, (right - 1).clamp(min=0))
    return right - torch.where(end > x, (end - x) / (end - start), 0)


def trapezoid_area(curves: Tensor, x: Tensor, nominal: Tensor | None = None) -> Tensor:
    """Area under curves, sum_k (y_k + y_(k+1)) / 2 * (x_(k+1) - x_k).

    Args:
        curves: (B, K), y.
        x: (B, K), non-decreasing from 0 to 1.
        nominal: (B, K), where the points would lie if there were no ties; None: where they lie. It moves no area.

    Returns:
        (B,) float64; a curve of one point has its own value as area.
    """
    curves = curves.double()
    if curves.shape[1] == 1:
        return curves[:, 0]
    return torch.trapezoid(curves, x.to(curves), dim=1)


AREAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"trapezoid": trapezoid_area, "mean": mean_height}


@dataclass(frozen=True)
class Protocol:
    """Where a curve is sampled, at which x a sample is drawn, and at which one it would be without ties."""

    counts: Callable[[int, int], Tensor]
    x: Callable[[Tensor, Tensor], Tensor]
    nominal: Callable[[Tensor, Tensor], Tensor]


PROTOCOLS = {
    "paper": Protocol(paper_counts, kept_fractions, counted_fractions),
    "official": Protocol(official_counts, nominal_fractions, nominal_fractions),
}


@dataclass(frozen=True)
class InsertionDeletionCurves:
    """Curves of S samples at K points.

    Attributes:
        samples: (S,) int64, positions of the scored samples in their batch.
        counts: (K,) int64, nominal number of patches moved.
        x: (S, K) float64, the x axis in [0, 1].
        insertion: (S, K) probabilities as patches of the image appear on the fill, most important first.
        deletion: (S, K) probabilities as they disappear from the image.
        fill_probability: (S,) probability of the bare fill.
        nominal: (S, K) float64, the x axis as it would be without ties.
    """

    samples: Tensor
    counts: Tensor
    x: Tensor
    insertion: Tensor
    deletion: Tensor
    fill_probability: Tensor
    nominal: Tensor

    def areas(self, area: str = "trapezoid") -> dict[str, Tensor]:
        """`insertion`, `deletion`, `pid` = their difference (JSAI 2022, eq. 7), `fill_probability`: (S,) float64.

        Args:
            area: a name in `AREAS`: "trapezoid", or "mean" of the points.
        """
        measure = AREAS[area]
        insertion, deletion = (measure(curve, self.x, self.nominal) for curve in (self.insertion, self.deletion))
        fill = self.fill_probability.double()
        return {"insertion": insertion, "deletion": deletion, "pid": insertion - deletion, "fill_probability": fill}
