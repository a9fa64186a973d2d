"""Whether results are of the weights that lie in the same run folder."""

from __future__ import annotations

from pathlib import Path

from labn.models.backbones import WITHOUT_AUXILIARY
from labn.models.checkpoints import read_checkpoint
from labn.store import state_digest

_NETWORK = "network."


def of_other_weights(run_dir: Path, checkpoint: str) -> bool:
    """Whether a run folder has checkpoints, and none of them holds the network with the hash `checkpoint`.

    Not where that cannot be said: the results do not say their weights, there is no checkpoint (only results were
    copied), or one cannot be read.
    """
    paths = sorted((run_dir / "checkpoints").glob("*.ckpt"))
    try:
        return bool(checkpoint and paths) and all(network_digest(path) != checkpoint for path in paths)
    except (OSError, ValueError):
        return False


def network_digest(path: Path) -> str:
    """Hash of the network in a checkpoint of `fit`, as the results of its test name it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no checkpoint of a LightningModule.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of `cli.py fit`; it has no state_dict.")
    # A module without a `network` is explained itself.
    own = {name.removeprefix(_NETWORK): value for name, value in state.items() if name.startswith(_NETWORK)} or state
    # Auxiliary heads, which old checkpoints have, are passed over when a network is loaded.
    return state_digest({name: value for name, value in own.items() if name.split(".")[0] not in WITHOUT_AUXILIARY})
