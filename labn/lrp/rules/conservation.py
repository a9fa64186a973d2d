"""The conservation report: for every layer, the relevance that arrives, goes on, and is kept.

Every leak is computed by its own formula, not as a difference, so that the report can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


def per_sample(values: Tensor) -> Tensor:
    """Sum (B, ...) over everything but the batch, in float64."""
    # Float32 sums over a million pixels would leave an imbalance that looks like a leak.
    return values.flatten(1).sum(1, dtype=torch.float64)


@dataclass
class Entry:
    """The balance of one layer: arriving = delivered + eps + dead + bias + copied, each a (B,) float64 tensor.

    Attributes:
        name: label of the layer.
        arriving: sum of the relevance at the layer's output.
        delivered: sum of the relevance that the layer hands to its inputs.
        eps: sum_j R_j e_j / (z_j + e_j) over z_j != 0, the relevance that the stabiliser e keeps.
        dead: the same over z_j = 0, the relevance of outputs that no input contributed to.
        bias: sum_j R_j b_j / (z_j + e_j), the relevance that the biases keep.
        copied: minus the relevance that a residual sum hands out a second time (`residual="duplicate"`).

    Example:
        >>> from labn.lrp import Entry
        >>> one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> Entry("head", arriving=one, delivered=0.75 * one, eps=none, dead=none, bias=0.25 * one, copied=none).leaks
        tensor([0.2500], dtype=torch.float64)
    """

    name: str
    arriving: Tensor
    delivered: Tensor
    eps: Tensor
    dead: Tensor
    bias: Tensor
    copied: Tensor

    @property
    def leaks(self) -> Tensor:
        """(B,) eps + dead + bias + copied."""
        return self.eps + self.dead + self.bias + self.copied


def joined(chunks: tuple[Entry, ...]) -> Entry:
    """One entry from the entries of the same layer for consecutive chunks of images."""
    names = [field.name for field in fields(Entry)][1:]
    return Entry(chunks[0].name, *(torch.cat([getattr(entry, name) for entry in chunks]) for name in names))


@dataclass
class ConservationReport:
    """The entries of all layers in the order in which relevance passes them, output first.

    Example:
        >>> from labn.lrp import ConservationReport, backward, forward
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> report = ConservationReport()
        >>> _ = backward(forward(model, torch.ones(1, 1, 2, 2)), torch.eye(2)[:1], conservation=report)
        >>> [entry.name for entry in report.entries]
        ["'1' (Linear, linear)"]
    """

    entries: list[Entry] = field(default_factory=list)
    count: int | None = None  # relevance maps; None: the leading axis of every value counts them

    def _sums(self, values: Tensor) -> Tensor:
        """`per_sample`; a network may split the batch axis, as windowed attention does, or move it."""
        return per_sample(values if self.count is None else values.reshape(self.count, -1))

    def open(self, name: str, relevance: Tensor) -> None:
        """Begin the entry of a layer at whose output `relevance` (B, ...) arrived."""
        arriving = self._sums(relevance)
        self.entries.append(Entry(name, arriving, *(torch.zeros_like(arriving) for _ in range(5))))

    def close(self, delivered: list[Tensor]) -> None:
        """End the entry with the relevance that the layer handed to each of its inputs."""
        self.entries[-1].delivered = sum(map(self._sums, delivered), torch.zeros_like(self.entries[-1].arriving))

    def stabilised(self, z: Tensor, kept: Tensor) -> None:
        """Add `kept` = R e / (z + e) to `dead` where z is exactly zero, and to `eps` elsewhere."""
        # At z = 0 the stabiliser is all of z + e and keeps the whole relevance, whatever its size.
        entry, dead = self.entries[-1], z == 0
        entry.dead = entry.dead + self._sums(kept * dead)
        entry.eps = entry.eps + self._sums(kept * ~dead)

    def biased(self, kept: Tensor) -> None:
        """Add `kept` = R b / (z + e) to `bias`."""
        self.entries[-1].bias = self.entries[-1].bias + self._sums(kept)

    def duplicated(self, relevance: Tensor) -> None:
        """Subtract relevance that is handed out a second time from `copied`."""
        self.entries[-1].copied = self.entries[-1].copied - self._sums(relevance)
