"""Maps and scores on disk: written batch by batch, resumed after a crash, merged into the results folder.

A results folder holds, while a run goes on, one file per rank, batch and explainer in `maps/` and `scores/`; each is
written under a temporary name and renamed, so that a file with its final name is whole. Records carry a key, the hash
of what made them (explainer and metric arguments), and a reader takes only those whose key is the present one.
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
from labn.io.atomic import LEFTOVERS, remove_leftovers, unused_folder, write_atomically
from labn.io.readers import read_arrays, read_json
from labn.metrics.base import SampleScores
from labn.results.shard_index import ShardIndex, shard_name

FORMAT = 2
"""Raised when old result folders can no longer be read."""

MAPS, SCORES = ".safetensors", ".npz"

MAX_SHARD_BYTES = 2**31
"""Bytes that the arrays of one score shard may take."""

MAP_FOLDER, SCORE_FOLDER = "maps", "scores"

OLD_SCORE_FOLDER = "parts"
"""Name of `scores/` in folders of version 0.1; it is renamed when such a folder is opened."""
MANIFEST = "maps/manifest.json"

TABLES = ("scores.csv", "summary.csv", "paired.csv", "counts.csv", "predictions.csv", "curves.npz")

DERIVED = (*TABLES, "cards.json", "cards", "report.html", MANIFEST, "overlays")
"""What every run makes anew of `maps/` and `scores/`, which alone hold what takes long to compute."""


@dataclass
class ScoreShard:
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

    def add(self, metric: str, key: str, scores: SampleScores, indices: Tensor) -> None:
        """Take over the scores of a metric.

        Args:
            metric: its name.
            key: digest of its arguments.
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
        folder: the stage's folder; all ranks see the same one.
        rank: this process; file names hold it, so that ranks never write the same file.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self._maps: ShardIndex | None = None
        self._scores: ShardIndex | None = None

    def prepare(self, identity: dict[str, str]) -> None:
        """Make the folder ready (rank zero): results of another checkpoint or other data are moved aside.

        Args:
            identity: what the results depend on as a whole (`checkpoint`, `data`, `split`).
        """
        path = self.folder / "identity.json"
        mine = {"format": FORMAT, **identity}
        # Those in maps/ and scores/ are never read either, but looking for them would mean to list every shard.
        remove_leftovers(self.folder)
        if any(found.is_file() and not found.match(LEFTOVERS) for found in self.folder.rglob("*")):
            theirs = _identity(path)
            if theirs != mine:
                aside = unused_folder(self.folder)
                self.folder.rename(aside)
                changed = [k for k in mine if not theirs or theirs.get(k) != mine[k]]
                warnings.warn(
                    f"{self.folder} holds results of another {' and '.join(changed)}; they are in {aside} now.",
                    stacklevel=2,
                )
        old, new = self.folder / OLD_SCORE_FOLDER, self.folder / SCORE_FOLDER
        if old.is_dir() and not new.exists():
            old.rename(new)
        write_atomically(path, json.dumps(mine, indent=1).encode())

    def remove_derived(self) -> None:
        """Remove what an earlier run has made of its maps and scores (rank zero, before anyone writes).

        The present one makes it anew of other explainers, metrics and samples maybe, and need not make all of it.
        """
        for path in (self.folder / name for name in DERIVED):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # Maps

    def add_maps(self, explainer: str, key: str, indices: Tensor, maps: Tensor) -> None:
        """Save maps (n, H, W) of the samples `indices` (n,) as one shard."""
        name = shard_name(explainer, key, indices.tolist(), f"r{self.rank}{MAPS}")
        data = save({"index": indices.cpu(), "maps": maps.cpu().contiguous()})
        write_atomically(self.folder / MAP_FOLDER / name, data)

    def maps(self, explainer: str, key: str, indices: Iterable[int]) -> dict[int, Tensor]:
        """Saved maps (H, W) of those of `indices` that were on disk at the first call (or at `refresh`)."""
        wanted, found = set(indices), dict[int, Tensor]()
        if self._maps is None:
            self._maps = ShardIndex(self.folder / MAP_FOLDER, MAPS)
        for path in self._maps.holding(explainer, key, wanted):
            try:
                found |= read_maps(path, wanted)
            except Exception as error:
                warnings.warn(f"{path} is damaged ({error}); its maps are computed again.", stacklevel=2)
        return found

    # Scores

    def add_scores(self, shard: ScoreShard) -> None:
        """Save the scores of one explainer on one batch."""
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
        rest = f"{digest(shard.keys, shard.index.tolist())}.r{self.rank}{SCORES}"
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        name = shard_name(shard.explainer, shard.key, shard.index.tolist(), rest)
        write_atomically(self.folder / SCORE_FOLDER / name, buffer.getbuffer())

    def score_shards(self) -> Iterator[ScoreShard]:
        """Every whole score shard in the folder, of all ranks and earlier runs, one at a time."""
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
        """Metric -> those of `indices` that were scored on disk at the first call (or at `refresh`).

        Args:
            explainer: its name.
            key: digest of its arguments.
            metric_keys: metric -> digest of its arguments.
            indices: samples to ask for.
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
        """Forget what was listed, so that the next call sees what other ranks have written."""
        self._maps = self._scores = None


def read_maps(path: Path, wanted: set[int]) -> dict[int, Tensor]:
    """Sample index -> map (H, W), of those of a shard that are wanted; nothing in it is executed.

    Raises:
        ValueError: the shard holds no (n,) integer `index` with as many (n, H, W) floating-point `maps`.
    """
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != {"index", "maps"}:
            raise InputError(f"it holds {', '.join(file.keys())} instead of index and maps")
        index, stored = file.get_tensor("index"), file.get_slice("maps")
        shape = tuple(stored.get_shape())
        if index.ndim != 1 or index.dtype != torch.int64 or len(shape) != 3 or shape[0] != len(index):
            raise InputError(f"{tuple(index.shape)} indices and maps of shape {shape}")
        rows = {int(i): n for n, i in enumerate(index.tolist()) if i in wanted}
        maps = file.get_tensor("maps") if rows else None
        if maps is not None and not maps.is_floating_point():
            raise InputError(f"maps of type {maps.dtype}")
    return {} if maps is None else {i: maps[n] for i, n in rows.items()}


def _identity(path: Path) -> dict[str, Any] | None:
    """What made the results of a folder; None where that is not known, so that they are moved aside."""
    try:
        return read_json(path, dict)
    except (OSError, ValueError):
        return None


def read_score_shard(path: Path) -> ScoreShard:
    """Read one score shard; nothing in it is executed.

    Raises:
        ValueError: it is damaged, or its arrays do not belong together.
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
    """Stop unless columns are (n,) numbers, and curves have as many rows as their own index."""
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
