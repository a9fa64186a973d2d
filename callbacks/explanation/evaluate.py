"""Score the maps of every explainer with every metric, and write the tables."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from callbacks.checks import check_scorable
from callbacks.explanation.base import ExplainingCallback, callbacks_of
from callbacks.explanation.session import ExplainedBatch
from labn.errors import InputError
from labn.explainers import Explainer, explainer_by_name
from labn.inference.chunk_size import check_chunk_size
from labn.inference.fingerprint import digest
from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.registry import check_settings, metric_by_name, values_named
from labn.perturbation.engine import REDUCED_REVISION, check_precision
from labn.results.fingerprints import describe, source_digest
from labn.results.store import ScoreShard
from labn.results.tables import BASELINES, Plan, reading, summary_table, write_results

ENGINE = ("chunk_size", "fold", "precision")
"""Arguments of this callback that go to the perturbation engine, which all metrics share."""


class EvaluationCallback(ExplainingCallback):
    """Score the maps of every explainer with PID and other metrics.

    Every batch's scores are saved in `<run_dir>/<stage>/scores/`. At the end of the stage rank zero merges them into
    `scores.csv`, `summary.csv`, `paired.csv`, `ranks.csv`, `predictions.csv`, `curves.npz` and, for metrics that count
    samples, `counts.csv`, prints the means with their 95 % intervals and logs them as `<stage>/<explainer>/<metric>`.

    Args:
        metrics: names of metrics, such as `id`, `pid16`, `mass`.
        val_metrics: metrics scored at validation end while fitting; None takes all.
        also: variants that are added for every insertion-deletion metric: `stable`, `random`, `threshold`, `official`.
        metric_options: settings, such as `step` or `score_class`, for all metrics that have them.
        fill: what removed pixels show: black, mean, bias, blur, uniform or image_mean.
        positives_only: score only samples of the data's positive classes in the metrics that perturb images (the
            papers' choice for IDRiD); a list of class numbers selects those classes instead.
        chunk_size: perturbed inputs per forward; None measures a suitable one.
        fold: run the copy of the network with folded BatchNorm where folding is exact.
        precision: precision of the perturbed forwards, `fp32` or `bf16`; predictions are always made in float32.
        baselines: add the uninformative maps `random` and `constant` to every table, to expose a biased protocol.
        kwargs: arguments of `ExplainingCallback`.

    Raises:
        InputError: a metric or precision is unknown, `chunk_size` is below 1, `positives_only` holds a negative number,
            `metric_options` sets an argument of this callback or a property of the data, or a trainer has several of
            this callback.
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
        # Built once without the data's values, so that a wrong name or setting fails when the configuration is read.
        for name in names:
            metric_by_name(name, mean=None, std=None, bias=None, **self.settings)
        check_settings(names, metric_options or {})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the settings against the trainer, and the metrics and classes against the data."""
        super().setup(trainer, pl_module, stage)
        if sum(isinstance(callback, EvaluationCallback) for callback in callbacks_of(trainer)) > 1:
            raise InputError(
                "Several EvaluationCallbacks would replace each other's tables; name all metrics in one of them."
            )
        if self.schedule.is_ever_due(trainer):
            data = trainer.datamodule  # type: ignore[attr-defined]
            positive_classes(data, self.settings["positives_only"])
            built = {n: metric_by_name(n, mean=None, std=None, bias=None, **self.settings) for n in self._due(trainer)}
            check_scorable(built, data, "test" if trainer.state.fn == "test" else "val")

    def _due(self, trainer: pl.Trainer) -> list[str]:
        """Names of the metrics of the running command."""
        return self.val_names if trainer.state.fn == "fit" else self.test_names

    @property
    def engine_options(self) -> dict[str, Any]:
        """Arguments of the perturbation engine: `chunk_size`, `fold` and `precision`."""
        return {name: getattr(self, name) for name in ENGINE}

    @property
    def extra_explainers(self) -> dict[str, Explainer]:
        """The baselines `random` and `constant`, unless they are switched off."""
        return {name: explainer_by_name(name) for name in BASELINES} if self.baselines else {}

    def prepare(self, trainer: pl.Trainer) -> None:
        """Build the metrics with the data's mean, standard deviation and bias image, and the keys of their scores."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.names = self._due(trainer)
        bias = data.bias_image() if self.settings["fill"] == "bias" else None
        self._positives = positive_classes(data, self.settings["positives_only"])
        positives = False if self._positives is None else self._positives
        shared = {"mean": data.mean, "std": data.std, "bias": bias, **self.settings, "positives_only": positives}
        self.metrics = self.session.metrics = {name: metric_by_name(name, **shared) for name in self.names}
        self._bias = describe(bias)
        # The chunk size changes the speed alone, so that scores of any chunk size are reused.
        common = {**shared, "bias": self._bias, **self.engine_options, "chunk_size": None}
        if self.precision != "fp32":
            common["revision"] = REDUCED_REVISION
        self._sources = {n: s for n, m in self.metrics.items() if (s := source_digest(type(m))) is not None}
        # A metric of this project is identified by name, settings and revision, so that its scores stay valid when
        # its source is edited without changing a number; a metric of the user also by a hash of its source.
        extra = {name: [self._sources.get(name), metric.revision] for name, metric in self.metrics.items()}
        self.keys = {n: digest(n, describe(common), *(x for x in extra[n] if x)) for n in self.names}
        self.from_disk, self._scored = 0, set()
        # Every map is counted twice by the progress bar: when it is computed and when it is scored.
        self.session.progress.total *= 2

    def work_on(self, trainer: pl.Trainer, batch: ExplainedBatch) -> None:
        """Score the batch, explainer by explainer, with the metrics whose values are not on disk."""
        session, indices = self.session, set(batch.indices.tolist())
        if any(self.metrics[name].needs_scenes for name in self.names) and batch.scenes is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            batch.scenes = [data.scene(session.split, index) for index in batch.indices.tolist()]
        self._scored |= indices
        shards = []
        for explainer in session.explainers:
            done = session.results.scored(explainer, session.keys[explainer], self.keys, indices)
            missing = [name for name in self.names if not indices <= done[name]]
            if missing:
                shards.append(self._score(batch, explainer, missing))
            elif self.names:
                self.from_disk += len(indices)
            session.progress.update(len(indices))
        if not self.names:  # predictions.csv is written even without metrics
            shards.append(self._facts(batch, next(iter(session.explainers))))
        # An explainer reuses forwards that earlier explainers of the batch have run, and the last digits of a logit
        # depend on the other inputs of its forward. The shards are written in reverse order: if the run is killed
        # here, the missing shards are those of the first explainers, which are scored again with the same chunks.
        for shard in reversed(shards):
            session.results.add_scores(shard)

    def _score(self, batch: ExplainedBatch, explainer: str, names: list[str]) -> ScoreShard:
        """Score the maps of one explainer with the metrics `names`."""
        session = self.session
        scored = ScoredBatch(
            session.network,
            batch.images,
            session.maps(batch, explainer),
            batch.targets,
            batch.indices,
            labels=batch.labels,
            masks=batch.masks,
            boxes=batch.boxes,
            explainer=session.explainers[explainer],
            cache=batch.engine,
            predictions=batch.predictions,
            scenes=batch.scenes,
        )
        shard = self._facts(batch, explainer)
        for name in names:
            metric = self.metrics[name]
            metric.check(scored)
            shard.add(name, self.keys[name], metric.score_batch(scored), batch.indices)
        return shard

    def _facts(self, batch: ExplainedBatch, explainer: str) -> ScoreShard:
        """A score shard with labels, targets and predictions of the batch, without scores."""
        own = batch.labels[:, None]
        return ScoreShard(
            explainer=explainer,
            key=self.session.keys[explainer],
            index=batch.indices.cpu().numpy(),
            label=batch.labels.cpu().numpy(),
            target=batch.targets.cpu().numpy(),
            prediction=batch.predictions.cpu().numpy(),
            probability=batch.probabilities.gather(1, own).squeeze(1).double().cpu().numpy(),
        )

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the scores (rank zero), print the means and log them; a collective."""
        session = self.session
        counts = torch.tensor([float(self.from_disk), float(len(self._scored))], device=pl_module.device)
        total, scored = map(int, trainer.strategy.reduce(counts, reduce_op="sum"))  # type: ignore[arg-type]
        if total:
            rank_zero_info(f"Read the scores of {total} samples (counted per explainer) from disk ({self.folder}).")
        trainer.strategy.barrier("labn-scores")
        metrics = {name: (self.keys[name], self.metrics[name].names) for name in self.names}
        counted = {name: self.metrics[name].reduce for name in self.names if self.metrics[name].counts_samples}
        plan = Plan(session.keys, metrics, frozenset(session.samples), counted)
        means: dict[str, float] = {}
        if trainer.is_global_zero:
            means = self._merge(trainer, plan, scored)
        means = trainer.strategy.broadcast(means)
        for name, value in means.items():
            # The broadcast has made the values equal on all ranks, so that Lightning must not average them.
            pl_module.log(f"{session.split}/{name}", value, rank_zero_only=False, sync_dist=False)

    def _merge(self, trainer: pl.Trainer, plan: Plan, scored: int) -> dict[str, float]:
        """Write the tables; the means by `<explainer>/<metric>`."""
        data, session = trainer.datamodule, self.session  # type: ignore[attr-defined]
        manifest = {
            **session.facts,
            "metrics": self._asked(),
            "settings": {**self.settings, "bias": self._bias, **self.engine_options},
            "sources": self._sources,
            "positive_classes": self._positives,
        }
        groups = data.groups(session.split)
        summary, pairs = write_results(
            session.results,
            plan,
            session.split,
            lambda i: data.sample_name(session.split, i),
            manifest,
            None if groups is None else dict(enumerate(groups.tolist())),
            scored,
        )
        if trainer.state.fn != "fit":
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            table = summary_table(summary, self._headline(), width)
            title = "mean [95 % interval]" if "[" in table else "mean; 95 % intervals are in summary.csv"
            print(f"\n{self.folder}: {title}\n{table}")
            read = [sentence for name in self._asked() if (sentence := reading(summary, pairs, name))]
            print("".join(f"{sentence}\n" for sentence in read[:1]), end="")
        return {f"{explainer}/{metric}": interval.mean for (explainer, metric), interval in summary.items()}

    def _asked(self) -> list[str]:
        """Names of the values that the requested metrics stand for, such as `id` for `pid1`."""
        return [value for name in self.names for value in values_named(name, self.metrics[name]).values()]

    def _headline(self) -> list[str]:
        filled = any("fill_probability" in metric.names for metric in self.metrics.values())
        return list(dict.fromkeys([*self._asked(), *["fill_probability"] * filled]))


def check_classes(positives_only: bool | list[int]) -> None:
    """Raise InputError unless `positives_only` is true, false, or a list of class numbers."""
    if not isinstance(positives_only, bool) and (not positives_only or min(positives_only) < 0):
        raise InputError(f"positives_only is {positives_only}; it must be true, false or a list of class numbers.")


def positive_classes(data: Any, positives_only: bool | list[int]) -> list[int] | None:
    """The classes whose samples are scored; None if all samples are scored.

    Raises:
        InputError: `positives_only` holds a number that is not a class of the data.
    """
    if isinstance(positives_only, bool):
        return list(data.positive_classes) if positives_only else None
    if max(positives_only) >= data.num_classes:
        raise InputError(f"positives_only is {positives_only}; the data has {data.num_classes} classes, from 0.")
    return list(positives_only)


def check_metric_options(metric_options: dict[str, Any]) -> None:
    """Raise InputError if `metric_options` sets an argument of this callback or a property of the data."""
    for name in metric_options:
        if name in ("fill", "positives_only", *ENGINE):
            raise InputError(
                f"metric_options has {name}, which is an argument of EvaluationCallback; set that instead."
            )
        if name in ("mean", "std", "bias"):
            raise InputError(f"metric_options has {name}, which comes from the data; remove it.")


def with_variants(metrics: list[str], also: list[str]) -> list[str]:
    """The names with every insertion-deletion metric followed by its variants: `pid16`, `pid16@stable`, ..."""
    names = []
    for name in metrics:
        family = name == "id" or name.startswith(("pid", "insertion", "deletion"))
        names += [name, *(f"{name}@{variant}" for variant in also if family and "@" not in name)]
    return list(dict.fromkeys(names))
