"""Check whether results were computed with the weights of a checkpoint in the same run folder."""

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
    """Whether a run folder has checkpoints, none of which holds the network with the hash `checkpoint`.

    The answer is False if it is unknown: the hash is empty, the folder has no checkpoint (only results were copied), or
    a checkpoint is not readable.
    """
    paths = sorted((run_dir / "checkpoints").glob("*.ckpt"))
    try:
        return bool(checkpoint and paths) and all(checkpoint not in network_digests(path) for path in paths)
    except (OSError, ValueError):
        return False


def network_digests(path: Path) -> Iterator[str]:
    """The hashes that the network of a `fit` checkpoint can have in results of `test`, the most probable first.

    A test may run in another precision, and it drops auxiliary heads, which checkpoints of earlier versions contain.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file is damaged or not a checkpoint of a LightningModule.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of `cli.py fit`; it has no state_dict.")
    # A LightningModule without an attribute `network` is itself the explained network (`network_of`).
    own = {name.removeprefix(_NETWORK): value for name, value in state.items() if name.startswith(_NETWORK)} or state
    bare = {name: value for name, value in own.items() if name.split(".")[0] not in AUXILIARY_HEADS}
    states = [own] if len(bare) == len(own) else [own, bare]
    # A generator: a conversion and a hash of all weights take a second, and the first hash usually matches.
    yield from map(state_digest, states)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield from (state_digest({name: _converted(value, dtype) for name, value in one.items()}) for one in states)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
