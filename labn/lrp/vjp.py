"""Vector-Jacobian products of single operations, for as many relevance maps per image as wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(output: Tensor, leaves: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """d<s, output>/dleaf for each leaf; s (T, ...) has the batch of the output, or any T when that batch is 1.

    Several rows over one image are taken one after the other: recorded calls may have its batch size written in.
    """
    if len(s) == len(output):
        return list(torch.autograd.grad(output, leaves, s, retain_graph=True))
    rows = [torch.autograd.grad(output, leaves, row[None], retain_graph=True) for row in s]
    return [torch.cat(parts) for parts in zip(*rows)]
