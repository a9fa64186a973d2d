"""Open the run folders that a command line names, and find out which of them are seeds of the same training."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labn.compare.weights import of_other_weights
from labn.errors import MissingFileError
from labn.inference.fingerprint import digest
from labn.io.readers import read_yaml
from labn.results.reader import StageResults, read_stage

# Trainer settings that may differ between two seeds of one training: they say where it ran and what files it wrote.
_INCIDENTAL = ("callbacks", "default_root_dir", "logger", "accelerator", "devices", "strategy", "num_nodes", "plugins")


@dataclass(frozen=True)
class Run:
    """Results of one trained network.

    Attributes:
        label: name of its rows; runs of one label are seeds of the same training.
        folder: the run folder.
        results: content of the results folder.
        config: resolved configuration of its training (`fit.yaml`); empty if the file is missing or the run is `stale`.
        stale: whether no checkpoint in the run folder has the weights of the results, so that `fit.yaml` there
            describes another training.
    """

    label: str
    folder: Path
    results: StageResults
    config: dict[str, Any]
    stale: bool = False

    @property
    def name(self) -> str:
        """Name of the run folder, resolved, so that `.` has a name too."""
        return self.folder.resolve().name

    @property
    def stage(self) -> str:
        """Path of the results folder relative to the run folder: `test`, `val/epoch=002`."""
        return self.results.folder.relative_to(self.folder).as_posix()

    @property
    def checkpoint(self) -> str:
        """Hash of the network's weights."""
        return str(self.results.manifest.get("checkpoint", ""))

    @property
    def seed(self) -> Any:
        """Seed of the training; None if it is unknown."""
        return self.config.get("seed_everything")

    @property
    def training(self) -> str | None:
        """Hash of all settings of the training except its seeds; None if they are unknown."""
        if not self.config:
            return None
        trainer = {k: v for k, v in (self.config.get("trainer") or {}).items() if k not in _INCIDENTAL}
        data = self.config.get("data") or {}
        arguments = {k: v for k, v in (data.get("init_args") or {}).items() if k != "seed"}
        return digest(self.config.get("model"), data.get("class_path"), arguments, trainer)


def open_runs(words: Sequence[str], stage: str = "test") -> list[Run]:
    """Read the runs named by `words`, each `RUN` or `LABEL=RUN`.

    RUN is a run folder, whose results are read from `stage`, or a results folder. Runs without a label whose trainings
    differ only in the seed form one row. Every other run is a row of its own, named after its run folder, and after the
    stage as well if several results folders of one run are given; then only equal stages are seeds of one another.

    Results whose weights are in no checkpoint of their run folder cause a warning.

    Raises:
        MissingFileError: a folder has no scores.
    """
    labels_and_paths = [_split(word) for word in words]
    runs = [_open(path, stage) for _, path in labels_and_paths]
    stages = {(run.folder.resolve(), run.stage) for run in runs}
    # Run folders of which several results folders are given.
    repeated = {folder for folder, count in Counter(folder for folder, _ in stages).items() if count > 1}
    named_runs = zip(_distinct([run.folder for run in runs]), runs)
    names = [f"{name}/{run.stage}" if run.folder.resolve() in repeated else name for name, run in named_runs]
    rows: dict[str, list[Run]] = {}
    labelled: list[Run] = []
    for (label, _), run, name in zip(labels_and_paths, runs, names):
        if label is None:
            # Compared with every run of a row: a second training with a seed that the row already has is not a further
            # seed.
            label = next((n for n, row in rows.items() if all(_one_row(r, run, bool(repeated)) for r in row)), name)
            rows.setdefault(label, []).append(run)
        labelled.append(replace(run, label=label))
    return labelled


def _split(word: str) -> tuple[str | None, Path]:
    """Label (None if there is none) and path of an argument."""
    label, separator, path = word.partition("=")
    # `val/epoch=003` is a path, not a label.
    return (label, Path(path)) if separator and "/" not in label and not Path(word).exists() else (None, Path(word))


def _open(path: Path, stage: str) -> Run:
    folder = path if (path / "scores.csv").is_file() else path / stage
    if not (folder / "scores.csv").is_file():
        command = "validate" if stage.split("/")[0] == "val" else "test"
        raise MissingFileError(f"{path} holds no {stage}/scores.csv; run `{command}` with an EvaluationCallback first.")
    # Every command leaves its resolved configuration in the run folder, at most three levels above `val/epoch=003`.
    run_dir = next((p for p in [folder, *folder.parents][:4] if any(p.glob("*.yaml"))), folder.parent)
    config = run_dir / "fit.yaml"
    content = (read_yaml(config) if config.is_file() else None) or {}
    run = Run(run_dir.name, run_dir, read_stage(folder), content)
    return _without_training(run) if content and _stale(run) else run


def _stale(run: Run) -> bool:
    # A new fit archives the validations of an earlier one, so that they always belong to the fit of their folder; and
    # most of their weights are in no checkpoint.
    return run.results.manifest.get("split") != "val" and of_other_weights(run.folder, run.checkpoint)


def _without_training(run: Run) -> Run:
    warnings.warn(
        f"{run.results.folder} holds results of weights that no checkpoint in {run.folder / 'checkpoints'} has, such "
        "as those of an earlier training. They are not treated as results of fit.yaml, and form a row of their own "
        "unless LABEL=RUN says otherwise; run `test` again for results of this training.",
        stacklevel=2,
    )
    return replace(run, config={}, stale=True)


def _one_row(first: Run, second: Run, by_stage: bool) -> bool:
    """Whether two runs without labels form one row: seeds of one training, or the same folder given twice."""
    if first.results.folder.resolve() == second.results.folder.resolve():
        return True
    return _seeds(first, second) and not (by_stage and first.stage != second.stage)


def _seeds(first: Run, second: Run) -> bool:
    return first.training is not None and first.training == second.training and first.seed != second.seed


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with the smallest number of parents that makes different folders distinguishable."""
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(set(paths)) and depth < max(len(p.parts) for p in paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
