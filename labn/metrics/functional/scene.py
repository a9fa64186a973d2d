"""Importance of the objects of a scene by drawing the scene again, and the agreement of maps with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.metrics.functional.class_probability import class_probability
from labn.metrics.functional.similarity import rank_correlation
from labn.perturbation.coalitions import DESIGNS, Design
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.scene import Scene

ROUNDING = 1e-6
"""Importances, and opinions relative to the largest one, that differ by less are tied: float32 has no more digits."""

OPINIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda sums, sizes: sums,
    "mean": lambda sums, sizes: sums / sizes,
}


def scene_logits(
    engine: PerturbationEngine, scenes: Sequence[Scene], kept: Sequence[Tensor], samples: Sequence[int]
) -> list[Tensor]:
    """Logits of scenes that are drawn with some of their objects; the engine runs a scene that it knows no second time.

    Args:
        engine: the perturbation engine of the batch.
        scenes: the scenes of S samples.
        kept: per scene (K, O) bool, the objects to draw.
        samples: positions of the samples in the batch.

    Returns:
        Per scene (K, num_classes).

    Raises:
        InputError: a scene whose drawing is not the image of its sample.

    Example:
        >>> from labn.perturbation.coalitions import removal_design
        >>> masks = torch.eye(2, dtype=torch.bool).view(2, 1, 2)
        >>> scene = Scene(("left", "right"), masks, lambda kept: (masks * kept.view(2, 1, 1)).sum(0)[None].float())
        >>> engine = PerturbationEngine(lambda x: x.flatten(1), torch.ones(1, 1, 1, 2))
        >>> scene_logits(engine, [scene], [removal_design(2).kept], [0])
        [tensor([[1., 1.],
                 [0., 1.],
                 [1., 0.]])]
    """
    drawings = [
        (sample, scene, objects) for sample, scene, all_kept in zip(samples, scenes, kept) for objects in all_kept
    ]
    for sample, scene in zip(samples, scenes):
        _check_scene(engine, scene, sample)

    def batch(positions: Tensor) -> Tensor:
        chosen = (drawings[position] for position in positions.tolist())
        return torch.stack([scene.draw(objects) for _, scene, objects in chosen]).to(engine.images)

    keys: list[Hashable] = [_key(sample, objects) for sample, _, objects in drawings]
    return list(engine.remembered(keys, batch).split([len(objects) for objects in kept]))


def _key(sample: int, kept: Tensor) -> Hashable:
    """The key of a drawing in the engine's memory; the whole scene is the image itself."""
    return (sample,) if bool(kept.all()) else ("scene", sample, np.packbits(kept.numpy()).tobytes())


def _check_scene(engine: PerturbationEngine, scene: Scene, sample: int) -> None:
    whole, image = scene.draw(torch.ones(len(scene.names), dtype=torch.bool)), engine.images[sample]
    if whole.shape != image.shape or not torch.allclose(whole.to(image), image, atol=1e-4):
        raise InputError(f"scenes must be those of the images; drawing scene {sample} does not give its image.")


