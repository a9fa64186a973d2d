"""Percentage-in metric: the score of a class when only the top pixels of the map are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, checked_option, scatter_to_batch
from labn.metrics.functional.confidence import percent_counts
from labn.metrics.scores import SampleScores
from labn.perturbation.fills import Channels
from labn.perturbation.patches import patch_ranks, ranks_to_pixels

PERCENTS = (5, 10, 20, 25, 50)
FORMS = ("prob", "logit", "ratio")


class PercentageIn(FilledMetric):
    """Percentage-in (An and Joe 2022): score of the class when only the top q % of the pixels are shown.

    The paper prints figures without a definition; three readings stand side by side. `prob` is the softmax probability
    O in [0, 1]; `logit` is the activation score, which fits the printed figures best; `ratio` is O / Y with Y the
    probability on the whole image. All are points of the pixel-wise insertion curve on the same fill: K forwards per
    sample for K percentages, and one forward of the unperturbed image for `ratio`. Ties are taken in raster order, so
    that exactly q % of the pixels are shown.

    Values are named `pctin_prob5`, `pctin_logit10`, ...

    Args:
        percents: q, each above 0 and at most 100.
        forms: readings to compute, of "prob", "logit" and "ratio".
        headline: whether the logits are named `pctin<q>` in place of `pctin_logit<q>`.
        fill: colour of the hidden pixels, a name in `labn.perturbation.fills.FILLS`; black in the paper.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: True leaves out samples with label 0, without a forward; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "label" (as for insertion curves), "target" or "predicted".
        seed: seed of the "uniform" fill.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: a percentage outside (0, 100] or an unknown form.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.ones(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> metric = PercentageIn(percents=[25, 50], forms=["logit"])
        >>> metric.score(model, images, maps, target, index)
        {'pctin_logit25': tensor([1.], dtype=torch.float64), 'pctin_logit50': tensor([2.], dtype=torch.float64)}
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
        percent_counts(1, percents)  # raises for percentages outside (0, 100]
        self.percents = tuple(percents)
        self.forms = tuple(checked_option("forms", form, dict.fromkeys(FORMS)) for form in forms)
        stems = {form: "pctin" if headline and form == "logit" else f"pctin_{form}" for form in self.forms}
        names = [f"{stems[form]}{percent:g}" for form in self.forms for percent in self.percents]
        super().__init__(
            names, fill, mean, std, bias, positives_only, correct_only, score_class, "softmax", seed, chunk_size, fold,
            precision, **kwargs,
        )  # fmt: skip

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch: name in files -> (B,) values."""
        scored = self.included(batch)
        columns = batch.images.new_empty(0, len(self.names))
        if len(scored):
            columns = self._columns(batch, scored)
        return SampleScores(dict(zip(self.names, scatter_to_batch(columns, scored, batch).unbind(1))))

    def _columns(self, batch: ScoredBatch, scored: Tensor) -> Tensor:
        """Values (S, len(names)) of the scored samples."""
        engine = batch.engine(**self.engine_options)
        classes, size = self.classes(batch, engine)[scored], (batch.images.shape[-2], batch.images.shape[-1])
        # "stable" breaks ties in raster order: shared ranks would show more than q % of a flat map.
        ranks = patch_ranks(batch.maps.to(batch.images.device)[scored], "stable")
        counts = percent_counts(ranks.shape[1], self.percents)
        masks = ranks_to_pixels(ranks, 1, size)
        # The pixels of a smaller percentage are among those of a larger one, so one nested set of ranks serves all.
        logits = engine.masked(masks, counts, self.filling(batch), "first", scored).double()
        values = {"logit": self.of_class(logits, classes, "logit")}
        if self.forms != ("logit",):
            values["prob"] = probability = self.of_class(logits, classes, "softmax")
        if "ratio" in self.forms:
            whole = self.of_class(engine.original(scored)[:, None].double(), classes, "softmax")
            # The ratio to a probability that underflowed to 0 is undefined: the sample is left out.
            values["ratio"] = torch.where(whole > 0, probability / whole, torch.nan)
        return torch.cat([values[form] for form in self.forms], 1)
