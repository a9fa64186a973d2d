"""The explanations of a command, shared by all explaining callbacks of a trainer: explainers, results folder, maps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.explanation.lifecycle import Schedule, stage_folder
from callbacks.explanation.progress import MapProgress
from labn.errors import InputError
from labn.explainers import Explainer
from labn.inference.fingerprint import digest, settings_digest, weights_digest
from labn.metrics import SampleMetric
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.scene import Scene
from labn.results.fingerprints import describe
from labn.results.store import ResultStore
from labn.results.tables import write_manifest


@dataclass
class ExplainedBatch:
    """The explained samples of a batch, with predictions and maps.

    Attributes:
        images: (n, C, H, W) float32, normalised.
        labels: (n,) int64.
        targets: (n,) int64 explained classes.
        indices: (n,) int64 positions in the split.
        masks: (n, H, W) bool ground truth; None if the data has no masks.
        boxes: ground-truth boxes; None if the data has no boxes.
        predictions: (n,) int64, the classes of highest probability.
        probabilities: (n, K) softmax of the unperturbed images, in [0, 1].
        engine: the batch's perturbation engine, shared by all metrics.
        maps: explainer name -> (n, H, W).
        scenes: the objects that the images were drawn from, where a metric asks for them.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    indices: Tensor
    masks: Tensor | None
    boxes: Any | None
    predictions: Tensor
    probabilities: Tensor
    engine: PerturbationEngine
    maps: dict[str, Tensor] = field(default_factory=dict)
    scenes: list[Scene] | None = None


class ExplanationSession:
    """The maps of one command: computed once, saved to disk, shared by every explaining callback of the trainer.

    The first callback with explainers creates the session in its `setup` and hands it to the others.

    Args:
        explainers: name -> explainer, of all callbacks together.
        target: rule for the explained class, see `chosen_classes`.
        engine_options: arguments of `PerturbationEngine`.
        schedule: epochs and samples that are explained.

    Attributes:
        metrics: name -> metric; filled when the evaluation callback has built them for the data.
        store: the results folder of the current stage; None before the first stage.
        split: val or test.
        network: the explained network.
        samples: indices of the samples that are explained in this stage.
        reached: indices of those that have been in a batch of this rank so far.
        from_disk: explainer -> number of its maps that were read from disk in this stage.
    """

    def __init__(
        self, explainers: dict[str, Explainer], target: str, engine_options: dict[str, Any], schedule: Schedule
    ) -> None:
        self.explainers, self.target, self.engine_options = explainers, target, engine_options
        self.schedule = schedule
        # The rule for the class is part of the key: the map of another class is another map.
        self.keys = self._keys()
        self.metrics: dict[str, SampleMetric] = {}
        self.samples: set[int] = set()
        self.reached: set[int] = set()
        self.from_disk = dict.fromkeys(explainers, 0)
        self.store: ResultStore | None = None
        # The latest batch by position: the callbacks receive the same batch one after the other.
        self._batch: tuple[tuple[Any, ...], ExplainedBatch | None] = ((), None)

    def _keys(self) -> dict[str, str]:
        return {name: digest(describe(e), self.target) for name, e in self.explainers.items()}

    @property
    def results(self) -> ResultStore:
        """The results folder of the current stage; valid after `open`."""
        assert self.store is not None
        return self.store

    def open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Start a stage: choose the samples and open the results folder; a collective.

        Results of other weights or other data are moved aside. Maps and scores of the same weights and data stay, and
        are read from disk instead of computed again.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.split, self.network = split, network_of(pl_module)
        # Black and white have other values in data of another normalisation, whose maps get another key.
        self.explainers = {n: e.for_normalised(data.mean, data.std) for n, e in self.explainers.items()}
        self.keys = self._keys()
        self.samples = set(self.schedule.samples(trainer, len(data.labels(split))))
        self.reached, self.from_disk = set(), dict.fromkeys(self.explainers, 0)
        self.store = ResultStore(stage_folder(trainer, pl_module, split), trainer.global_rank)
        identity = identity_of(trainer, self.network, split)
        self.facts = {
            **identity,
            "explainers": {name: describe(e) for name, e in self.explainers.items()},
            "target": self.target,
            "class_names": list(data.class_names),
        }
        if trainer.is_global_zero:
            self.store.prepare(identity)
            # Tables and pictures of an earlier run would stay beside those of this one.
            self.store.remove_derived()
            write_manifest(self.store.folder, self.facts)
        # No rank may write before rank zero has moved or removed earlier results.
        trainer.strategy.barrier("labn-store")
        self._batch = ((), None)
        # Samples are divided evenly among the ranks, so that the bar of rank zero stands for all of them.
        share = -(-len(self.samples) // trainer.world_size)
        self.progress = MapProgress(trainer, share * len(self.explainers))

    def close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a stage; warn if the loop ended before all chosen samples had been reached; a collective."""
        self.progress.close()
        count, chosen = torch.tensor(float(len(self.reached)), device=pl_module.device), len(self.samples)
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        if total < chosen:
            rank_zero_warn(
                f"{self.results.folder}: {total} of the {chosen} images chosen to be explained were reached; "
                f"trainer.limit_{self.split}_batches (or overfit_batches, fast_dev_run) excludes the others."
            )

    def batch(self, position: tuple[Any, ...], batch: Mapping[str, Any]) -> ExplainedBatch | None:
        """The explained samples of the batch at `position`; None if none of its samples is chosen."""
        if self._batch[0] != position:
            self._batch = (position, self._explained(batch))
        return self._batch[1]

    def _explained(self, batch: Mapping[str, Any]) -> ExplainedBatch | None:
        positions = [n for n, index in enumerate(batch["index"].tolist()) if index in self.samples]
        if not positions:
            return None
        images, labels, indices = (batch[name][positions] for name in ("image", "label", "index"))
        # `trainer.precision` (bf16-true) has converted the images; explanations run in float32.
        images = images.float()
        self.reached |= set(indices.tolist())
        # One engine per batch: all metrics share its cached forwards and its measured chunk size.
        engine = PerturbationEngine.for_model(self.network, images, indices=indices, **self.engine_options)
        probabilities = self._unperturbed(engine, images).softmax(dim=1)
        check_classes_known(labels, probabilities)
        return ExplainedBatch(
            images=images,
            labels=labels,
            targets=chosen_classes(self.target, labels, probabilities),
            indices=indices,
            masks=batch["mask"][positions] if "mask" in batch else None,
            boxes=[batch["boxes"][n] for n in positions] if "boxes" in batch else None,
            predictions=probabilities.argmax(dim=1),
            probabilities=probabilities,
            engine=engine,
        )

    def _unperturbed(self, engine: PerturbationEngine, images: Tensor) -> Tensor:
        """Logits (n, K) of the images in full precision, whatever the precision of the perturbed forwards."""
        if self.engine_options.get("precision", "fp32") == "fp32":
            return engine.original()
        options = {**self.engine_options, "precision": "fp32"}
        return PerturbationEngine.for_model(self.network, images, **options).original()

    def maps(self, batch: ExplainedBatch, name: str) -> Tensor:
        """Maps (n, H, W) of the explainer `name`: those in memory, else those on disk, else computed and saved."""
        if name not in batch.maps:
            indices = batch.indices.tolist()
            maps = self.results.maps(name, self.keys[name], indices)
            self.from_disk[name] += len(maps)
            missing = [n for n, index in enumerate(indices) if index not in maps]
            if missing:
                # A ground-truth map needs masks, which `attribute(model, images, targets, indices)` does not get.
                masks = None if batch.masks is None else batch.masks[missing]
                explainer = self.explainers[name].with_masks(masks)
                new = explainer(self.network, batch.images[missing], batch.targets[missing], batch.indices[missing])
                self.results.add_maps(name, self.keys[name], batch.indices[missing], new)
                maps |= {indices[n]: new[k] for k, n in enumerate(missing)}
            batch.maps[name] = torch.stack([maps[index].to(batch.images.device) for index in indices])
            self.progress.update(len(indices))
        return batch.maps[name]


def identity_of(trainer: pl.Trainer, network: nn.Module, split: str) -> dict[str, str]:
    """Hashes of everything that all results of a stage depend on: weights, network settings, data, and the split."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "checkpoint": weights_digest(network),
        "network": settings_digest(network),
        # The normalisation belongs to the data: the same pixels, normalised otherwise, are other inputs.
        "data": digest(data.fingerprint(split), list(data.mean), list(data.std)),
        "split": split,
    }


