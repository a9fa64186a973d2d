"""Insertion and deletion curves on patches: counts of moved patches, x axes, areas, and the curves of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.model_traits import probabilities_sentence, traits_of
from labn.metrics.functional.adaptive import TOLERANCE, adaptive_curves
from labn.metrics.functional.class_probability import PROBABILITIES, class_probability
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.fills import FILLS, Channels, FillOptions, fill_with
from labn.perturbation.patches import POOLINGS, TIES, default_step, patch_grid, patch_pool, patch_ranks, ranks_to_pixels


def paper_counts(n_patches: int, step: int) -> Tensor:
    """Numbers of moved patches at the points of a curve, n = 0, s, 2s, ..., N (JSAI 2022, eq. 8-9).

    The last step is shorter where s does not divide N.

    Args:
        n_patches: N, number of patches.
        step: s, patches per step.

    Returns:
        (ceil(N / s) + 1,) int64.

    Example:
        >>> paper_counts(10, step=4)
        tensor([ 0,  4,  8, 10])
    """
    return torch.cat([torch.arange(0, n_patches, step), torch.tensor([n_patches])])


def official_counts(n_patches: int, step: int) -> Tensor:
    """Numbers of moved patches in the released code: n_i = min(s (i + 1), N - 1) + 1 for i < ceil(N / s).

    The released code includes the n-th value in its threshold. Every point therefore moves one patch too many, the
    point n = 0 is missing, and the last point is repeated where the second last already moves all patches.

    Args:
        n_patches: N, number of patches.
        step: s, patches per step.

    Returns:
        (ceil(N / s),) int64.

    Example:
        >>> official_counts(10, step=4)
        tensor([ 5,  9, 10])
    """
    # Clamping before the increment is what the released code does: the last count is N and not N + 1.
    points = -(-n_patches // step)
    return (step * torch.arange(1, points + 1)).clamp(max=n_patches - 1) + 1


def kept_fractions(ranks: Tensor, counts: Tensor) -> Tensor:
    """Fraction of patches whose rank is below each count, x = #{rank < n} / N.

    With shared ranks tied patches move together, and x exceeds n / N.

    Args:
        ranks: (B, N) integer, as from `labn.perturbation.patches.patch_ranks`.
        counts: (K,) integer.

    Returns:
        (B, K) float64 in [0, 1].

    Example:
        >>> kept_fractions(torch.tensor([[0, 1, 1, 3]]), torch.tensor([0, 2, 4]))
        tensor([[0.0000, 0.7500, 1.0000]], dtype=torch.float64)
    """
    ordered = ranks.sort(dim=1).values
    # In ascending ranks the insertion point of n is the number of ranks below n.
    limits = counts.to(ranks).expand(len(ranks), -1).contiguous()
    return torch.searchsorted(ordered, limits).double() / ranks.shape[1]


def counted_fractions(ranks: Tensor, counts: Tensor) -> Tensor:
    """Fractions x = n / N (B, K) float64 of the counts n themselves, without the ties that moved with them."""
    return (counts.to(ranks.device).double() / ranks.shape[1]).expand(len(ranks), -1)


def nominal_fractions(ranks: Tensor, counts: Tensor) -> Tensor:
    """x axis of the released code: K points equally spaced on [0, 1], whatever number of patches was moved.

    Args:
        ranks: (B, N) integer.
        counts: (K,) integer.

    Returns:
        (B, K) float64.

    Example:
        >>> nominal_fractions(torch.tensor([[0, 1, 1, 3]]), torch.tensor([0, 2, 4]))
        tensor([[0.0000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    points = torch.linspace(0, 1, len(counts), dtype=torch.float64, device=ranks.device)
    return points.expand(len(ranks), -1)


def mean_height(curves: Tensor, x: Tensor, nominal: Tensor | None = None) -> Tensor:
    """Mean of a curve's heights at the K nominal points; ties do not change the points' weights.

    Tied patches move together, so that a point may lie further right than its nominal x = n / N. The heights are then
    interpolated linearly at the nominal points, and each of these counts 1 / K. Without ties this is the plain mean of
    the K points; with all patches tied the curve is one straight line, whose mean is that of its two ends.

    Args:
        curves: (B, K), y.
        x: (B, K), non-decreasing from 0 to 1.
        nominal: (B, K), x of the points if there were no ties; None: `x`.

    Returns:
        (B,) float64.

    Example:
        >>> mean_height(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 0.5, 1.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    curves = curves.double()
    if nominal is None or torch.equal(x, nominal):
        return curves.mean(1)
    # Both axes are rescaled so that the nominal points lie at 0, 1, ..., K - 1: a short last step then counts as one.
    measured = _in_steps(x, nominal)
    steps = torch.arange(curves.shape[1], dtype=measured.dtype, device=measured.device)
    steps = steps.expand_as(measured).contiguous()
    right = torch.searchsorted(measured.contiguous(), steps)
    left = (right - 1).clamp(min=0)
    (start, end), (low, high) = ((t.gather(1, left), t.gather(1, right)) for t in (measured, curves))
    # Written from the right end, so that a point that coincides with a measured one keeps its exact digits.
    to_the_end = torch.where(end > start, (end - steps) / (end - start), 0)
    return (high - to_the_end * (high - low)).mean(1)


def _in_steps(x: Tensor, nominal: Tensor) -> Tensor:
    """Positions (B, K) of x (B, K), on the axis on which the nominal points (B, K) lie at 0, 1, ..., K - 1."""
    right = torch.searchsorted(nominal.contiguous(), x.contiguous())
    end, start = nominal.gather(1, right), nominal.gather(1, (right - 1).clamp(min=0))
    return right - torch.where(end > x, (end - x) / (end - start), 0)


def trapezoid_area(curves: Tensor, x: Tensor, nominal: Tensor | None = None) -> Tensor:
    """Area under curves, sum_k (y_k + y_(k+1)) / 2 * (x_(k+1) - x_k).

    Args:
        curves: (B, K), y.
        x: (B, K), non-decreasing from 0 to 1.
        nominal: not used; `AREAS` calls all its functions with the same arguments.

    Returns:
        (B,) float64; the area of a curve with a single point is the height of that point.

    Example:
        >>> trapezoid_area(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.5, 1.0]]))
        tensor([0.7500], dtype=torch.float64)
    """
    curves = curves.double()
    # Without an interval the rule would give 0; the official protocol has one point where one step moves all patches.
    if curves.shape[1] == 1:
        return curves[:, 0]
    return torch.trapezoid(curves, x.to(curves), dim=1)


AREAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"trapezoid": trapezoid_area, "mean": mean_height}


@dataclass(frozen=True)
class Protocol:
    """Points of a curve.

    Attributes:
        counts: number of patches, patches per step -> numbers of moved patches (K,).
        x: ranks (B, N), counts (K,) -> x axis (B, K).
        nominal: the same -> x axis (B, K) if there were no ties.
    """

    counts: Callable[[int, int], Tensor]
    x: Callable[[Tensor, Tensor], Tensor]
    nominal: Callable[[Tensor, Tensor], Tensor]


PROTOCOLS = {
    "paper": Protocol(paper_counts, kept_fractions, counted_fractions),
    "official": Protocol(official_counts, nominal_fractions, nominal_fractions),
}


def _check_options(chosen: dict[str, tuple[str, Iterable[str]]], numbers: dict[str, int | None]) -> None:
    """Raise InputError unless every option is one of its names, and every number that is given is above 0."""
    for argument, (value, options) in chosen.items():
        if value not in options:
            raise InputError(f"{argument} must be one of {sorted(options)}, got {value!r}.")
    for argument, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"{argument} must be at least 1, got {number}.")


STEPS = ("all", "auto")


def chosen_tolerance(steps: str, tolerance: float | None, area: str) -> float | None:
    """The error of the area at which curves end to be refined; None where all steps are evaluated.

    Args:
        steps: "all" or "auto".
        tolerance: the error; None: `labn.metrics.functional.adaptive.TOLERANCE`.
        area: a name in `AREAS`.

    Raises:
        InputError: an unknown name, a tolerance that is not above 0 or would have no effect, or an area without bound.

    Example:
        >>> chosen_tolerance("auto", None, "trapezoid")
        0.002
    """
    _check_options({"steps": (steps, STEPS)}, {})
    if steps == "all":
        if tolerance is not None:
            raise InputError(f"tolerance={tolerance} would have no effect with steps='all'; set steps='auto'.")
        return None
    if area != "trapezoid":
        raise InputError(
            f"steps='auto' bounds the error of the trapezoid rule: leave area at 'trapezoid', got {area!r}."
        )
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InputError(f"tolerance must be above 0 and finite, got {tolerance}.")
    return TOLERANCE if tolerance is None else tolerance


@dataclass(frozen=True)
class InsertionDeletionCurves:
    """Curves of S samples at K points.

    Attributes:
        samples: (S,) int64, positions of the scored samples in their batch.
        counts: (K,) int64, nominal numbers of moved patches.
        x: (S, K) float64, the x axis in [0, 1].
        insertion: (S, K) probabilities as patches of the image appear on the fill, most important first.
        deletion: (S, K) probabilities as the same patches disappear from the image.
        fill_probability: (S,) probability of the class on the bare fill.
        nominal: (S, K) float64, the x axis if there were no ties.
        error: (S,) float64, bound of the error of `pid` where some points were not evaluated but lie on straight lines
            between others; None: all points were evaluated.
        evaluated: (S,) int64, number of points of both curves that were evaluated; None: all.

    Example:
        >>> x = torch.tensor([[0.0, 0.5, 1.0]]).double()
        >>> rising, falling = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> counts = torch.tensor([0, 2, 4])
        >>> curves = InsertionDeletionCurves(torch.tensor([0]), counts, x, rising, falling, torch.zeros(1), x)
        >>> curves.areas()["pid"]
        tensor([0.5000], dtype=torch.float64)
    """

    samples: Tensor
    counts: Tensor
    x: Tensor
    insertion: Tensor
    deletion: Tensor
    fill_probability: Tensor
    nominal: Tensor
    error: Tensor | None = None
    evaluated: Tensor | None = None

    def areas(self, area: str = "trapezoid") -> dict[str, Tensor]:
        """Areas `insertion` and `deletion`, `pid` = insertion - deletion (JSAI 2022, eq. 7), and `fill_probability`.

        Args:
            area: a name in `AREAS`: "trapezoid", or "mean" of the points.

        Returns:
            Four tensors (S,) float64, and `error` of adaptive curves.

        Raises:
            InputError: an unknown `area`.
        """
        _check_options({"area": (area, AREAS)}, {})
        measure = AREAS[area]
        insertion, deletion = (measure(curve, self.x, self.nominal) for curve in (self.insertion, self.deletion))
        fill = self.fill_probability.double()
        error = {} if self.error is None else {"error": self.error}
        pid = insertion - deletion
        return {"insertion": insertion, "deletion": deletion, "pid": pid, "fill_probability": fill, **error}


def patch_counts(size: tuple[int, int], patch_size: int, step: int | None = None, protocol: str = "paper") -> Tensor:
    """Numbers of moved patches at the points of a curve, for images of one size.

    Args:
        size: (height, width) of the images.
        patch_size: m in pixels.
        step: patches per step; None: the released table where it has the size, else about N / 100.
        protocol: a name in `PROTOCOLS`.

    Returns:
        (K,) int64.

    Raises:
        InputError: an unknown protocol, a step or patch size below 1, a patch larger than the image, or images that do
            not fit the protocol.

    Example:
        >>> patch_counts((32, 32), patch_size=16, step=2).tolist()
        [0, 2, 4]
    """
    _check_options({"protocol": (protocol, PROTOCOLS)}, {"step": step, "patch_size": patch_size})
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
    tolerance: float | None = None,
) -> InsertionDeletionCurves:
    """Insertion and deletion curves of some samples of a batch (JSAI 2022, eq. 8-9).

    With A_n the n first patches, p the image and b the fill, the model sees i_n = p on A_n, b elsewhere (insertion) and
    d_n = b on A_n, p elsewhere (deletion).

    Args:
        engine: the perturbation engine of the batch.
        ranks: (S, N) integer, as from `labn.perturbation.patches.patch_ranks`: a patch is in A_n where its rank < n.
        counts: (K,) int64, see `patch_counts`.
        classes: (S,) int64, the scored classes.
        fill: b of insertion, broadcastable to the images of the batch.
        deletion_fill: b of deletion, broadcastable likewise.
        patch_size: m in pixels.
        samples: (S,) int64, positions of the samples in the batch.
        protocol: a name in `PROTOCOLS`.
        ties: an option of `patch_ranks`; "threshold" draws the x axis as if there were no ties.
        probability: "softmax", "sigmoid" or "logit".
        tolerance: None evaluates all points; else points are added until the bound of the error of `pid` is at most
            this, see `labn.metrics.functional.adaptive.adaptive_curves`.

    Example:
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = nn.init.constant_(model[2].weight, 1.0)
        >>> engine = PerturbationEngine.for_model(model, torch.ones(1, 1, 4, 4))
        >>> ranks, counts = torch.arange(4)[None], torch.tensor([0, 2, 4])
        >>> sample, black = torch.tensor([0]), torch.zeros(1)
        >>> curves = insertion_deletion_curves(
        ...     engine, ranks, counts, sample, black, black, patch_size=2, samples=sample, probability="logit"
        ... )
        >>> curves.insertion, curves.deletion
        (tensor([[0.0000, 0.5000, 1.0000]]), tensor([[1.0000, 0.5000, 0.0000]]))
    """
    _check_options({"protocol": (protocol, PROTOCOLS), "ties": (ties, TIES)}, {"patch_size": patch_size})
    pixel_ranks = ranks_to_pixels(ranks, patch_size, (engine.images.shape[-2], engine.images.shape[-1]))

    def heights(rows: Tensor, points: Tensor) -> Tensor:
        """Heights (R, 2, P) of both curves of some samples at their points (R, 2, P)."""
        rows = rows.to(ranks.device)
        moved = counts.to(ranks.device)[points.to(ranks.device)]
        both = (
            engine.masked(pixel_ranks[rows], moved[:, curve], substrate, keep, samples[rows])
            for curve, (substrate, keep) in enumerate(((fill, "first"), (deletion_fill, "rest")))
        )
        return torch.stack([class_probability(logits, classes[rows], probability) for logits in both], 1)

    axes = PROTOCOLS[protocol]
    nominal = axes.nominal(ranks, counts)
    x = nominal if ties == "threshold" else axes.x(ranks, counts)
    if tolerance is None:
        every = torch.arange(len(counts)).expand(len(ranks), 2, -1)
        curves, error, evaluated = heights(torch.arange(len(ranks)), every), None, None
    else:
        found = adaptive_curves(x, heights, tolerance)
        curves, error, evaluated = found.heights, found.error, found.evaluated
    bare = class_probability(engine.filled(fill)[samples, None], classes, probability)[:, 0]
    insertion, deletion = curves.to(bare.dtype).unbind(1)
    return InsertionDeletionCurves(samples, counts, x, insertion, deletion, bare, nominal, error, evaluated)


def _check_batch(images: Tensor, targets: Tensor) -> None:
    """Raise InputError unless images are finite (B, C, H, W) with B >= 1 and targets are class indices (B,)."""
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise InputError(f"images must be floating (B, C, H, W), B >= 1; got {tuple(images.shape)} {images.dtype}.")
    if not bool(images.isfinite().all()):
        raise InputError("images must be finite; they hold NaN or infinity.")
    if not isinstance(targets, Tensor) or targets.shape != images.shape[:1] or targets.is_floating_point():
        got = f"{tuple(targets.shape)} {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets must be a tensor ({len(images)},) of class indices, got {got}.")


def _check_maps(images: Tensor, maps: Tensor) -> None:
    """Raise InputError unless the maps have the images' size and finite values."""
    expected = (len(images), *images.shape[-2:])
    if maps.shape != expected:
        raise InputError(f"maps must be {expected} to fit the images, got {tuple(maps.shape)}; resize them.")
    broken = (~maps.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(f"maps must be finite; map {broken[0]} holds NaN or infinity.")


def _check_logits(model: nn.Module, images: Tensor, probability: str) -> None:
    """Raise InputError for a model that returns probabilities, unless its outputs are read as they are."""
    if probability not in ("identity", "logit") and traits_of(model, images).probabilities:
        raise InputError(f"{probabilities_sentence(model)} Or read them as given with probability='identity'.")


def _checked_maps(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, probability: str) -> Tensor:
    """The maps, in float64 where they are of bool or integers, once everything fits together."""
    _check_batch(images, targets)
    if not isinstance(maps, Tensor):
        raise InputError(f"maps must be a tensor (B, H, W), got {type(maps).__name__}.")
    # Pooling needs floating values.
    maps = maps if maps.is_floating_point() else maps.double()
    _check_maps(images, maps)
    _check_logits(model, images, probability)
    return maps


def patch_insertion_deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    patch_size: int = 16,
    step: int | None = None,
    steps: str = "all",
    tolerance: float | None = None,
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
        maps: (B, H, W), importance of every pixel; also of bool or of integers.
        targets: (B,) int64, the scored classes.
        patch_size: m in pixels; 1 gives pixel-wise insertion-deletion.
        step: patches per step; None: the released table where it has the size, else about N / 100.
        steps: "all", or "auto" for as few of these steps as the tolerance allows.
        tolerance: error of `pid` at which "auto" ends; None: 0.002.
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
        `insertion`, `deletion`, `pid` and `fill_probability`, each (B,) float64, and `error` with `steps="auto"`.

    Raises:
        InputError: an option of another name, a step or patch size below 1, images or maps that are empty, hold NaN or
            infinity or do not fit each other, targets that are no class indices, or a model that ends in softmax;
            before the first score.

    Example:
        >>> model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.zeros_(model[2].weight)
        >>> images, maps = torch.rand(1, 1, 32, 32), torch.rand(1, 32, 32)
        >>> patch_insertion_deletion(model, images, maps, torch.tensor([0]), step=1)["pid"].tolist()
        [0.0]
    """
    chosen: dict[str, tuple[str, Iterable[str]]] = {
        "protocol": (protocol, PROTOCOLS),
        "ties": (ties, TIES),
        "fill": (fill, FILLS),
        "deletion_fill": (deletion_fill or fill, FILLS),
        "pooling": (pooling, POOLINGS),
        "probability": (probability, PROBABILITIES),
        "area": (area, AREAS),
    }
    _check_options(chosen, {"step": step, "patch_size": patch_size})
    tolerance = chosen_tolerance(steps, tolerance, area)
    maps = _checked_maps(model, images, maps, targets, probability)
    indices = torch.arange(len(images)) if indices is None else indices
    engine = PerturbationEngine.for_model(
        model, images, indices=indices, chunk_size=chunk_size, fold=fold, precision=precision
    )
    options = FillOptions(mean, std, bias, seed=seed, indices=indices)
    values = patch_pool(maps.to(images.device), patch_size, pooling)
    curves = insertion_deletion_curves(
        engine,
        # Random ties are drawn by the sample's index, so that they do not depend on the batch.
        patch_ranks(values, ties, seed=seed, indices=indices.to(images.device)),
        patch_counts((images.shape[-2], images.shape[-1]), patch_size, step, protocol),
        targets.to(images.device),
        fill_with(fill, images, options),
        fill_with(deletion_fill or fill, images, options),
        patch_size=patch_size,
        samples=torch.arange(len(images), device=images.device),
        protocol=protocol,
        ties=ties,
        probability=probability,
        tolerance=tolerance,
    )
    return curves.areas(area)