def importances_of(outputs: Tensor, design: Design, scale: float | Tensor = 1.0) -> Tensor:
    """Importances (n,) float64, weights @ outputs, rounded so that differences of float32's rounding are ties.

    Args:
        outputs: (K,) outputs of the design's scenes.
        design: the design.
        scale: size of the outputs, which the rounding is relative to where it is above 1.

    Example:
        >>> from labn.perturbation.coalitions import removal_design
        >>> importances_of(torch.tensor([0.9, 0.4, 0.9000001]), removal_design(2))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    values = design.weights @ outputs.double().cpu()
    quantum = ROUNDING * max(float(scale), 1.0)
    return (values / quantum).round() * quantum + 0.0  # -0 becomes 0


def object_importances(
    model: nn.Module,
    images: Tensor,
    scenes: Sequence[Scene],
    targets: Tensor,
    *,
    importance: str = "removal",
    probability: str = "softmax",
    permutations: int = 256,
    seed: int = 0,
    indices: Tensor | None = None,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """Importance of every object of every scene for a class, without any fill: the scene is drawn without it.

    Args:
        model: returns logits or an object with `.logits`; not changed.
        images: (B, C, H, W), normalised.
        scenes: the B scenes that the images were drawn from, see `ImageDataModule.scene`.
        targets: (B,) int64 classes.
        importance: "removal", f(x) - f(x without o), or "shapley", the Shapley value: exact up to 8 objects, else over
            random orders.
        probability: output f: "softmax", "sigmoid" or "logit".
        permutations: number of random orders.
        seed: seed of the orders.
        indices: (B,) int64 positions in a data set, which the orders depend on; None: 0..B-1.
        chunk_size: images per forward; None lets the engine choose.

    Returns:
        Per image (O,) float64, on the CPU.

    Raises:
        InputError: an unknown `importance`, another number of scenes than images, or a scene of another image.

    Example:
        >>> masks = torch.eye(2, dtype=torch.bool).view(2, 1, 2)
        >>> scene = Scene(("left", "right"), masks, lambda kept: (masks * kept.view(2, 1, 1)).sum(0)[None].float())
        >>> target = torch.tensor([0])
        >>> object_importances(nn.Flatten(), torch.ones(1, 1, 1, 2), [scene], target, probability="logit")
        [tensor([1., 0.], dtype=torch.float64)]
    """
    indices = torch.arange(len(images)) if indices is None else indices
    check_scenes(scenes, len(images))
    designs = designs_of(scenes, importance, permutations, seed, indices.tolist())
    engine = PerturbationEngine.for_model(model, images, indices=indices, chunk_size=chunk_size)
    logits = scene_logits(engine, scenes, [design.kept for design in designs], range(len(images)))
    return class_importances(logits, designs, targets, probability)


def check_scenes(scenes: Sequence[Scene], count: int) -> None:
    """Raise InputError unless there is one scene per image."""
    if len(scenes) != count:
        raise InputError(f"scenes must have one entry per image ({count},), got {len(scenes)}.")


def designs_of(
    scenes: Sequence[Scene], importance: str, permutations: int, seed: int, indices: Sequence[int]
) -> list[Design]:
    """The design of every scene.

    Raises:
        InputError: an unknown `importance`.
    """
    if importance not in DESIGNS:
        raise InputError(f"importance must be one of {sorted(DESIGNS)}, got {importance!r}.")
    return [DESIGNS[importance](len(s.names), permutations, seed, index) for s, index in zip(scenes, indices)]


def class_importances(
    logits: Sequence[Tensor], designs: Sequence[Design], classes: Tensor, probability: str
) -> list[Tensor]:
    """Importances (O,) of the objects of every scene for one class per scene, from the logits (K, num_classes)."""
    importances = []
    for scores, design, one in zip(logits, designs, classes.to(logits[0].device) if logits else ()):
        # float64 before the softmax: an importance is a small difference of two probabilities.
        outputs = class_probability(scores.double()[None], one[None], probability)[0]
        importances.append(importances_of(outputs, design, outputs.abs().max()))
    return importances


def object_opinions(maps: Tensor, scenes: Sequence[Scene], opinion: str = "sum") -> list[Tensor]:
    """A map's opinion of every object: the sum of the map over the object's pixels, or its mean.

    Args:
        maps: (B, H, W).
        scenes: B scenes.
        opinion: "sum" or "mean".

    Returns:
        Per map (O,) float64, on the CPU.

    Raises:
        InputError: an unknown `opinion`, or scenes of another size or number than the maps.

    Example:
        >>> scene = Scene(("bar",), torch.tensor([[[True, True, False]]]), lambda kept: torch.zeros(1, 1, 3))
        >>> maps = torch.tensor([[[1.0, 3.0, 9.0]]])
        >>> object_opinions(maps, [scene]), object_opinions(maps, [scene], "mean")
        ([tensor([4.], dtype=torch.float64)], [tensor([2.], dtype=torch.float64)])
    """
    if opinion not in OPINIONS:
        raise InputError(f"opinion must be one of {sorted(OPINIONS)}, got {opinion!r}.")
    check_scenes(scenes, len(maps))
    return [_opinions(one, scene.masks, opinion) for one, scene in zip(maps.double().cpu(), scenes)]


def _opinions(heat: Tensor, masks: Tensor, opinion: str) -> Tensor:
    if masks.shape[1:] != heat.shape:
        raise InputError(f"the objects have {tuple(masks.shape[1:])} pixels, the maps {tuple(heat.shape)}.")
    sizes = masks.sum((1, 2)).double()
    values = OPINIONS[opinion]((masks * heat).sum((1, 2)), sizes.clamp(min=1))
    quantum = max(ROUNDING * float(values.abs().max()), torch.finfo(torch.float64).tiny) if len(values) else 1.0
    return (values / quantum).round() * quantum


def scene_agreement(opinions: Sequence[Tensor], importances: Sequence[Tensor]) -> dict[str, Tensor]:
    """Agreement of a map's opinions with the importances of the objects, per sample.

    Args:
        opinions: per sample (O,).
        importances: per sample (O,).

    Returns:
        `scene`, Spearman's correlation in [-1, 1] over the objects, tied ones with the mean of their ranks; and
        `scene_top`, 1 where the object of the highest opinion has the highest importance, else 0, and among several
        highest opinions their share. (B,) float64; NaN with fewer than 4 objects, or where all are equally important.

    Example:
        >>> importances = [torch.tensor([0.7, 0.1, 0.0, 0.0])]
        >>> scene_agreement([torch.tensor([2.0, 1.0, 0.5, 0.5])], importances)
        {'scene': tensor([1.], dtype=torch.float64), 'scene_top': tensor([1.], dtype=torch.float64)}
    """
    pairs = [_agreement(opinion.double(), truth.double()) for opinion, truth in zip(opinions, importances)]
    values = torch.tensor(pairs, dtype=torch.float64).view(-1, 2)
    return {"scene": values[:, 0], "scene_top": values[:, 1]}


def _agreement(opinion: Tensor, truth: Tensor) -> tuple[float, float]:
    if len(truth) < 4 or bool((truth == truth[0]).all()) or not bool(truth.isfinite().all()):
        return math.nan, math.nan
    spearman = rank_correlation(opinion.view(1, 1, -1), truth.view(1, 1, -1))
    highest, best = opinion == opinion.max(), truth == truth.max()
    return float(spearman), float((highest & best).sum() / highest.sum())


def painted_importances(importances: Sequence[Tensor], scenes: Sequence[Scene], opinion: str = "sum") -> Tensor:
    """Maps (B, H, W) float64 whose opinions are the importances: each object's is painted evenly into its pixels.

    Args:
        importances: per scene (O,).
        scenes: B scenes.
        opinion: the reading that recovers the importances, "sum" or "mean".

    Example:
        >>> scene = Scene(("bar",), torch.tensor([[[True, True, False]]]), lambda kept: torch.zeros(1, 1, 3))
        >>> painted_importances([torch.tensor([0.5])], [scene])
        tensor([[[0.2500, 0.2500, 0.0000]]], dtype=torch.float64)
    """
    maps = []
    for values, scene in zip(importances, scenes):
        sizes = scene.masks.sum((1, 2)).double() if opinion == "sum" else torch.ones(len(values)).double()
        maps.append((scene.masks * (values.double() / sizes).view(-1, 1, 1)).sum(0))
    return torch.stack(maps)
