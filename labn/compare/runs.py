"""Run folders as they are named on a command line, and which of them are seeds of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labn.reading import read_yaml
from labn.report.results import StageResults, read_stage
from labn.store import digest

# What may differ between trainings that are the same but for their seed: where they ran and what they left.
_INCIDENTAL = ("callbacks", "default_root_dir", "logger", "accelerator", "devices", "strategy", "num_nodes", "plugins")


@dataclass(frozen=True)
class Run:
    """Results of one trained network.

    Attributes:
        label: name of its rows; runs of one label are seeds of one another.
        folder: the run folder.
        results: the stage's results.
        config: resolved configuration of its training (`fit.yaml`); empty where there is none.
    """

    label: str
    folder: Path
    results: StageResults
    config: dict[str, Any]

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
    differ in nothing but the seed form one row; every other run is a row of its own, named by its folder.

    Raises:
        FileNotFoundError: a folder holds no scores.
    """
    given = [_split(word) for word in words]
    runs = [_open(path, stage) for _, path in given]
    names = _distinct([run.folder for run in runs])
    labelled: list[Run] = []
    for (label, _), run, name in zip(given, runs, names):
        twin = next((r for r in labelled if label is None and _seeds(r, run) and r.label in names), None)
        labelled.append(replace(run, label=label or (twin.label if twin else name)))
    return labelled


def _split(word: str) -> tuple[str | None, Path]:
    label, separator, path = word.partition("=")
    # `val/epoch=003` is a path, not a label.
    return (label, Path(path)) if separator and "/" not in label and not Path(word).exists() else (None, Path(word))


def _open(path: Path, stage: str) -> Run:
    folder = path if (path / "scores.csv").is_file() else path / stage
    if not (folder / "scores.csv").is_file():
        raise FileNotFoundError(
            f"{path} holds no {stage}/scores.csv; run `{stage.split('/')[0]}` with an EvaluationCallback first."
        )
    run_dir = next((p for p in [folder, *folder.parents][:4] if any(p.glob("*.yaml"))), folder.parent)
    config = run_dir / "fit.yaml"
    content = read_yaml(config) if config.is_file() else None
    return Run(run_dir.name, run_dir, read_stage(folder), content or {})


def _seeds(first: Run, second: Run) -> bool:
    return first.training is not None and first.training == second.training and first.seed != second.seed


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell different folders apart."""
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(set(paths)) and depth < max(len(p.parts) for p in paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
