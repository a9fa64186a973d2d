"""With how much relevance the output starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

INITIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": lambda logits: logits.softmax(1),
    "logit": lambda logits: logits,
    "one": torch.ones_like,
}


def initial_relevance(logits: Tensor, targets: Tensor, init: str = "probability") -> Tensor:
    """(T, K) relevance: the softmax probability (or `logit`, or `one`) at each row's target, 0 elsewhere.

    Args:
        logits: (T, K), or (1, K) for many targets of one image.
        targets: (T,) int64 class indices.
        init: a key of INITIAL.

    Raises:
        ValueError: unknown `init`, or a target outside 0..K-1.
    """
    if init not in INITIAL:
        raise ValueError(f"init={init!r} is not one of {', '.join(map(repr, INITIAL))}.")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(
            f"targets must lie in 0..{logits.shape[1] - 1}, got {int(targets.min())}..{int(targets.max())}."
        )
    values = INITIAL[init](logits).expand(len(targets), -1)
    chosen = targets[:, None]
    return torch.zeros_like(values).scatter(1, chosen, values.gather(1, chosen))
