"""Maps, curves, means and the table of samples in the files of TensorBoard and MLflow, with the real packages."""

import csv
import io
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image

from callbacks import EvaluationCallback, ExplanationCallback, MapLogger
from callbacks.logging.csv_logger import RunLogger
from callbacks.logging.loggers import check_packages, with_run_log
from callbacks.logging.results import for_each_tracker
from callbacks.logging.trackers import MLflowTracker, markdown, trackers_of
from datamodules import SyntheticFundus
from labn.modules import Classifier


def logged_run(folder, *loggers):
    """The results folder of a test with two overlays, logged to the loggers."""
    pl.seed_everything(0, verbose=False)
    module = Classifier("resnet18", num_classes=2)
    module.random_weights = ()  # as after training, without which a test is refused
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[
            ExplanationCallback({"gradcam": None}),
            EvaluationCallback(["pid16"], baselines=False, metric_options={"n_steps": 4}),
            MapLogger(max_images=2),
        ],
        accelerator="cpu",
        logger=list(loggers),
        enable_progress_bar=False,
        inference_mode=False,
    )
    trainer.test(module, SyntheticFundus(n_train=8, n_val=4, n_test=4, image_size=48, batch_size=4), verbose=False)
    return folder / "test"


def mean_of(stage):
    with open(stage / "summary.csv", newline="") as file:
        return next(float(row["mean"]) for row in csv.DictReader(file) if row["metric"] == "pid16")


def overlays(stage):
    return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in (stage / "overlays").glob("*.png")}


def check_table(header, rows, stage):
    place = header.index("gradcam/pid16")
    assert header[:5] == ["index", "name", "label", "prediction", "probability"]
    with open(stage / "scores.csv", newline="") as file:
        scores = {r["index"]: float(r["value"]) for r in csv.DictReader(file) if r["metric"] == "pid16"}
    assert {row[0]: float(row[place]) for row in rows} == pytest.approx({i: scores[i] for i in ("0", "3")}, rel=1e-3)


def test_tensorboard_has_maps_curves_means_and_the_table(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "logged")
    stage = logged_run(tmp_path / "run", logger)
    found = EventAccumulator(logger.log_dir).Reload()
    assert found.Scalars("test/gradcam/pid16")[0].value == pytest.approx(mean_of(stage), abs=1e-6)
    expected = overlays(stage)
    tags = found.Tags()
    assert set(tags["images"]) == {f"maps/test/{name}" for name in expected} | {"curves/test/pid16"}
    for name, pixels in expected.items():
        data = found.Images(f"maps/test/{name}")[0].encoded_image_string
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    (text,) = [tag for tag in tags["tensors"] if tag.startswith("samples/test")]
    lines = found.Tensors(text)[0].tensor_proto.string_val[0].decode().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    check_table(header, rows, stage)


def test_mlflow_has_maps_curves_means_and_the_table(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # later versions want a database otherwise
    logger = MLFlowLogger("labn", tracking_uri=f"file:{tmp_path / 'logged'}")
    stage = logged_run(tmp_path / "run", logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["test/gradcam/pid16"] == pytest.approx(mean_of(stage), abs=1e-6)
    artifacts = tmp_path / "logged" / run.info.experiment_id / logger.run_id / "artifacts"
    expected = overlays(stage)
    found = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    names = {f"maps/test/step=000000/{name}.png" for name in expected}
    assert found == names | {"curves/test/pid16/step=000000.png", "samples/test.csv"}
    for name, pixels in expected.items():
        shown = Image.open(artifacts / "maps/test/step=000000" / f"{name}.png")
        assert np.array_equal(np.asarray(shown.convert("RGB")), pixels)
    header, *rows = csv.reader((artifacts / "samples/test.csv").read_text().splitlines())
    check_table(header, rows, stage)


class Failing(TensorBoardLogger):
    """Takes numbers and fails for pictures."""

    @property
    def experiment(self):
        return self

    def add_image(self, *arguments, **options):
        raise ConnectionError("the service has gone")

    def log_metrics(self, *arguments, **options):
        pass

    save = finalize = log_hyperparams = log_graph = log_metrics


def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage = logged_run(tmp_path / "run", Failing(tmp_path / "logged"))
    said = [str(w.message) for w in caught if "the service has gone" in str(w.message)]
    assert said == [f"TensorBoard did not take the results (the service has gone); they are in {stage}."]
    assert len(overlays(stage)) == 2
    assert -1 <= mean_of(stage) <= 1


class Uploaded:
    """A tracker whose service and errors name an address with a password."""

    run_id, _tracking_uri = 1, "http://me:sec@ret@host:5000/api"

    def log(self, tracker):
        raise ConnectionError(f"POST {self._tracking_uri} failed")


def test_passwords_in_addresses_are_not_shown(tmp_path, monkeypatch):
    uploaded = Uploaded()
    tracker = MLflowTracker(uploaded)
    assert tracker.where() == "run 1 in http://host:5000/api"
    monkeypatch.setattr("callbacks.logging.results.trackers_of", lambda loggers: [tracker])
    with pytest.warns(UserWarning, match=r"\(POST http://host:5000/api failed\)"):
        for_each_tracker([], tmp_path, uploaded.log)


def test_loggers_of_numbers_alone_are_no_trackers(tmp_path):
    assert trackers_of([CSVLogger(tmp_path)]) == []


def test_the_run_folder_keeps_its_log_beside_other_loggers(tmp_path):
    class Other(Logger):
        name, version, log_hyperparams, log_metrics = "other", 0, None, None

    other = Other()
    own, kept = with_run_log([other], tmp_path, "fit")
    assert isinstance(own, RunLogger)
    assert (own.log_dir, kept) == (str(tmp_path / "logs" / "fit"), other)
    assert with_run_log([], tmp_path, "fit") == []
    same = CSVLogger(tmp_path, name="logs", version="fit")
    assert with_run_log([same], tmp_path, "fit") == [same]


def test_a_logger_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("callbacks.logging.loggers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="MLFlowLogger needs the package mlflow: pip install mlflow"):
        check_packages(["", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.MLFlowLogger"])


def test_names_do_not_leave_their_cell_of_a_markdown_table():
    picture = Image.new("RGB", (1, 1))
    text = markdown(["name", "maps", "pid16"], [["a|<b>\nc", picture, 0.123456], ["d", picture, None]])
    assert text.splitlines() == ["| name | pid16 |", "|---|---|", r"| a\|&lt;b> c | 0.1235 |", "| d |  |"]
