"""A checkpoint that is used with other classes, preparation or training images than its own says so."""

from types import SimpleNamespace

import pytest

from datamodules import SyntheticFundus
from labn.io.preprocessing import KEY
from labn.launch.error_messages import explain_error
from labn.modules.provenance import TRAINED_ON, check_trained_on, training_hash

SIZES = {"n_train": 4, "n_val": 2, "n_test": 2, "image_size": 48}


@pytest.fixture(scope="module")
def data():
    return SyntheticFundus(**SIZES)


def checkpoint(data, **changes):
    return {KEY: data.preprocessing().plain() | changes, TRAINED_ON: training_hash(data)}


@pytest.mark.filterwarnings("error")
def test_the_same_data_and_checkpoints_without_a_record_pass(data):
    check_trained_on(checkpoint(data), SyntheticFundus(**SIZES))
    for earlier in ({}, {KEY: None}, {KEY: checkpoint(data)[KEY]}, {KEY: {}, TRAINED_ON: 3}):
        check_trained_on(earlier, data)
    check_trained_on(checkpoint(data), SimpleNamespace())


@pytest.mark.parametrize("names", [["lesions", "healthy"], ["another", "healthy"]])
def test_a_class_with_another_label_is_refused(data, names):
    with pytest.raises(
        ValueError, match=r"those of the data are healthy, lesions, where \w+ has another label: \d, not"
    ):
        check_trained_on(checkpoint(data, class_names=names), data)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"class_names": ["a", "b"]}, "trained on the classes a, b; those of the data are healthy, lesions"),
        ({"image_size": 64}, "prepared in another way: image_size 64, now 48"),
        ({"mean": [0.5, 0.5, 0.5]}, r"prepared in another way: mean \[0.5, 0.5, 0.5\], now \[0.454"),
    ],
)
def test_other_classes_and_another_preparation_are_named(data, changes, warning):
    with pytest.warns(UserWarning, match=warning):
        check_trained_on(checkpoint(data, **changes), data)


def test_other_training_images_are_named(data):
    with pytest.warns(UserWarning, match=r"trained on another training split .* the test may have images that"):
        check_trained_on(checkpoint(data), SyntheticFundus(**SIZES | {"n_train": 6}))


def test_a_batchnorm_of_one_value_is_explained():
    text = "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])"
    assert "data.init_args.drop_last" in str(explain_error(ValueError(text), 0))
    assert explain_error(ValueError("another"), 0) is None


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "a b/best.ckpt"), FileNotFoundError("Not found: a b/best.ckpt")]
)
def test_a_checkpoint_that_another_command_moves_meanwhile_is_named(error):
    assert str(explain_error(error, 0)).startswith("a b/best.ckpt has gone since this command began")
    assert explain_error(FileNotFoundError(2, "No such file", "names.csv"), 0) is None
