"""The mean of an epoch's values, accumulated without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """sum of w v / sum of w over all updates and ranks.

    `torchmetrics.MeanMetric` looks for NaN in every update, for which the processor waits until the device has caught
    up. Here NaN makes the mean NaN.

    Example:
        >>> mean = WeightedMean()
        >>> mean.update(torch.tensor(1.0), weight=3)
        >>> mean.update(torch.tensor(5.0), weight=1)
        >>> mean.compute()
        tensor(2.)
    """

    full_state_update = False
    mean_value: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("mean_value", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add values (...) with one weight, or with weights (...)."""
        weights = torch.as_tensor(weight, dtype=self.weight.dtype, device=self.weight.device).expand_as(value)
        self.mean_value = self.mean_value + (value.to(self.mean_value) * weights).sum()
        self.weight = self.weight + weights.sum()

    def compute(self) -> Tensor:
        """The mean; NaN without any update."""
        return self.mean_value / self.weight
