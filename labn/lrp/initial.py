"""The relevance of the logits, from which a propagation starts."""

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
    """Relevance (T, K) of the logits: a start value at each target, 0 elsewhere.

    Args:
        logits: (T, K), or (1, K) for many targets of one image.
        targets: (T,) int64 class indices.
        init: start value of the target: its softmax `probability`, its `logit`, or `one`.

    Raises:
        InputError: an unknown `init`, or a target outside 0..K-1.

    Example:
        >>> from labn.lrp import initial_relevance
        >>> initial_relevance(torch.zeros(1, 4), torch.tensor([2]))
        tensor([[0.0000, 0.0000, 0.2500, 0.0000]])
    """
    if init not in INITIAL:
        raise InputError(f"init={init!r} is not one of {', '.join(map(repr, INITIAL))}.")
    _check(targets, logits.shape[1])
    values = INITIAL[init](logits).expand(len(targets), -1)
    columns = targets[:, None]
    return torch.zeros_like(values).scatter(1, columns, values.gather(1, columns))


def _check(targets: Tensor, classes: int) -> None:
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise InputError(f"targets must lie in 0..{classes - 1}, got {int(targets.min())}..{int(targets.max())}.")


def check_others(others: Others, names: Sequence[str] = ("all",)) -> None:
    """Check that `others` is one of the names, a positive number, or a list of classes.

    Raises:
        InputError: `others` is anything else.
    """
    valid = (
        others in names
        if isinstance(others, str)
        else (others > 0 if isinstance(others, int) else len(others) > 0 and all(isinstance(k, int) for k in others))
    )
    if not valid:
        listed = ", ".join(map(repr, names))
        raise InputError(f"others is {others!r}; it must be {listed}, a number of classes >= 1, or a list of classes.")


def rivals(logits: Tensor, targets: Tensor, others: Others, background: int | None = None) -> Tensor:
    """The classes that each target is contrasted with, (T, K) bool; never the target itself.

    Args:
        logits: (T, K), or (1, K) for many targets of one image.
        targets: (T,) int64.
        others: `all` (or `softmax`, which weighs them), a number of most probable classes, or a list of classes.
        background: a class that is never a rival.

    Raises:
        InputError: a class outside 0..K-1, or a target without any rival.
    """
    classes = logits.shape[1]
    _check(targets, classes)
    allowed = torch.ones(len(targets), classes, dtype=torch.bool, device=logits.device)
    allowed.scatter_(1, targets[:, None], False)
    # `all` leaves it at that; a number keeps the highest logits of the rest, a list its own classes.
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

    With the rivals `softmax`, all other classes get -p_k / (1 - p_t) of their probabilities p: the relevance is then
    proportional to the gradient of the target's log-probability at the logits.

    The z+ rule of the last layer divides the relevance of each class by that class's own normalised contributions.
    Because it is linear in the relevance of the classes, the result is CRP's contrast at the last feature layer,
    R_i = R_i[k*] - mean_k R_i[k] (the CLRP of Gu, Yang and Tresp, 2018, contrasts the same units). It sums to zero.

    Attributes:
        others: the rivals: `all` other classes, `softmax`, a number of most probable ones, or a list of classes.

    Example:
        >>> from labn.lrp import Contrast
        >>> Contrast(others=1)(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([[ 1., -0., -1.]])
    """

    others: Others = "all"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(T, K) for logits (T, K) and targets (T,)."""
        allowed = rivals(logits, targets, self.others)
        weights = allowed.to(logits.dtype)
        if self.others == "softmax":
            weights = logits.expand_as(allowed).masked_fill(~allowed, -torch.inf).softmax(1)
        # Every row sums to 1 - 1 = 0.
        return (-weights / weights.sum(1, keepdim=True)).scatter(1, targets[:, None], 1.0)
