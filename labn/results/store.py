"""Maps and scores on disk, saved batch by batch, so that a killed run can be resumed.

A results folder has one file (shard) per rank, batch and explainer in `maps/` and in `scores/`. Each is written under a
temporary name and renamed, so that a file under its final name is complete. Shards carry a key, the hash of the
arguments of their explainer and metrics, and are read only if the key matches the current arguments.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from labn.errors import InputError
from labn.inference.fingerprint import digest
from labn.io.atomic import LEFTOVERS, check_not_removed, remove_leftovers, unused_folder, write_atomically
from labn.io.readers import read_arrays, read_json
from labn.metrics.scores import SampleScores
from labn.results.shard_index import ShardIndex, shard_name

FORMAT = 2
"""Version of the folder's layout; increased when earlier folders can no longer be read."""

MAPS, SCORES = ".safetensors", ".npz"

MAX_SHARD_BYTES = 2**31
"""Maximum size of the arrays of one score shard in bytes; a larger file is treated as damaged."""

MAP_FOLDER, SCORE_FOLDER = "maps", "scores"

OLD_SCORE_FOLDER = "parts"
"""Name of `scores/` in folders of version 0.1, renamed when such a folder is opened."""
MANIFEST, IDENTITY = "maps/manifest.json", "identity.json"

SCORE_FILES = ("scores.csv", "scores.parquet")

TABLES = (*SCORE_FILES, "summary.csv", "paired.csv", "ranks.csv", "counts.csv", "predictions.csv", "curves.npz")

DERIVED = (*TABLES, "cards.json", "cards", "report.html", MANIFEST, "overlays")
"""Files and folders that every run derives anew from `maps/` and `scores/`, the only ones that are slow to compute."""


@dataclass
class ScoreShard:
    """Scores of one explainer on one batch.

    Attributes:
        explainer: name of the explainer.
        key: hash of the explainer's arguments.
        index: (n,) int64 positions in the split.
        label: (n,) int64 true classes.
        target: (n,) int64 explained classes.
        prediction: (n,) int64 predicted classes.
        probability: (n,) softmax probability of the label, in [0, 1].
        values: name of a value -> (n,) float64; NaN if the metric does not score the sample.
        keys: metric (which may give several values) -> hash of its arguments.
        curves: `<metric>/{x,insertion,deletion}` -> (m, K) for the m <= n samples in `<metric>/index` (m,).
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

    def add(self, metric: str, key: str, scores: SampleScores, indices: Tensor) -> None:
        """Add the scores of a metric.

        Args:
            metric: name of the metric.
            key: hash of the metric's arguments.
            scores: values and curves of the batch.
            indices: (n,) int64 positions of the batch's samples in the split.
        """
        self.values |= {name: column.double().cpu().numpy() for name, column in scores.values.items()}
        self.keys[metric] = key
        if scores.samples is not None:
            self.curves[f"{metric}/index"] = indices.cpu()[scores.samples.cpu()].numpy()
            self.curves |= {f"{metric}/{line}": curve.cpu().numpy() for line, curve in scores.curves.items()}


class ResultStore:
    """The results folder of one stage (`<run_dir>/test`, `<run_dir>/val/epoch=003`).

    Args:
        folder: the stage's folder, shared by all ranks.
        rank: rank of this process; it is part of file names, so that no two ranks write the same file.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self._maps: ShardIndex | None = None
        self._scores: ShardIndex | None = None
        self._is_prepared = False

    def prepare(self, identity: dict[str, str]) -> None:
        """Open the folder (rank zero only): results of another checkpoint or other data are moved aside.

        Args:
            identity: hashes of everything that all results depend on (`checkpoint`, `network`, `data`, `split`).
        """
        path = self.folder / IDENTITY
        current = {"format": FORMAT, **identity}
        for folder in (self.folder, self.folder / MAP_FOLDER, self.folder / SCORE_FOLDER):
            remove_leftovers(folder)
        if any(file.is_file() and not file.match(LEFTOVERS) for file in self.folder.rglob("*")):
            earlier = _identity(path)
            if earlier != current:
                archive = unused_folder(self.folder)
                self.folder.rename(archive)
                changed = [k for k in current if not earlier or earlier.get(k) != current[k]]
                warnings.warn(
                    f"{self.folder} holds results of another {' and '.join(changed)}; they are in {archive} now.",
                    stacklevel=2,
                )
        old, new = self.folder / OLD_SCORE_FOLDER, self.folder / SCORE_FOLDER
        if old.is_dir() and not new.exists():
            old.rename(new)
        write_atomically(path, json.dumps(current, indent=1).encode())
        self._is_prepared = True

    def check_not_removed(self) -> None:
        """Check that the folder is still the one that `prepare` has opened in this process.

        Raises:
            FileError: the folder has been removed, and with it shards that the tables would lack.
        """
        if self._is_prepared:
            check_not_removed(self.folder / IDENTITY)

    def remove_derived(self) -> None:
        """Remove the tables, pictures and reports of an earlier run (rank zero, before any rank writes).

        The current run may have other explainers, metrics and samples, and need not write all of these files again.
        """
        for path in (self.folder / name for name in DERIVED):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # Maps

    def add_maps(self, explainer: str, key: str, indices: Tensor, maps: Tensor) -> None:
        """Save the maps (n, H, W) of the samples `indices` (n,) as one shard."""
        self.check_not_removed()
        name = shard_name(explainer, key, indices.tolist(), f"r{self.rank}{MAPS}")
        data = save({"index": indices.cpu(), "maps": maps.cpu().contiguous()})
        write_atomically(self.folder / MAP_FOLDER / name, data)

    def maps(self, explainer: str, key: str, indices: Iterable[int]) -> dict[int, Tensor]:
        """Sample index -> saved map (H, W), for those of `indices` that were on disk at the first call or `refresh`."""
        wanted, maps = set(indices), dict[int, Tensor]()
        if self._maps is None:
            self._maps = ShardIndex(self.folder / MAP_FOLDER, MAPS)
        for path in self._maps.holding(explainer, key, wanted):
            # Any error: a damaged file can make safetensors and the system fail in many ways.
            try:
                maps |= read_maps(path, wanted)
            except Exception as error:
                warnings.warn(f"{path} is damaged ({error}); its maps are computed again.", stacklevel=2)
        return maps

    # Scores

    def add_scores(self, shard: ScoreShard) -> None:
        """Save the scores of one explainer on one batch."""
        self.check_not_removed()
        arrays: dict[str, Any] = {
            "explainer": np.array(shard.explainer),
            "key": np.array(shard.key),
            "index": shard.index,
            "label": shard.label,
            "target": shard.target,
            "prediction": shard.prediction,
            "probability": shard.probability,
        }
        arrays |= {f"value/{name}": value for name, value in shard.values.items()}
        arrays |= {f"key/{name}": np.array(value) for name, value in shard.keys.items()}
        arrays |= {f"curve/{name}": value for name, value in shard.curves.items()}
        # The hash of metrics and samples keeps shards apart that score the same samples with other metrics.
        rest = f"{digest(shard.keys, shard.index.tolist())}.r{self.rank}{SCORES}"
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        name = shard_name(shard.explainer, shard.key, shard.index.tolist(), rest)
        write_atomically(self.folder / SCORE_FOLDER / name, buffer.getbuffer())

    def score_shards(self) -> Iterator[ScoreShard]:
        """Every readable score shard in the folder, of all ranks and earlier runs, one at a time."""
        for path in ShardIndex(self.folder / SCORE_FOLDER, SCORES).all():
            shard = self._score_shard(path)
            if shard is not None:
                yield shard

    def _score_shard(self, path: Path) -> ScoreShard | None:
        try:
            return read_score_shard(path)
        except Exception as error:
            warnings.warn(f"{path} is damaged ({error}); its scores are computed again.", stacklevel=2)
            return None

    def scored(
        self, explainer: str, key: str, metric_keys: dict[str, str], indices: Iterable[int]
    ) -> dict[str, set[int]]:
        """Metric -> those of `indices` whose scores were on disk at the first call or `refresh`.

        Args:
            explainer: name of the explainer.
            key: hash of the explainer's arguments.
            metric_keys: metric -> hash of its arguments.
            indices: sample indices to look up.
        """
        wanted = set(indices)
        done: dict[str, set[int]] = {name: set() for name in metric_keys}
        if self._scores is None:
            self._scores = ShardIndex(self.folder / SCORE_FOLDER, SCORES)
        for path in self._scores.holding(explainer, key, wanted):
            shard = self._score_shard(path)
            for name, value in metric_keys.items():
                if shard is not None and (shard.explainer, shard.key, shard.keys.get(name)) == (explainer, key, value):
                    done[name] |= wanted.intersection(shard.index.tolist())
        return done

    def refresh(self) -> None:
        """Drop the cached listings, so that the next call sees files that other ranks have written."""
        self._maps = self._scores = None


