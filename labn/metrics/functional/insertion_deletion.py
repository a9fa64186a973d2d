"""Insertion and deletion curves on patches: counts, x axes, areas, and the curves of a batch in one call. No state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.metrics.functional.class_probability import class_probability
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.fills import Channels, FillOptions, fill_with
from labn.perturbation.patches import default_step, patch_grid, patch_pool, patch_ranks, ranks_to_pixels


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


def patch_counts(size: tuple[int, int], patch_size: int, step: int | None = None, protocol: str = "paper") -> Tensor:
    """Numbers of patches moved at the points of a curve.

    Args:
        size: (height, width) of the images.
        patch_size: m in pixels.
        step: patches per step; None: the released table where it has the size, else about N / 100.
        protocol: a name in `PROTOCOLS`.

    Returns:
        (K,) int64.

    Raises:
        InputError: a patch larger than the image, or images that do not fit the protocol.

    Example:
        >>> patch_counts((32, 32), patch_size=16, step=2).tolist()
        [0, 2, 4]
    """
    rows, columns = patch_grid(size, patch_size)
    if protocol == "official" and (size[0] != size[1] or size[0] % patch_size):
        raise InputError(f"protocol='official' needs square images divisible by {patch_size}, got {size}.")
    return PROTOCOLS[protocol].counts(rows * columns, step or default_step(size, patch_size))


def insertion_deletion_curves(
    engine: PerturbationEngine,
    ranks: Tensor,
    counts: Tensor,
    classes: Tensor,
    fill: Tensor,
    deletion_fill: Tensor,
    *,
    patch_size: int,
    samples: Tensor,
    protocol: str = "paper",
    ties: str = "fraction",
    probability: str = "softmax",
) -> InsertionDeletionCurves:
    """Curves of some samples of a batch (JSAI 2022, eq. 8-9): i_n = p on A_n, b elsewhere; d_n = b on A_n, p elsewhere.

    Args:
        engine: the perturbation engine of the batch.
        ranks: (S, N) integer, as from `labn.perturbation.patches.patch_ranks`: a patch is in A_n where its rank < n.
        counts: (K,) int64, see `patch_counts`.
        classes: (S,) int64, the class whose probability is read.
        fill: b of insertion, broadcastable to the images of the batch.
        deletion_fill: b of deletion, likewise.
        patch_size: m in pixels.
        samples: (S,) int64, positions of the samples in the batch.
        protocol: a name in `PROTOCOLS`.
        ties: as of `patch_ranks`; "threshold" draws the x axis as if there were no ties.
        probability: "softmax", "sigmoid" or "logit".
    """
    pixel_ranks = ranks_to_pixels(ranks, patch_size, (engine.images.shape[-2], engine.images.shape[-1]))
    insertion, deletion = (
        class_probability(engine.masked(pixel_ranks, counts, substrate, keep, samples), classes, probability)
        for substrate, keep in ((fill, "first"), (deletion_fill, "rest"))
    )
    bare = class_probability(engine.filled(fill)[samples, None], classes, probability)[:, 0]
    rule = PROTOCOLS[protocol]
    nominal = rule.nominal(ranks, counts)
    x = nominal if ties == "threshold" else rule.x(ranks, counts)
    return InsertionDeletionCurves(samples, counts, x, insertion, deletion, bare, nominal)


def patch_insertion_deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    patch_size: int = 16,
    step: int | None = None,
    protocol: str = "paper",
    ties: str = "fraction",
    fill: str = "black",
    deletion_fill: str | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    bias: Tensor | None = None,
    pooling: str = "max",
    probability: str = "softmax",
    area: str = "trapezoid",
    indices: Tensor | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    fold: bool = True,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Patch insertion-deletion per sample; the arguments are those of `labn.metrics.PatchInsertionDeletion`.

    Args:
        model: returns logits or an object with `.logits`; not changed.
        images: (B, C, H, W), normalised with `mean` and `std` (None: not at all).
        maps: (B, H, W), importance of every pixel.
        targets: (B,) int64, the class whose probability is read.
        patch_size: m in pixels; 1 gives pixel-wise insertion-deletion.
        step: patches per step; None: the released table where it has the size, else about N / 100.
        protocol: "paper" or "official".
        ties: "fraction", "stable", "random" or "threshold".
        fill: what removed pixels show, a name in `labn.perturbation.fills.FILLS`.
        deletion_fill: another fill for deletion; None: the same.
        mean: per-channel mean of the normalisation.
        std: likewise the standard deviation.
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        pooling: "max", "mean" or "sum" over a patch.
        probability: "softmax", "sigmoid" or "logit".
        area: "trapezoid", or "mean" of the points.
        indices: (B,) int64 positions in a data set, for random ties and the "uniform" fill; None: 0..B-1.
        seed: of random ties and of the "uniform" fill.
        chunk_size: inputs per forward; None lets the engine choose.
        fold: whether a copy with BatchNorm folded may be run.
        precision: "fp32" or "bf16".

    Returns:
        `insertion`, `deletion`, `pid` and `fill_probability`, each (B,) float64.

    Example:
        >>> model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.zeros_(model[2].weight)
        >>> images, maps = torch.rand(1, 1, 32, 32), torch.rand(1, 32, 32)
        >>> patch_insertion_deletion(model, images, maps, torch.tensor([0]), step=1)["pid"].tolist()
        [0.0]
    """
    size = (images.shape[-2], images.shape[-1])
    counts = patch_counts(size, patch_size, step, protocol)
    indices = torch.arange(len(images)) if indices is None else indices
    engine = PerturbationEngine.for_model(
        model, images, indices=indices, chunk_size=chunk_size, fold=fold, precision=precision
    )
    options = FillOptions(mean, std, bias, seed=seed, indices=indices)
    values = patch_pool(maps.to(images.device), patch_size, pooling)
    ranks = patch_ranks(values, ties, seed=seed, indices=indices.to(images.device))
    curves = insertion_deletion_curves(
        engine,
        ranks,
        counts,
        targets.to(images.device),
        fill_with(fill, images, options),
        fill_with(deletion_fill or fill, images, options),
        patch_size=patch_size,
        samples=torch.arange(len(images), device=images.device),
        protocol=protocol,
        ties=ties,
        probability=probability,
    )
    return curves.areas(area)
