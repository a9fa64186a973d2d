"""Score the maps of every explainer with every metric, and write the tables."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from callbacks.checks import check_scorable
from callbacks.explanation.base import ExplainingCallback
from callbacks.explanation.session import Batch, Session
from labn.errors import InputError
from labn.explainers import Explainer, explainer_by_name
from labn.inference.chunk_size import check_chunk_size
from labn.inference.fingerprint import digest
from labn.metrics.base import SampleMetric
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.registry import check_settings, metric_by_name, values_named
from labn.perturbation.engine import check_precision
from labn.results.fingerprints import describe, source_digest
from labn.results.store import ScoreShard
from labn.results.tables import Plan, summary_table, write_results

BASELINES = ("random", "constant")

ENGINE = ("chunk_size", "fold", "precision")
"""Arguments of the perturbation engine, which all metrics share."""


class EvaluationCallback(ExplainingCallback):
    """PID and every other metric on the maps of the trainer's explainers.

    Scores go to `<run_dir>/<stage>/` batch by batch; rank zero merges them into `scores.csv`, `summary.csv`,
    `paired.csv`, `curves.npz` and, where a metric counts samples, `counts.csv` at the end, prints the means with their
    intervals and logs them as `<stage>/<explainer>/<metric>`.

    Args:
        metrics: names of metrics, such as `id`, `pid16`, `mass`.
        val_metrics: metrics scored at validation end while fitting; None takes all.
        also: for every insertion-deletion metric its variants too: `stable`, `random`, `threshold`, `official`.
        metric_options: settings for all metrics that know them, such as `step` or `score_class`.
        fill: what removed pixels show: black, mean, bias, blur, uniform or image_mean.
        positives_only: score only samples of the data's positive classes in the metrics that perturb images (the
            papers' choice for IDRiD); a list of class numbers scores those instead.
        chunk_size: perturbed inputs per forward; None finds it.
        fold: use the copy of the network with BatchNorm folded where it is exact.
        precision: of the perturbed forwards, `fp32` or `bf16`; predictions are always made in full precision.
        baselines: add the maps that know nothing, `random` and `constant`, to every table: they expose a biased
            protocol at once.
        kwargs: arguments of `ExplainingCallback`.

    Raises:
        ValueError: an unknown metric or precision, a chunk below 1, classes that are none, or an argument of this
            callback, or what the data says, among `metric_options`.
    """

    def __init__(
        self,
        metrics: list[str],
        val_metrics: list[str] | None = None,
        also: list[str] | None = None,
        metric_options: dict[str, Any] | None = None,
        fill: str = "black",
        positives_only: bool | list[int] = False,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        baselines: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_precision(precision)
        check_chunk_size(chunk_size)
        check_classes(positives_only)
        check_metric_options(metric_options or {})
        self.baselines = baselines
        self.test_names = self.names = with_variants(metrics, also or [])
        self.val_names = self.test_names if val_metrics is None else val_metrics
        self.settings = {"fill": fill, "positives_only": positives_only, **(metric_options or {})}
        self.chunk_size, self.fold, self.precision = chunk_size, fold, precision
        self.metrics: dict[str, SampleMetric] = {}
        self._scored: set[int] = set()
        names = list(dict.fromkeys([*self.test_names, *self.val_names]))
        for name in names:
            metric_by_name(name, mean=None, std=None, bias=None, **self.settings)
        check_settings(names, metric_options or {})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse settings under which explanations would fail, and metrics and classes that the data does not have."""
        super().setup(trainer, pl_module, stage)
        if self._ever_active(trainer):
            data = trainer.datamodule  # type: ignore[attr-defined]
            positive_classes(data, self.settings["positives_only"])
            built = {n: metric_by_name(n, mean=None, std=None, bias=None, **self.settings) for n in self._due(trainer)}
            check_scorable(built, data, "test" if trainer.state.fn == "test" else "val")

    def _due(self, trainer: pl.Trainer) -> list[str]:
        """Names of the metrics of the running command."""
        return self.val_names if trainer.state.fn == "fit" else self.test_names

    @property
    def engine_options(self) -> dict[str, Any]:
        """How perturbed inputs are run."""
        return {name: getattr(self, name) for name in ENGINE}

    @property
    def extra_explainers(self) -> dict[str, Explainer]:
        """The rows that every comparison table has."""
        return {name: explainer_by_name(name) for name in BASELINES} if self.baselines else {}

    def begin(self, trainer: pl.Trainer, session: Session) -> None:
        """Build the metrics for this data and see what earlier runs have left."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.names = self._due(trainer)
        bias = data.bias_image() if self.settings["fill"] == "bias" else None
        self._positives = positive_classes(data, self.settings["positives_only"])
        positives = False if self._positives is None else self._positives
        shared = {"mean": data.mean, "std": data.std, "bias": bias, **self.settings, "positives_only": positives}
        self.metrics = {name: metric_by_name(name, **shared) for name in self.names}
        self._bias = describe(bias)
        common = {**shared, "bias": self._bias, **self.engine_options, "chunk_size": None}
        self._sources = {n: s for n, m in self.metrics.items() if (s := source_digest(type(m))) is not None}
        # Nothing but name and settings for most of the project's own metrics, whose scores on disk would else be lost.
        extra = {name: [self._sources.get(name), metric.revision] for name, metric in self.metrics.items()}
        self.keys = {n: digest(n, describe(common), *(x for x in extra[n] if x)) for n in self.names}
        self.from_disk, self._scored = 0, set()
        share = -(-len(session.subset or ()) // trainer.world_size)
        session.expect(share * len(session.explainers))

    def work(self, trainer: pl.Trainer, session: Session, batch: Batch) -> None:
        """Score the batch, explainer by explainer, with the metrics whose values are not on disk yet."""
        numbers, parts = set(batch.indices.tolist()), []
        self._scored |= numbers
        for explainer in session.explainers:
            done = session.store.scored(explainer, session.keys[explainer], self.keys, numbers)
            missing = [name for name in self.names if not numbers <= done[name]]
            if missing:
                parts.append(self._score(session, batch, explainer, missing))
            elif self.names:
                self.from_disk += len(numbers)
            session.progress.advance(len(numbers), computed=bool(missing))
        if not self.names:  # what the network predicts is written all the same
            parts.append(self._facts(session, batch, next(iter(session.explainers))))
        # An explainer takes forwards over from those before it, and what runs beside an input moves its last digits.
        # So the last one is written first: whatever a kill leaves out is scored again in the same company.
        for part in reversed(parts):
            session.store.add_scores(part)

    def _score(self, session: Session, batch: Batch, explainer: str, names: list[str]) -> ScoreShard:
        arguments = (session.network, batch.images, session.maps(batch, explainer), batch.targets, batch.indices)
        more: dict[str, Any] = {
            "labels": batch.labels,
            "masks": batch.masks,
            "boxes": batch.boxes,
            "explainer": session.explainers[explainer],
            "cache": batch.engine,
            "predictions": batch.predictions,
        }
        part = self._facts(session, batch, explainer)
        for name in names:
            metric = self.metrics[name]
            scores = metric.score(*arguments, **more)
            part.values |= {value: column.double().cpu().numpy() for value, column in scores.items()}
            part.keys[name] = self.keys[name]
            if isinstance(metric, PatchInsertionDeletion):
                curves = metric.curves(*arguments, **more)
                part.curves[f"{name}/index"] = batch.indices.cpu()[curves.samples.cpu()].numpy()
                for line in ("x", "insertion", "deletion"):
                    part.curves[f"{name}/{line}"] = getattr(curves, line).cpu().numpy()
        return part

    def _facts(self, session: Session, batch: Batch, explainer: str) -> ScoreShard:
        """What is known of every sample before anything is scored."""
        own = batch.labels[:, None]
        return ScoreShard(
            explainer=explainer,
            key=session.keys[explainer],
            index=batch.indices.cpu().numpy(),
            label=batch.labels.cpu().numpy(),
            target=batch.targets.cpu().numpy(),
            prediction=batch.predictions.cpu().numpy(),
            probability=batch.probabilities.gather(1, own).squeeze(1).double().cpu().numpy(),
        )

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, session: Session) -> None:
        """Merge (rank zero), print and log; a collective."""
        counts = torch.tensor([float(self.from_disk), float(len(self._scored))], device=pl_module.device)
        total, scored = map(int, trainer.strategy.reduce(counts, reduce_op="sum"))  # type: ignore[arg-type]
        if total:
            rank_zero_info(
                f"Took the scores of {total} samples (counted per explainer) from disk ({session.store.folder})."
            )
        trainer.strategy.barrier("labn-scores")
        metrics = {name: (self.keys[name], self.metrics[name].names) for name in self.names}
        counted = {name: self.metrics[name].reduce for name in self.names if self.metrics[name].counts_samples}
        plan = Plan(session.keys, metrics, frozenset(session.subset or ()), counted)
        means: dict[str, float] = {}
        if trainer.is_global_zero:
            means = self._merge(trainer, session, plan, scored)
        means = trainer.strategy.broadcast(means)
        for name, value in means.items():
            pl_module.log(f"{session.split}/{name}", value, rank_zero_only=False, sync_dist=False)

    def _merge(self, trainer: pl.Trainer, session: Session, plan: Plan, scored: int) -> dict[str, float]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        manifest = {
            **session.facts,
            "metrics": self._asked(),
            "settings": {**self.settings, "bias": self._bias, **self.engine_options},
            "sources": self._sources,
            "positive_classes": self._positives,
        }
        groups = data.groups(session.split)
        summary = write_results(
            session.store,
            plan,
            session.split,
            lambda i: data.sample_name(session.split, i),
            manifest,
            None if groups is None else dict(enumerate(groups.tolist())),
            scored,
        )
        if trainer.state.fn != "fit":
            print(f"\n{session.store.folder}: mean [95 % interval]\n{summary_table(summary, self._headline())}")
        return {f"{explainer}/{metric}": interval.mean for (explainer, metric), interval in summary.items()}

    def _asked(self) -> list[str]:
        """The values that the names of the metrics ask for."""
        return [value for name in self.names for value in values_named(name, self.metrics[name]).values()]

    def _headline(self) -> list[str]:
        filled = any("fill_probability" in metric.names for metric in self.metrics.values())
        return list(dict.fromkeys([*self._asked(), *["fill_probability"] * filled]))


def check_classes(positives_only: bool | list[int]) -> None:
    """Raise ValueError unless `positives_only` is yes, no, or a list of class numbers."""
    if not isinstance(positives_only, bool) and (not positives_only or min(positives_only) < 0):
        raise InputError(f"positives_only is {positives_only}; it must be true, false or a list of class numbers.")


def positive_classes(data: Any, positives_only: bool | list[int]) -> list[int] | None:
    """The classes whose samples alone are scored; None where all samples are.

    Raises:
        ValueError: the data has no class of a number.
    """
    if isinstance(positives_only, bool):
        return list(data.positive_classes) if positives_only else None
    if max(positives_only) >= data.num_classes:
        raise InputError(f"positives_only is {positives_only}; the data has {data.num_classes} classes, from 0.")
    return list(positives_only)


def check_metric_options(metric_options: dict[str, Any]) -> None:
    """Raise ValueError where metrics are to be set to what this callback or the data sets for all of them."""
    for name in metric_options:
        if name in ("fill", "positives_only", *ENGINE):
            raise InputError(f"metric_options has {name}, which is an argument of EvaluationCallback itself; set that.")
        if name in ("mean", "std", "bias"):
            raise InputError(f"metric_options has {name}, which the data says; leave it out.")


def with_variants(metrics: list[str], also: list[str]) -> list[str]:
    """Every name, insertion-deletion metrics followed by their variants: `pid16`, `pid16@stable`, ..."""
    names = []
    for name in metrics:
        family = name == "id" or name.startswith(("pid", "insertion", "deletion"))
        names += [name, *(f"{name}@{variant}" for variant in also if family and "@" not in name)]
    return list(dict.fromkeys(names))