def check_target(target: int | str) -> None:
    """Check a rule for the explained class.

    Raises:
        InputError: `chosen_classes` has no such rule.
    """
    if re.fullmatch(r"label|prediction|top[1-9]\d*|\d+", str(target)) is None:
        raise InputError(f"target is {target!r}; it must be label, prediction, top<k> such as top2, or a class index.")


def check_classes_known(labels: Tensor, probabilities: Tensor) -> None:
    """Check that every label (n,) is below K, the number of classes of the probabilities (n, K).

    Raises:
        InputError: a label is K or more.
    """
    classes = probabilities.shape[1]
    if len(labels) and int(labels.max()) >= classes:
        raise InputError(
            f"The network gives {classes} logit{'s' * (classes > 1)} per image, but the data has the label "
            f"{int(labels.max())}; it needs one logit per class, also where there are two."
        )


def chosen_classes(target: str, labels: Tensor, probabilities: Tensor) -> Tensor:
    """The classes to explain, (n,) int64.

    Args:
        target: `label`, `prediction`, `top<k>` (the k-th most probable class) or a class index.
        labels: (n,) int64.
        probabilities: (n, K).

    Raises:
        InputError: k is above K, or the class index is K or more.
    """
    if target == "label":
        return labels
    number = {"prediction": "1"}.get(target, target.removeprefix("top"))
    classes, by_rank = probabilities.shape[1], not target.isdigit()
    # Ranks count from 1, class indices from 0.
    if int(number) - by_rank >= classes:
        raise InputError(f"target is {target}; the network has {classes} classes.")
    if by_rank:
        return probabilities.topk(int(number), dim=1).indices[:, -1]
    return torch.full_like(labels, int(number))


def network_of(pl_module: pl.LightningModule) -> nn.Module:
    """The network inside a LightningModule of this project, or the module itself."""
    return getattr(pl_module, "network", pl_module)
