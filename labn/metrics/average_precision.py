"""Average precision of detections, the same on any number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision


class AveragePrecision(MeanAveragePrecision):
    """Average precision at an overlap of .5, overall and per class (COCO's interpolation at 101 points).

    The states of all ranks are merged by image index, each image once, so that the value equals that of one process.
    """

    indices: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(iou_thresholds=[0.5], class_metrics=True, **kwargs)
        # Up to 200 detections per image arrive and the best 100 count, as in COCO: that is no reason for a warning.
        self.warn_on_many_detections = False
        self.add_state("indices", default=[], dist_reduce_fx=None)

    def update(  # type: ignore[override]
        self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]], indices: Tensor
    ) -> None:
        """Add the detections of a batch to the state.

        Args:
            preds: per image `boxes` (n, 4), `scores` (n,), `labels` (n,).
            target: per image `boxes` (m, 4), `labels` (m,), `iscrowd` (m,).
            indices: (B,) int64, positions in the data set.
        """
        super().update(preds, target)
        self.indices += list(indices.cpu())

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        # torchmetrics gathers one tensor per image and rank, and hangs where ranks have different numbers of images.
        # Here all images of a rank go in one object, which may also be empty.
        own = {name: [item.cpu() for item in getattr(self, name)] for name in self._reductions}
        ranks: list[dict[str, list[Tensor]]] = [{}] * dist.get_world_size(process_group)
        dist.all_gather_object(ranks, own, group=process_group)
        merged = {name: list(itertools.chain.from_iterable(r[name] for r in ranks)) for name in self._reductions}
        # Sorted by index: ties between scores are then resolved in the order of one process.
        positions = {int(index): position for position, index in enumerate(merged["indices"])}
        order = [position for _, position in sorted(positions.items())]
        for name, items in merged.items():
            # Only boxes are evaluated, so the states of masks are empty lists.
            setattr(self, name, [items[position].to(self.device) for position in order] if items else [])
