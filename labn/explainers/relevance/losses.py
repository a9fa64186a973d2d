"""Warnings about relevance that does not arrive at the pixels; each network causes one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from labn.lrp.rules.conservation import Entry

LEAST, MOST = 0.95, 1.05
"""Arrived shares of the initial relevance between which there is no warning."""


GROWN = 1000.0
"""Absolute share of the initial relevance from which it has not been lost but has grown."""


def is_loss(share: float) -> bool:
    """Whether the share of the initial relevance that arrives at the pixels calls for a warning."""
    return math.isfinite(share) and not LEAST <= share <= MOST


def has_grown(share: float) -> bool:
    """Whether the relevance that arrives is many times the initial one, or not finite."""
    return not abs(share) <= GROWN


def growth_sentence(model: nn.Module, share: float, rule: str) -> str:
    """The warning about relevance that has grown on its way.

    Args:
        model: the network.
        share: the share of the initial relevance that arrives.
        rule: what divided it, such as `rule='gamma'`.
    """
    amount = f"{share:.1e} times the initial relevance" if math.isfinite(share) else "Relevance that is not finite"
    return (
        f"{amount} arrives at the pixels of {type(model).__name__}, so that the map means nothing: {rule} divides by "
        "sums in which contributions of both signs cancel. Take rule='zplus', whose shares are never negative, or a "
        "larger eps."
    )


def loss_sentence(model: nn.Module, share: str, entries: Sequence[Entry], helps: str) -> str:
    """The warning: how much relevance arrives, which layers keep most, and what helps.

    Args:
        model: the network.
        share: how much arrives, such as `59% of the relevance`.
        entries: the conservation report.
        helps: the option that would help, as a clause.
    """
    total = float(entries[0].arriving.abs().sum()) or 1.0
    layers = ", ".join(f"{entry.name} {_kept(entry) / total:.0%}" for entry in largest(entries))
    return f"{share} arrives at the pixels of {type(model).__name__}; most is kept by {layers}. {helps}."


def largest(entries: Sequence[Entry]) -> list[Entry]:
    """The three layers that keep most, the first one first."""
    return sorted(entries, key=lambda entry: -_kept(entry))[:3]


def keeps_by(entries: Sequence[Entry]) -> str:
    """The largest loss of the layer that keeps most: `dead` units, `bias`, `eps`, or `pad`, the filled border.

    Args:
        entries: the conservation report.
    """
    first = largest(entries)[0]
    if first.name.endswith(", pad)"):
        return "pad"
    return max(("dead", "bias", "eps"), key=lambda kind: float(getattr(first, kind).abs().sum()))


def _kept(entry: Entry) -> float:
    return float(entry.leaks.abs().sum())
