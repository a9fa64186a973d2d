"""Maps and scores on disk: written batch by batch, resumed after a crash, merged into the results folder.

A results folder holds, while a run goes on, one file per rank, batch and explainer in `maps/` and `parts/`; each is
written under a temporary name and renamed, so that a file with its final name is whole. Records carry a key, the hash
of what made them (explainer and metric arguments), and a reader takes only those whose key is the present one.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from labn.reading import read_arrays, read_json

FORMAT = 1
"""Raised when old result folders can no longer be read."""


def digest(*things: Any) -> str:
    """Twelve hexadecimal digits that depend on the JSON form of `things`."""
    text = json.dumps(things, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Hash of a model's state: names, shapes and values of every parameter and persistent buffer."""
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(flat.numpy().tobytes())
    return state.hexdigest()


def settings_digest(model: nn.Module) -> str:
    """Hash of what a model's state leaves out: every submodule's class and plain public attributes, such as theta."""
    plain = (str, int, float, bool, tuple, type(None))
    return digest(
        [
            (
                name,
                type(module).__qualname__,
                {k: v for k, v in vars(module).items() if _public(k) and type(v) in plain},
            )
            for name, module in model.named_modules()
        ]
    )


def _public(name: str) -> bool:
    return not name.startswith("_") and name != "training"


def file_name(name: str) -> str:
    """`name` of an explainer as the first, dot-free field of a file name."""
    return quote(name, safe="+-").replace(".", "%2E")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees either nothing or the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class ScorePart:
    """Scores of one explainer on one batch.

    Attributes:
        explainer: its name.
        key: digest of its arguments.
        index: (n,) positions in the split.
        label: (n,) ground truth.
        target: (n,) explained classes.
        prediction: (n,) classes that the model gives.
        probability: (n,) softmax probability of the label.
        values: name of a value -> (n,) float64, NaN where the metric leaves the sample out.
        keys: metric (which may give several values) -> digest of its arguments.
        curves: `<metric>/<quantity>` -> (n, K) arrays.
    """

    explainer: str
    key: str
    index: np.ndarray
    label: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)


