"""Agreement of maps with the importance of objects, which is known where a scene can be drawn without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, checked_option, scatter_to_batch
from labn.metrics.functional.scene import (
    OPINIONS,
    check_scenes,
    class_importances,
    designs_of,
    object_opinions,
    scene_agreement,
    scene_logits,
)
from labn.metrics.scores import SampleScores
from labn.perturbation.coalitions import DESIGNS
from labn.perturbation.scene import Scene

READINGS = {"": None, "_logit": "logit"}
"""End of a value's name -> the output of the model that the importances are differences of; None: `probability`."""


class SceneAgreement(FilledMetric):
    """Rank correlation of a map's opinion of the objects with their importance, by drawing the scene without them.

    The importance of an object is f(x) - f(x without it), where the image without it is drawn anew: no fill, and
    nothing that the network has not been trained on. The map's opinion of an object is its sum over the pixels of it.

    Values, for f the class's probability and (`_logit`) its logit: `scene` is Spearman's correlation over the objects,
    in [-1, 1]; `scene_top` is 1 where the object of the highest opinion is the most important one, else 0. Samples with
    fewer than 4 objects, or whose objects are all equally important, are left out. The cost is one forward per object
    and image, once for all maps of an image.

    Args:
        importance: "removal", one object at a time, or "shapley", the Shapley value: exact up to 8 objects, else over
            random orders of removal; its names end in `@shapley`.
        opinion: "sum" of the map over the object's pixels, or "mean".
        permutations: number of random orders of "shapley".
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class), "label" or "predicted".
        probability: "softmax" or "sigmoid".
        seed: seed of the random orders, which depend on (seed, sample index).
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: an argument outside its range; on `score`, no scenes, or scenes of other images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.perturbation.scene import Scene
        >>> masks = torch.eye(4, dtype=torch.bool).view(4, 2, 2)
        >>> scene = Scene(tuple("abcd"), masks, lambda kept: (masks * kept.view(4, 1, 1)).sum(0)[None].float())
        >>> images, maps = torch.ones(1, 1, 2, 2), torch.tensor([[[3.0, 2.0], [1.0, 0.0]]])
        >>> model, target, index = nn.Flatten(), torch.tensor([0]), torch.tensor([0])
        >>> SceneAgreement().score(model, images, maps, target, index, scenes=[scene])["scene_top"]
        tensor([1.], dtype=torch.float64)
    """

    needs_scenes = True

    def __init__(
        self,
        importance: str = "removal",
        opinion: str = "sum",
        permutations: int = 256,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        probability: str = "softmax",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        suffix = "" if importance == "removal" else f"@{importance}"
        super().__init__(
            [f"scene{reading}{top}{suffix}" for reading in READINGS for top in ("", "_top")],
            positives_only=positives_only,
            correct_only=correct_only,
            score_class=score_class,
            probability=probability,
            seed=seed,
            chunk_size=chunk_size,
            fold=fold,
            precision=precision,
            **kwargs,
        )
        if permutations < 1:
            raise InputError(f"permutations must be at least 1, got {permutations}.")
        self.importance = checked_option("importance", importance, DESIGNS)
        self.opinion = checked_option("opinion", opinion, OPINIONS)
        self.permutations = permutations

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without scenes."""
        super().check(batch)
        if batch.scenes is None:
            raise InputError(
                "metric 'scene' draws the images without their objects: it needs scenes=, as `scene` of "
                "datamodules.SyntheticFundus gives them."
            )
        check_scenes(batch.scenes, len(batch.images))

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch; every scene runs once for all maps that share an engine."""
        scored = self.included(batch)
        values = [value for pair in self._values(batch, scored) for value in pair.values()]
        return SampleScores({n: scatter_to_batch(value, scored, batch) for n, value in zip(self.names, values)})

    def _values(self, batch: ScoredBatch, scored: Tensor) -> list[dict[str, Tensor]]:
        """The two agreements of the samples at the positions `scored`, for every reading."""
        samples = scored.tolist()
        scenes = self._scenes(batch, samples)
        designs = designs_of(
            scenes, self.importance, self.permutations, self.seed, batch.indices[scored.cpu()].tolist()
        )
        opinions = object_opinions(batch.maps.cpu()[samples], scenes, self.opinion)
        if not samples:
            return [scene_agreement([], []) for _ in READINGS]
        engine = batch.engine(**self.engine_options)
        logits = scene_logits(engine, scenes, [design.kept for design in designs], samples)
        classes = self.classes(batch, engine)[scored]
        return [
            scene_agreement(opinions, class_importances(logits, designs, classes, output or self.probability))
            for output in READINGS.values()
        ]

    def _scenes(self, batch: ScoredBatch, samples: Sequence[int]) -> list[Scene]:
        assert batch.scenes is not None  # `check` has raised otherwise
        return [batch.scenes[sample] for sample in samples]
