"""One sentence for errors of torch that name neither a setting nor a way on."""

from __future__ import annotations

import torch

from labn.perturb import is_out_of_memory

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What the collectives of gloo and NCCL say when another process of the run has ended."""


def explained(error: RuntimeError, rank: int) -> Exception | None:
    """An error with a sentence that helps, where the sentence of torch does not; else None.

    Args:
        error: what ended a command with a trainer.
        rank: this process.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    again = "the same command (fit: with --ckpt_path last) goes on from what is on disk"
    if is_out_of_memory(error):
        return torch.OutOfMemoryError(
            f"Rank {rank} is out of memory ({reason}): lower data.init_args.batch_size, and {again}."
        )
    if any(word in str(error) for word in GONE):
        return ConnectionError(f"Rank {rank} has lost another process, whose own message says why: {again}.")
    return None