class ResultStore:
    """The results folder of one stage (`<run_dir>/test`, `<run_dir>/val/epoch=003`).

    Args:
        folder: the stage's folder; all ranks see the same one.
        rank: this process; part of file names, so that ranks never write the same file.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self._parts: list[ScorePart] | None = None
        self._maps: dict[tuple[str, str], dict[int, tuple[Path, int]]] | None = None

    def prepare(self, identity: dict[str, str]) -> None:
        """Make the folder ready (rank zero): results of another checkpoint or other data are moved aside.

        Args:
            identity: what the results depend on as a whole (`checkpoint`, `data`, `split`).
        """
        path = self.folder / "identity.json"
        mine = {"format": FORMAT, **identity}
        if self.folder.exists() and any(self.folder.iterdir()):
            theirs = _identity(path)
            if theirs != mine:
                aside = next(a for n in range(1, 10_000) if not (a := Path(f"{self.folder}.old-{n}")).exists())
                self.folder.rename(aside)
                changed = [k for k in mine if not theirs or theirs.get(k) != mine[k]]
                warnings.warn(
                    f"{self.folder} holds results of another {' and '.join(changed)}; they are in {aside} now.",
                    stacklevel=2,
                )
        write_atomically(path, json.dumps(mine, indent=1).encode())

    # Maps

    def add_maps(self, explainer: str, key: str, indices: Tensor, maps: Tensor) -> None:
        """Save maps (n, H, W) of the samples `indices` (n,) as one shard."""
        folder = self.folder / "maps"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_name(explainer)}.{key}.{int(indices[0]):07d}.r{self.rank}.safetensors"
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({"index": indices.cpu(), "maps": maps.cpu().contiguous()}, temporary)
        os.replace(temporary, path)
        if self._maps is not None:
            self._maps.setdefault((explainer, key), {}).update(
                {int(i): (path, n) for n, i in enumerate(indices.tolist())}
            )

    def maps(self, explainer: str, key: str, indices: Iterable[int]) -> dict[int, Tensor]:
        """Saved maps (H, W) of those of `indices` that are on disk."""
        table = self._map_table().get((explainer, key), {})
        shards: dict[Path, list[tuple[int, int]]] = {}
        for index in indices:
            if index in table:
                path, row = table[index]
                shards.setdefault(path, []).append((index, row))
        found: dict[int, Tensor] = {}
        for path, rows in shards.items():
            with safe_open(path, framework="pt") as file:
                stored = file.get_tensor("maps")
            found.update({index: stored[row] for index, row in rows})
        return found

    def _map_table(self) -> dict[tuple[str, str], dict[int, tuple[Path, int]]]:
        if self._maps is None:
            self._maps = {}
            for path in sorted((self.folder / "maps").glob("*.safetensors")):
                explainer, key = map(unquote, path.name.split(".")[:2])
                try:
                    with safe_open(path, framework="pt") as file:
                        rows = file.get_tensor("index").tolist()
                except Exception as error:
                    warnings.warn(f"{path} is damaged ({error}); its maps are computed again.", stacklevel=2)
                    continue
                self._maps.setdefault((explainer, key), {}).update({i: (path, n) for n, i in enumerate(rows)})
        return self._maps

    # Scores

    def add_scores(self, part: ScorePart) -> None:
        """Save the scores of one explainer on one batch."""
        arrays: dict[str, Any] = {
            "explainer": np.array(part.explainer),
            "key": np.array(part.key),
            "index": part.index,
            "label": part.label,
            "target": part.target,
            "prediction": part.prediction,
            "probability": part.probability,
        }
        arrays |= {f"value/{name}": value for name, value in part.values.items()}
        arrays |= {f"key/{name}": np.array(value) for name, value in part.keys.items()}
        arrays |= {f"curve/{name}": value for name, value in part.curves.items()}
        folder = self.folder / "parts"
        folder.mkdir(parents=True, exist_ok=True)
        tag = digest(part.key, part.keys, part.index.tolist())
        path = folder / f"{file_name(part.explainer)}.{int(part.index[0]):07d}.{tag}.r{self.rank}.npz"
        temporary = path.with_name(f".{path.name}.tmp.npz")
        np.savez_compressed(temporary, **arrays)
        os.replace(temporary, path)
        if self._parts is not None:
            self._parts.append(part)

    def parts(self) -> list[ScorePart]:
        """Every whole score part in the folder, of all ranks and earlier runs."""
        if self._parts is None:
            self._parts = []
            for path in sorted((self.folder / "parts").glob("*.npz")):
                if path.name.startswith("."):
                    continue
                try:
                    self._parts.append(read_part(path))
                except Exception as error:
                    warnings.warn(f"{path} is damaged ({error}); its scores are computed again.", stacklevel=2)
        return self._parts

    def refresh(self) -> None:
        """Forget what was read, so that the next call sees what other ranks have written."""
        self._parts = None
        self._maps = None

    def scored(self, explainer: str, key: str, metric_keys: dict[str, str]) -> set[int]:
        """Samples for which every metric of `metric_keys` (name -> digest) is on disk for this explainer."""
        per_metric = {
            name: {
                int(i)
                for part in self.parts()
                if (part.explainer, part.key, part.keys.get(name)) == (explainer, key, value)
                for i in part.index
            }
            for name, value in metric_keys.items()
        }
        return set.intersection(*per_metric.values()) if per_metric else set()


def _identity(path: Path) -> dict[str, Any] | None:
    """What made the results of a folder; None where that is not known, so that they are moved aside."""
    try:
        return read_json(path, dict)
    except (OSError, ValueError):
        return None


def read_part(path: Path) -> ScorePart:
    """Read one score part; nothing in it is executed."""
    arrays = read_arrays(path)

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    return ScorePart(
        explainer=str(arrays["explainer"]),
        key=str(arrays["key"]),
        index=arrays["index"],
        label=arrays["label"],
        target=arrays["target"],
        prediction=arrays["prediction"],
        probability=arrays["probability"],
        values=group("value/"),
        keys={name: str(value) for name, value in group("key/").items()},
        curves=group("curve/"),
    )
