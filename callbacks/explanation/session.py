"""What the explaining callbacks of one trainer share: explainers, the results folder, the current batch's maps."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers import Explainer, GroundTruthMap
from labn.inference.fingerprint import digest, settings_digest, weights_digest
from labn.perturbation.engine import PerturbationEngine
from labn.results.fingerprints import describe
from labn.results.store import ResultStore
from labn.results.tables import write_manifest


class Progress:
    """Lines on standard error that say how far explanation and scoring are and how long they will still take.

    Args:
        total: units of work (an explainer's maps or scores for one image are one unit).
        seconds: between two lines.
    """

    def __init__(self, total: int, seconds: float = 20.0) -> None:
        self.total, self.seconds = total, seconds
        self.done = self.skipped = 0
        self.start = self.last = time.monotonic()

    def advance(self, units: int, computed: bool = True) -> None:
        """Count `units` as done; those read from disk do not enter the rate."""
        self.done += units
        self.skipped += 0 if computed else units
        now = time.monotonic()
        if computed and units and now - self.last >= self.seconds:
            self.last = now
            rate = (self.done - self.skipped) / (now - self.start)
            left = max(self.total - self.done, 0) / max(rate, 1e-9)
            minutes, seconds = divmod(round(left), 60)
            print(
                f"explaining and scoring: {self.done} of {self.total}, {minutes} min {seconds:02d} s left",
                file=sys.stderr,
                flush=True,
            )


@dataclass
class Batch:
    """The part of a batch that is explained, and what has been computed for it.

    Attributes:
        images: (n, C, H, W) normalised.
        labels: (n,) int64.
        targets: (n,) int64, the classes explained.
        indices: (n,) int64 positions in the split.
        masks: (n, H, W) bool ground truth, where the data has it.
        boxes: ground-truth boxes, where the data has them.
        predictions: (n,) int64.
        probabilities: (n, K) softmax of the unperturbed images.
        engine: the batch's perturbation engine, shared by all metrics.
        maps: explainer name -> (n, H, W).
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


class Session:
    """One stage's explanations: computed once, kept on disk, shared by every callback of the trainer.

    Args:
        explainers: name -> explainer, of all callbacks together.
        target: class explained per image, see `chosen_classes`.
        engine_options: arguments of `PerturbationEngine`.
    """

    def __init__(self, explainers: dict[str, Explainer], target: str, engine_options: dict[str, Any]) -> None:
        self.explainers = explainers
        self.target = target
        self.engine_options = engine_options
        self.keys = {name: digest(describe(e), target) for name, e in explainers.items()}
        self.from_disk = dict.fromkeys(explainers, 0)
        self.subset: set[int] | None = None
        self.reached: set[int] = set()
        self.progress = Progress(0)
        self._batch: tuple[tuple[Any, ...], Batch | None] = ((), None)

    def open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str, subset: list[int]) -> None:
        """Start a stage: find its folder, move results of other weights or data aside, say what makes the new ones.

        Maps and scores of the same weights and data stay, to be taken from disk. A collective: every rank calls it.
        """
        self.split = split
        self.subset, self.reached = set(subset), set()
        self.network = network_of(pl_module)
        stage = f"val/{epoch_of(trainer, pl_module)}" if split == "val" else split
        fast = getattr(trainer, "fast_dev_run", False)
        root = Path(tempfile.mkdtemp(prefix="labn-")) if fast else Path(trainer.default_root_dir)
        root = Path(trainer.strategy.broadcast(str(root)))
        self.store = ResultStore(root / stage, trainer.global_rank)
        identity = identity_of(trainer, self.network, split)
        self.facts = {
            **identity,
            "explainers": {name: describe(e) for name, e in self.explainers.items()},
            "target": self.target,
            "class_names": list(trainer.datamodule.class_names),  # type: ignore[attr-defined]
        }
        if trainer.is_global_zero:
            self.store.prepare(identity)
            self.store.remove_derived()
            write_manifest(self.store.folder, self.facts)
        trainer.strategy.barrier("labn-store")
        self.from_disk = dict.fromkeys(self.explainers, 0)
        self.progress = Progress(0)
        self._batch = ((), None)

    def expect(self, units: int) -> None:
        """Add work to the progress lines."""
        self.progress.total += units

    def batch(self, position: tuple[Any, ...], raw: dict[str, Tensor]) -> Batch | None:
        """The explained part of the batch at `position`; None where no sample of it is in the subset."""
        if self._batch[0] != position:
            self._batch = (position, self._start(raw))
        return self._batch[1]

    def _start(self, raw: dict[str, Tensor]) -> Batch | None:
        assert self.subset is not None
        rows = [n for n, index in enumerate(raw["index"].tolist()) if index in self.subset]
        if not rows:
            return None
        images, labels, indices = (raw[name][rows] for name in ("image", "label", "index"))
        self.reached |= set(indices.tolist())
        engine = PerturbationEngine.for_model(self.network, images.float(), indices=indices, **self.engine_options)
        probabilities = self._unperturbed(engine, images.float()).softmax(dim=1)
        check_classes_known(labels, probabilities)
        predictions = probabilities.argmax(dim=1)
        return Batch(
            images=images.float(),
            labels=labels,
            targets=chosen_classes(self.target, labels, probabilities),
            indices=indices,
            masks=raw["mask"][rows] if "mask" in raw else None,
            boxes=[raw["boxes"][n] for n in rows] if "boxes" in raw else None,
            predictions=predictions,
            probabilities=probabilities,
            engine=engine,
        )

    def _unperturbed(self, engine: PerturbationEngine, images: Tensor) -> Tensor:
        """Logits of the images in full precision, whatever that of the perturbed forwards."""
        if self.engine_options.get("precision", "fp32") == "fp32":
            return engine.original()
        return PerturbationEngine.for_model(self.network, images, **{**self.engine_options, "precision": "fp32"}).original()

    def maps(self, batch: Batch, name: str) -> Tensor:
        """Maps (n, H, W) of the explainer `name` for the batch: from memory, from disk, or computed and saved."""
        if name not in batch.maps:
            numbers = batch.indices.tolist()
            found = self.store.maps(name, self.keys[name], numbers)
            self.from_disk[name] += len(found)
            missing = [n for n, index in enumerate(numbers) if index not in found]
            if missing:
                explainer = self.explainers[name]
                if isinstance(explainer, GroundTruthMap):
                    explainer = explainer.with_masks(None if batch.masks is None else batch.masks[missing])
                maps = explainer(self.network, batch.images[missing], batch.targets[missing], batch.indices[missing])
                self.store.add_maps(name, self.keys[name], batch.indices[missing], maps)
                found |= {numbers[n]: maps[k] for k, n in enumerate(missing)}
            batch.maps[name] = torch.stack([found[index].to(batch.images.device) for index in numbers])
            self.progress.advance(len(missing))
            self.progress.advance(len(numbers) - len(missing), computed=False)
        return batch.maps[name]


