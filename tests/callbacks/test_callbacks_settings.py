"""Settings of the explaining callbacks that would fail later, or do nothing."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import DetectionCallback, EvaluationCallback, ExplanationCallback, MapLogger


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp16"}, "precision must be one of"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"positives_only": []}, r"positives_only is \[\]; it must be true, false or a list of class numbers"),
        ({"positives_only": [-1]}, r"positives_only is \[-1\]"),
        ({"metric_options": {"precision": "bf16"}}, "metric_options has precision, which is an argument of Evaluation"),
        ({"metric_options": {"chunk_size": 2}}, "metric_options has chunk_size, which is an argument of Evaluation"),
        ({"metric_options": {"fold": False}}, "metric_options has fold, which is an argument of Evaluation"),
        ({"metric_options": {"positives_only": [0]}}, "metric_options has positives_only, which is an argument of"),
        ({"metric_options": {"mean": [0.5]}}, "metric_options has mean, which comes from the data"),
    ],
)
def test_invalid_or_ineffective_settings_raise_in_the_constructor(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvaluationCallback(["pid16"], **options)


@pytest.mark.parametrize(
    "said", [{"target": "prediction"}, {"test_images": 1}, {"val_images": 1}, {"every_n_epochs": 2}], ids=str
)
def test_only_the_callback_with_explainers_may_set_what_is_explained(said):
    ((name, value),) = said.items()
    callbacks = [ExplanationCallback({"random": None}), EvaluationCallback(["pid16"], **said)]
    options = {"logger": False, "enable_checkpointing": False, "inference_mode": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=callbacks, **options)
    callbacks[0].setup(trainer, pl.LightningModule(), "test")
    with pytest.raises(MisconfigurationException, match=f"EvaluationCallback has {name} = {value}, but ExplanationCal"):
        callbacks[1].setup(trainer, pl.LightningModule(), "test")


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: ExplanationCallback(test_images=-3), "test_images is -3; it must be at least 1, or null for all"),
        (lambda: ExplanationCallback(test_images=0), "test_images is 0; it must be at least 1"),
        (lambda: ExplanationCallback(val_images=-1), r"val_images is -1; it must be at least 0\.$"),
        (lambda: ExplanationCallback(every_n_epochs=-1), "every_n_epochs is -1"),
        (lambda: MapLogger(max_images=-1), "max_images is -1"),
        (lambda: DetectionCallback(test_images=-3), "test_images is -3"),
    ],
)
def test_numbers_of_images_that_give_empty_tables_raise(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
