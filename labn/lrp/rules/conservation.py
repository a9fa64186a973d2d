"""Where relevance goes that does not arrive: each leak by its own formula, so that the account can be checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


def per_sample(values: Tensor) -> Tensor:
    """Sum (B, ...) over everything but the batch, in float64."""
    return values.flatten(1).sum(1, dtype=torch.float64)


@dataclass
class Entry:
    """The account of one layer, every field a (B,) float64 tensor; arriving = delivered + eps + dead + bias + copied.

    Attributes:
        name: label of the layer.
        arriving: sum of the relevance at the layer's output.
        delivered: sum of the relevance it hands to its inputs.
        eps: sum_j R_j e_j / (z_j + e_j) over z_j != 0, what the stabiliser e keeps.
        dead: the same over z_j = 0: relevance of outputs that no input contributed to.
        bias: sum_j R_j b_j / (z_j + e_j), what the biases keep.
        copied: minus the relevance that a junction hands out more than once (rule `duplicate`).
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


def joined(rows: tuple[Entry, ...]) -> Entry:
    """One entry out of those of the same layer for consecutive images."""
    names = [field.name for field in fields(Entry)][1:]
    return Entry(rows[0].name, *(torch.cat([getattr(row, name) for row in rows]) for name in names))


@dataclass
class ConservationReport:
    """Entries in the order in which relevance passed the layers, output first."""

    entries: list[Entry] = field(default_factory=list)

    def open(self, name: str, relevance: Tensor) -> None:
        """Begin the account of a layer at whose output `relevance` (B, ...) arrived."""
        arriving = per_sample(relevance)
        self.entries.append(Entry(name, arriving, *(torch.zeros_like(arriving) for _ in range(5))))

    def close(self, parts: list[Tensor]) -> None:
        """End it with the relevance handed to its inputs."""
        self.entries[-1].delivered = torch.stack([per_sample(part) for part in parts]).sum(0)

    def stabilised(self, z: Tensor, kept: Tensor) -> None:
        """Book `kept` = R e / (z + e), under `dead` where z is exactly zero and under `eps` elsewhere."""
        entry, unused = self.entries[-1], z == 0
        entry.dead = entry.dead + per_sample(kept * unused)
        entry.eps = entry.eps + per_sample(kept * ~unused)

    def biased(self, kept: Tensor) -> None:
        """Book `kept` = R b / (z + e) as held by biases."""
        self.entries[-1].bias = self.entries[-1].bias + per_sample(kept)

    def duplicated(self, relevance: Tensor) -> None:
        """Book relevance that was handed out a second time."""
        self.entries[-1].copied = self.entries[-1].copied - per_sample(relevance)
