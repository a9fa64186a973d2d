"""With how much relevance the output starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError

Initial = Callable[[Tensor, Tensor], Tensor]
Others = str | int | Sequence[int]

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
        raise InputError(f"init={init!r} is not one of {', '.join(map(repr, INITIAL))}.")
    _check(targets, logits.shape[1])
    values = INITIAL[init](logits).expand(len(targets), -1)
    chosen = targets[:, None]
    return torch.zeros_like(values).scatter(1, chosen, values.gather(1, chosen))


def _check(targets: Tensor, classes: int) -> None:
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise InputError(f"targets must lie in 0..{classes - 1}, got {int(targets.min())}..{int(targets.max())}.")


def check_others(others: Others) -> None:
    """Raise ValueError unless `others` is `all`, a positive number, or classes."""
    valid = (
        others == "all"
        if isinstance(others, str)
        else (others > 0 if isinstance(others, int) else len(others) > 0 and all(isinstance(k, int) for k in others))
    )
    if not valid:
        raise InputError(f"others is {others!r}; it must be 'all', a number of classes >= 1, or a list of classes.")


def rivals(logits: Tensor, targets: Tensor, others: Others, background: int | None = None) -> Tensor:
    """Which classes each target is contrasted with, (T, K) bool; never the target itself.

    Args:
        logits: (T, K), or (1, K) for many targets of one image.
        targets: (T,) int64.
        others: `all`, the n most probable ones, or a list of classes.
        background: a class that never is a rival.

    Raises:
        ValueError: a class outside 0..K-1, or no rival left.
    """
    classes = logits.shape[1]
    _check(targets, classes)
    allowed = torch.ones(len(targets), classes, dtype=torch.bool, device=logits.device)
    allowed.scatter_(1, targets[:, None], False)
    if background is not None:
        allowed[:, background] = False
    if isinstance(others, int):
        count = min(others, classes)
        order = logits.expand(len(targets), -1).masked_fill(~allowed, -torch.inf).topk(count, dim=1).indices
        allowed &= torch.zeros_like(allowed).scatter_(1, order, True)
    elif not isinstance(others, str):
        listed = torch.tensor(list(others), device=logits.device)
        _check(listed, classes)
        allowed &= torch.zeros_like(allowed).index_fill_(1, listed, True)
    if not bool(allowed.any(1).all()):
        raise InputError(f"others={others!r} leaves a class without any other class to be contrasted with.")
    return allowed


@dataclass(frozen=True)
class Contrast:
    """Initial relevance 1 for the target and -1/n for each of its n rivals, 0 elsewhere.

    Followed by the z+ rule, which shares the relevance of each class out by that class's own normalised contributions,
    this is CRP's contrast at the last feature layer, R_i = R_i[k*] - mean_k R_i[k] (Gu's and Tresp's CLRP contrasts
    the same units, 2018): both are linear in the relevance of the classes. It sums to zero.
    """

    others: Others = "all"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(T, K) for logits (T, K) and targets (T,)."""
        others = rivals(logits, targets, self.others).to(logits.dtype)
        return (-others / others.sum(1, keepdim=True)).scatter(1, targets[:, None], 1.0)
