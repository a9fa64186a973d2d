"""Occlusion: the drop of the score when a window of the image is covered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, check_targets
from labn.explainers.cam.score import SCORES
from labn.explainers.gradient import channel_values
from labn.perturbation.engine import PerturbationEngine


def window_coverage(length: int, window: int, stride: int, like: Tensor) -> Tensor:
    """The positions that each window covers along one axis, as (windows, length) of 0 and 1.

    There are ceil((length - window) / stride) + 1 windows, which cover every position if stride <= window; the last one
    may extend beyond the axis.
    """
    count = -(-max(length - window, 0) // stride) + 1
    first = torch.arange(count, device=like.device)[:, None] * stride
    position = torch.arange(length, device=like.device)
    return ((position >= first) & (position < first + window)).to(like.dtype)


class Occlusion(Explainer):
    """Occlusion (Zeiler and Fergus, ECCV 2014, section 4.2), averaged over the windows that cover a pixel.

        S(l) = mean over windows w around l of  y_c(x) - y_c(x with w covered)

    Args:
        window: side of the square window in pixels.
        stride: pixels from one window to the next, at most `window`.
        baseline: colour of a covered window, one number or one per channel, in normalised units; 0 is the mean colour.
        score: "logit" or "probability".
        chunk_size: covered images per forward; None: chosen by the engine. The map does not depend on it.
        fold: whether the forwards may run on a copy with BatchNorm folded, which is equal up to rounding.

    Raises:
        InputError: `stride` or `score` is outside of these values.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import Occlusion
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.constant_(model[1].weight, 0.5)
        >>> Occlusion(window=1, stride=1)(model, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0]))
        tensor([[[0.5000, 1.0000],
                 [1.5000, 2.0000]]])
    """

    def __init__(
        self,
        window: int = 32,
        stride: int = 16,
        baseline: float | Sequence[float] = 0.0,
        score: str = "logit",
        chunk_size: int | None = None,
        fold: bool = True,
    ) -> None:
        if not 1 <= stride <= window:
            raise InputError(f"stride must be from 1 to window ({window}), got {stride}.")
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
        self.window, self.stride, self.baseline, self.score = window, stride, baseline, score
        self.chunk_size, self.fold = chunk_size, fold

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        rows = window_coverage(images.shape[-2], self.window, self.stride, images)
        columns = window_coverage(images.shape[-1], self.window, self.stride, images)
        baseline = channel_values(self.baseline, images, "baseline")
        engine = PerturbationEngine.for_model(model, images, chunk_size=self.chunk_size, fold=self.fold)
        original = engine.original()
        check_targets(targets, original.shape[1])
        scores = SCORES[self.score](original).gather(1, targets[:, None])
        lost = [
            score - self._covered(engine, image, target, rows, columns, baseline)
            for image, target, score in zip(images, targets, scores)
        ]
        # Windows are products of a row and a column interval, so sums over windows are two matrix products.
        covering = rows.sum(0)[:, None] * columns.sum(0)
        return rows.T @ torch.stack(lost) @ columns / covering

    def _covered(
        self,
        engine: PerturbationEngine,
        image: Tensor,
        target: Tensor,
        rows: Tensor,
        columns: Tensor,
        baseline: Tensor,
    ) -> Tensor:
        """The target's score (window rows, window columns) of one image with each window covered."""

        def cover(position: Tensor) -> Tensor:
            row, column = rows[position // len(columns)], columns[position % len(columns)]
            inside = (row[:, :, None] * column[:, None, :]).bool().unsqueeze(1)
            return torch.where(inside, baseline, image)

        logits = engine.run(cover, len(rows) * len(columns))
        return SCORES[self.score](logits)[:, target].view(len(rows), len(columns))
