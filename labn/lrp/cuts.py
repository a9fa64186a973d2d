"""Which channels a recorded call cuts out of a value."""

from __future__ import annotations

import torch

from labn.lrp.record import Call

CUTS = {"split", "split_with_sizes", "chunk", "tensor_split", "narrow", "getitem"}


def cut_of(call: Call, source: int, shape: torch.Size, axis: int) -> slice | None:
    """The run of channels that `call` cuts out of the value `source` of this shape; None if it does anything else.

    Found by letting it cut the channels' own numbers.

    Args:
        call: reads `source` and nothing else.
        source: index of the value.
        shape: of the value.
        axis: which axis has the channels.
    """
    if call.operation not in CUTS or (call.operation == "getitem" and not _is_plain(call.args[1])):
        return None
    numbers = torch.arange(shape[axis]).view(-1, *[1] * (len(shape) - 2 if axis == 1 else 0)).expand(shape)
    kept = call.evaluate({source: numbers})
    whole = kept.ndim == len(shape) and kept.numel() * shape[axis] == numbers.numel() * kept.shape[axis]
    if not whole or not kept.numel():
        return None
    channels = kept.movedim(axis, 0).flatten(1)[:, 0]
    first, last = int(channels[0]), int(channels[-1])
    return slice(first, last + 1) if len(channels) == last + 1 - first else None


def _is_plain(index: object) -> bool:
    """Whether an index is made of slices and numbers only."""
    return all(isinstance(part, (slice, int, type(...))) for part in (index if isinstance(index, tuple) else (index,)))