def identity_of(trainer: pl.Trainer, network: nn.Module, split: str) -> dict[str, str]:
    """What the results of a stage depend on as a whole: weights, settings of the network, data and split."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "checkpoint": weights_digest(network),
        "network": settings_digest(network),
        "data": digest(data.fingerprint(split), list(data.mean), list(data.std)),
        "split": split,
    }


def check_target(target: int | str) -> None:
    """Raise ValueError unless `target` is a rule of `chosen_classes`."""
    if re.fullmatch(r"label|prediction|top[1-9]\d*|\d+", str(target)) is None:
        raise InputError(f"target is {target!r}; it must be label, prediction, top<k> such as top2, or a class index.")


def check_counts(**counts: int | None) -> None:
    """Raise ValueError unless every one is a number of images or epochs: not negative, or None for all.

    `test_images` must be above 0, because nothing but empty tables would come of it.
    """
    for name, count in counts.items():
        least = int(name == "test_images")
        if count is not None and count < least:
            raise InputError(f"{name} is {count}; it must be at least {least}{', or null for all' * least}.")


def check_classes_known(labels: Tensor, probabilities: Tensor) -> None:
    """Raise ValueError where a label (n,) is no class of the network, which gives probabilities (n, K)."""
    classes = probabilities.shape[1]
    if len(labels) and int(labels.max()) >= classes:
        raise InputError(
            f"The network gives {classes} logit{'s' * (classes > 1)} per image, but the data has the label "
            f"{int(labels.max())}; it needs one logit per class, also where there are two."
        )


def chosen_classes(target: str, labels: Tensor, probabilities: Tensor) -> Tensor:
    """(n,) int64 classes to explain: `label`, `prediction`, `top<k>` (the k-th most probable one) or an index.

    Args:
        target: the rule.
        labels: (n,) int64.
        probabilities: (n, K).

    Raises:
        ValueError: a k above K, or no class of that index.
    """
    if target == "label":
        return labels
    place = {"prediction": "1"}.get(target, target.removeprefix("top"))
    classes, by_rank = probabilities.shape[1], not target.isdigit()
    if int(place) - by_rank >= classes:
        raise InputError(f"target is {target}; the network has {classes} classes.")
    if by_rank:
        return probabilities.topk(int(place), dim=1).indices[:, -1]
    return torch.full_like(labels, int(place))


def network_of(pl_module: pl.LightningModule) -> nn.Module:
    """The network inside a LightningModule of this project, or the module itself."""
    return getattr(pl_module, "network", pl_module)


def epoch_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """The epoch whose weights are explained, of the running fit, else of the loaded checkpoint: `epoch=003`.

    A validation in the middle of an epoch names its step too, so that it has a folder of its own.
    """
    if trainer.state.fn == "fit":
        step = "" if trainer.is_last_batch else f"-step={trainer.global_step}"
        return f"epoch={trainer.current_epoch:03d}{step}"
    return f"epoch={getattr(pl_module, 'loaded_epoch', None) or 0:03d}"


def evenly_spaced(size: int, count: int | None) -> list[int]:
    """At most `count` indices spread evenly over `range(size)`: the same pictures every epoch (None: all)."""
    if count is None or count >= size:
        return list(range(size))
    return sorted({round(k * (size - 1) / max(count - 1, 1)) for k in range(count)})
