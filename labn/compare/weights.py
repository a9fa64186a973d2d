"""Whether results are of the weights that lie in the same run folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.inference.fingerprint import state_digest
from labn.models.backbones import AUXILIARY_HEADS
from labn.models.checkpoints import read_checkpoint

_NETWORK = "network."


def of_other_weights(run_dir: Path, checkpoint: str) -> bool:
    """Whether a run folder has checkpoints, and none of them holds the network with the hash `checkpoint`.

    Not where that cannot be said: the results do not say their weights, there is no checkpoint (only results were
    copied), or one cannot be read.
    """
    paths = sorted((run_dir / "checkpoints").glob("*.ckpt"))
    try:
        return bool(checkpoint and paths) and all(checkpoint not in network_digests(path) for path in paths)
    except (OSError, ValueError):
        return False


def network_digests(path: Path) -> Iterator[str]:
    """Hashes that the network in a checkpoint of `fit` may have in the results of its test, the likeliest first.

    A test may run in another precision, and it passes over auxiliary heads, which old checkpoints have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no checkpoint of a LightningModule.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of `cli.py fit`; it has no state_dict.")
    # A module without a `network` is explained itself.
    own = {name.removeprefix(_NETWORK): value for name, value in state.items() if name.startswith(_NETWORK)} or state
    bare = {name: value for name, value in own.items() if name.split(".")[0] not in AUXILIARY_HEADS}
    states = [own] if len(bare) == len(own) else [own, bare]
    yield from map(state_digest, states)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield from (state_digest({name: _converted(value, dtype) for name, value in one.items()}) for one in states)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
