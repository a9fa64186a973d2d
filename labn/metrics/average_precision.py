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

    torchmetrics gathers one tensor per image and rank, which hangs as soon as ranks have different numbers of images.
    Here a rank hands over all of its images at once, be they none, and images are ordered by their index, each once,
    so that ties between scores are resolved as on one process.
    """

    indices: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(iou_thresholds=[0.5], class_metrics=True, **kwargs)
        self.warn_on_many_detections = False  # of up to 200 per image the best 100 count, as in COCO
        self.add_state("indices", default=[], dist_reduce_fx=None)

    def update(  # type: ignore[override]
        self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]], indices: Tensor
    ) -> None:
        """Keep a batch.

        Args:
            preds: per image `boxes` (n, 4), `scores` (n,), `labels` (n,).
            target: per image `boxes` (m, 4), `labels` (m,), `iscrowd` (m,).
            indices: (B,) int64, positions in the data set.
        """
        super().update(preds, target)
        self.indices += list(indices.cpu())

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        mine = {name: [item.cpu() for item in getattr(self, name)] for name in self._reductions}
        ranks: list[dict[str, list[Tensor]]] = [{}] * dist.get_world_size(process_group)
        dist.all_gather_object(ranks, mine, group=process_group)
        merged = {name: list(itertools.chain.from_iterable(r[name] for r in ranks)) for name in self._reductions}
        rows = {int(index): row for row, index in enumerate(merged["indices"])}
        for name, items in merged.items():
            # States of masks are empty: only boxes are kept.
            kept = [items[row].to(self.device) for _, row in sorted(rows.items())] if items else []
            setattr(self, name, kept)
