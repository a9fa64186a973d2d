"""Run folders as they are named on a command line, and which of them are seeds of one another."""

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

# What may differ between trainings that are the same but for their seed: where they ran and what they left.
_INCIDENTAL = ("callbacks", "default_root_dir", "logger", "accelerator", "devices", "strategy", "num_nodes", "plugins")


@dataclass(frozen=True)
class Run:
    """Results of one trained network.

    Attributes:
        label: name of its rows; runs of one label are seeds of one another.
        folder: the run folder.
        results: the stage's results.
        config: resolved configuration of its training (`fit.yaml`); empty where there is none, or `stale`.
        stale: no checkpoint in the folder has the results' weights, so that the training there is not theirs.
    """

    label: str
    folder: Path
    results: StageResults
    config: dict[str, Any]
    stale: bool = False

    @property
    def name(self) -> str:
        """Name of the run folder, also where it was given as `.`."""
        return self.folder.resolve().name

    @property
    def stage(self) -> str:
        """Where in the run folder the results lie: `test`, `val/epoch=002`."""
        return self.results.folder.relative_to(self.folder).as_posix()

    @property
    def checkpoint(self) -> str:
        """Hash of the network's state."""
        return str(self.results.manifest.get("checkpoint", ""))

    @property
    def seed(self) -> Any:
        """Seed of the training; None where it is not known."""
        return self.config.get("seed_everything")

    @property
    def training(self) -> str | None:
        """Hash of all settings of the training but its seeds; None where they are not known."""
        if not self.config:
            return None
        trainer = {k: v for k, v in (self.config.get("trainer") or {}).items() if k not in _INCIDENTAL}
        data = self.config.get("data") or {}
        arguments = {k: v for k, v in (data.get("init_args") or {}).items() if k != "seed"}
        return digest(self.config.get("model"), data.get("class_path"), arguments, trainer)


def open_runs(words: Sequence[str], stage: str = "test") -> list[Run]:
    """Read the runs that `words` name, each `RUN` or `LABEL=RUN`.

    RUN is a run folder, whose results lie in `stage`, or a results folder itself. Without labels, runs whose trainings
    differ in nothing but the seed form one row; everything else is a row of its own, named by its run folder, and by
    the stage too where one run has several results folders among them. Of these only equal stages are seeds.

    Results of weights that no checkpoint of their run folder has are warned about.

    Raises:
        FileNotFoundError: a folder holds no scores.
    """
    given = [_split(word) for word in words]
    runs = [_open(path, stage) for _, path in given]
    places = {(run.folder.resolve(), run.stage) for run in runs}
    repeated = {folder for folder, count in Counter(folder for folder, _ in places).items() if count > 1}
    found = zip(_distinct([run.folder for run in runs]), runs)
    names = [f"{name}/{run.stage}" if run.folder.resolve() in repeated else name for name, run in found]
    rows: dict[str, list[Run]] = {}
    labelled: list[Run] = []
    for (label, _), run, name in zip(given, runs, names):
        if label is None:
            label = next((n for n, row in rows.items() if all(_one_row(r, run, bool(repeated)) for r in row)), name)
            rows.setdefault(label, []).append(run)
        labelled.append(replace(run, label=label))
    return labelled


def _split(word: str) -> tuple[str | None, Path]:
    label, separator, path = word.partition("=")
    # `val/epoch=003` is a path, not a label.
    return (label, Path(path)) if separator and "/" not in label and not Path(word).exists() else (None, Path(word))


def _open(path: Path, stage: str) -> Run:
    folder = path if (path / "scores.csv").is_file() else path / stage
    if not (folder / "scores.csv").is_file():
        command = "validate" if stage.split("/")[0] == "val" else "test"
        raise MissingFileError(f"{path} holds no {stage}/scores.csv; run `{command}` with an EvaluationCallback first.")
    run_dir = next((p for p in [folder, *folder.parents][:4] if any(p.glob("*.yaml"))), folder.parent)
    config = run_dir / "fit.yaml"
    content = (read_yaml(config) if config.is_file() else None) or {}
    run = Run(run_dir.name, run_dir, read_stage(folder), content)
    return _without_training(run) if content and _stale(run) else run


def _stale(run: Run) -> bool:
    # Validations are moved aside together with the fit that they are of, and no checkpoint is kept of most of them.
    return run.results.manifest.get("split") != "val" and of_other_weights(run.folder, run.checkpoint)


def _without_training(run: Run) -> Run:
    warnings.warn(
        f"{run.results.folder} holds results of weights that no checkpoint in {run.folder / 'checkpoints'} has, such "
        "as those of an earlier training: fit.yaml is not taken for theirs, and only LABEL=RUN makes them a seed of "
        "another run; test again for results of this training.",
        stacklevel=2,
    )
    return replace(run, config={}, stale=True)


def _one_row(first: Run, second: Run, by_stage: bool) -> bool:
    """Whether two runs without labels form one row: they are seeds of one another, or the same folder given twice."""
    if first.results.folder.resolve() == second.results.folder.resolve():
        return True
    return _seeds(first, second) and not (by_stage and first.stage != second.stage)


def _seeds(first: Run, second: Run) -> bool:
    return first.training is not None and first.training == second.training and first.seed != second.seed


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell different folders apart."""
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(set(paths)) and depth < max(len(p.parts) for p in paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