def read_maps(path: Path, wanted: set[int]) -> dict[int, Tensor]:
    """Sample index -> map (H, W), for the wanted samples of a shard. Reading executes no code of the file.

    Raises:
        InputError: the shard does not hold an int64 `index` (n,) and floating-point `maps` (n, H, W).
    """
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != {"index", "maps"}:
            raise InputError(f"it holds {', '.join(file.keys())} instead of index and maps")
        index, stored = file.get_tensor("index"), file.get_slice("maps")
        shape = tuple(stored.get_shape())
        if index.ndim != 1 or index.dtype != torch.int64 or len(shape) != 3 or shape[0] != len(index):
            raise InputError(f"{tuple(index.shape)} indices and maps of shape {shape}")
        positions = {int(i): n for n, i in enumerate(index.tolist()) if i in wanted}
        maps = file.get_tensor("maps") if positions else None
        if maps is not None and not maps.is_floating_point():
            raise InputError(f"maps of type {maps.dtype}")
    return {} if maps is None else {i: maps[n] for i, n in positions.items()}


def _identity(path: Path) -> dict[str, Any] | None:
    """The saved identity of a folder; None if it is missing or damaged, in which case the results are moved aside."""
    try:
        return read_json(path, dict)
    except (OSError, ValueError):
        return None


def read_score_shard(path: Path) -> ScoreShard:
    """Read one score shard. Reading executes no code of the file.

    Raises:
        InputError: the file is damaged, or its arrays have inconsistent shapes or types.
    """
    arrays = read_arrays(path, MAX_SHARD_BYTES)
    _check_lengths(arrays)

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    return ScoreShard(
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


def _check_lengths(arrays: dict[str, np.ndarray]) -> None:
    """Raise unless columns are (n,) numbers and curves have as many rows as the index of their metric."""
    count, columns = len(arrays["index"]), ("index", "label", "target", "prediction", "probability")
    for name, value in arrays.items():
        kinds = "iu" if name in columns[:-1] or name.endswith("/index") else "iuf"
        if name in columns or name.startswith("value/"):
            right = value.shape == (count,)
        elif name.startswith("curve/"):
            right = value.ndim > 0 and len(value) == len(arrays.get(f"{name.rpartition('/')[0]}/index", value))
        else:
            continue
        if not right or value.dtype.kind not in kinds:
            raise InputError(f"{name} has shape {value.shape} and type {value.dtype}")
