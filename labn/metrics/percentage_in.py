"""The percentage-in metric: what the model says when it sees only the top pixels of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labn.metrics.base import SampleScores, ScoredBatch
from labn.metrics.filled import FilledMetric, key_of, spread
from labn.metrics.functional.confidence import percent_counts
from labn.perturbation.fills import Channels
from labn.perturbation.patches import patch_ranks, ranks_to_pixels

PERCENTS = (5, 10, 20, 25, 50)
FORMS = ("prob", "logit", "ratio")


class PercentageIn(FilledMetric):
    """Percentage in (An and Joe 2022): the class's score while only the map's top q % of the pixels are shown.

    The paper prints figures without a definition. Three readings are given side by side: `prob`, the softmax
    probability O (in [0, 1]); `logit`, the activation score, which fits the printed figures best; `ratio`, O / Y with Y
    the probability on the whole image. All are points of the pixel-wise insertion curve on the same fill, so that all
    percentages of a sample come from one nested curve: K forwards, and one of the unperturbed image for `ratio`. Ties
    are in raster order, so that exactly q % are shown.

    Values are named `pctin_prob5`, `pctin_logit10`, ...

    Args:
        percents: q, each above 0 and at most 100.
        forms: of "prob", "logit" and "ratio".
        headline: name the logits `pctin<q>` without their form.
        fill: what the other pixels show, a name in `labn.perturbation.fills.FILLS`; the paper's is black.
        mean: per-channel mean that the images were normalised with; None: not at all.
        std: likewise the standard deviation.
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: leave out samples with label 0, which then cost no forward.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "label" (as the insertion curve), "target" or "predicted".
        seed: of the "uniform" fill.
        chunk_size: inputs per forward, see `PerturbationEngine`; this and the next two shape the engine
            that is made where no `cache` is given.
        fold: whether the BatchNorm-folded copy of the model may be used.
        precision: "fp32" or "bf16".

    Raises:
        ValueError: a percentage or form that there is not.
    """

    def __init__(
        self,
        percents: Sequence[float] = PERCENTS,
        forms: Sequence[str] = FORMS,
        headline: bool = False,
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "label",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        percent_counts(1, percents)
        self.percents = tuple(percents)
        self.forms = tuple(key_of("forms", form, dict.fromkeys(FORMS)) for form in forms)
        stems = {form: "pctin" if headline and form == "logit" else f"pctin_{form}" for form in self.forms}
        names = [f"{stems[form]}{percent:g}" for form in self.forms for percent in self.percents]
        super().__init__(
            names, fill, mean, std, bias, positives_only, correct_only, score_class, "softmax", seed, chunk_size, fold,
            precision, **kwargs,
        )  # fmt: skip

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Values of a batch by their names in files."""
        kept = self.included(batch)
        columns = batch.images.new_empty(0, len(self.names))
        if len(kept):
            columns = self._columns(batch, kept)
        return SampleScores(dict(zip(self.names, spread(columns, kept, batch).unbind(1))))

    def _columns(self, batch: ScoredBatch, kept: Tensor) -> Tensor:
        """(S, len(names)) values of the scored samples."""
        engine = batch.engine(**self.engine_options)
        classes, size = self.classes(batch, engine)[kept], (batch.images.shape[-2], batch.images.shape[-1])
        ranks = patch_ranks(batch.maps.to(batch.images.device)[kept], "stable")
        counts = percent_counts(ranks.shape[1], self.percents)
        masks = ranks_to_pixels(ranks, 1, size)
        logits = engine.masked(masks, counts, self.filling(batch), "first", kept).double()
        values = {"logit": self.of_class(logits, classes, "logit")}
        if self.forms != ("logit",):
            values["prob"] = probability = self.of_class(logits, classes, "softmax")
        if "ratio" in self.forms:
            whole = self.of_class(engine.original(kept)[:, None].double(), classes, "softmax")
            # Nothing can be compared with a probability of zero: the sample is left out.
            values["ratio"] = torch.where(whole > 0, probability / whole, torch.nan)
        return torch.cat([values[form] for form in self.forms], 1)
