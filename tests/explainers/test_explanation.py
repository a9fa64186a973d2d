"""What `explain` returns shows, saves and describes itself; what `evaluate` returns prints as a table."""

import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from labn import Explanation, Explanations, evaluate, explain
from labn.errors import FileError, InputError, InputTypeError, MissingFileError
from labn.explainers import load_explanations


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(1))


METHODS = ["gradcam", "-gradcam", "gradient"]


def test_several_methods_are_saved_and_read_again(model, images, tmp_path):
    explained = explain(model, images, METHODS, targets=[0, 2])
    folder = explained.save(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    stored = load_file(folder / "maps.safetensors")
    described = json.loads((folder / "explanation.json").read_text())
    for name in METHODS:
        assert torch.equal(stored[name], explained[name].maps)
        assert described["methods"][name]["targets"] == [0, 2]
        assert described["methods"][name]["maximum"] == float(explained[name].maps.max())
        picture = cv2.imread(str(folder / "overlays" / name / "00001.png"))
        assert np.array_equal(picture[..., ::-1], explained[name].overlay(index=1))
    assert (folder / "sheet.png").is_file()
    again = load_explanations(folder)
    assert list(again) == METHODS
    assert all(torch.equal(again[n].maps, explained[n].maps) and again[n].targets.tolist() == [0, 2] for n in METHODS)


def test_every_image_is_on_a_sheet(tmp_path):
    explained = Explanation(torch.eye(4).repeat(9, 1, 1), torch.arange(9), "gradcam")
    folder = explained.save(tmp_path / "saved")
    sheets = json.loads((folder / "explanation.json").read_text())["sheets"]
    assert sheets == {"sheet.png": [*range(8)], "sheet-2.png": [8]}
    assert sorted(path.name for path in folder.glob("sheet*")) == sorted(sheets)
    assert [text.get_text() for text in explained.plot(first=8).texts] == ["image 8, class 8"]
    with pytest.raises(InputError, match="first is 9; there are 9 images"):
        explained.plot(first=9)
    with pytest.raises(InputError, match="no explanation"):
        Explanations().save(tmp_path / "none")


def test_damaged_files_are_named(model, images, tmp_path):
    folder = explain(model, images, "gradcam").save(tmp_path / "saved")
    described = (folder / "explanation.json").read_text()
    for targets in ("[0]", "[0, 0.5]", "3"):
        wrong = {"methods": {"gradcam": {"targets": json.loads(targets)}}}
        (folder / "explanation.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="are not 2 classes, one per map"):
            load_explanations(folder)
    (folder / "explanation.json").write_text(described)
    (folder / "maps.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"maps\.safetensors cannot be read"):
        load_explanations(folder)
    (folder / "maps.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"maps\.safetensors does not exist"):
        load_explanations(folder)


def test_a_position_counts_from_the_end_too(model, images):
    explained = explain(model, images, "gradcam")
    assert np.array_equal(explained.overlay(index=-1), explained.overlay(index=1))
    with pytest.raises(InputError, match="index is 2; there are 2 maps"):
        explained.overlay(index=2)


def test_a_folder_with_files_is_left_alone_and_an_empty_one_is_filled(model, images, tmp_path):
    explained = explain(model, images, "gradcam")
    (tmp_path / "mine").mkdir()
    explained.save(tmp_path / "mine")
    with pytest.raises(InputError, match="not an empty folder"):
        explained.save(tmp_path / "mine")
    with pytest.raises(MissingFileError, match=r"holds no explanation\.json"):
        load_explanations(tmp_path)


def test_a_half_written_folder_is_never_left(model, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("labn.explainers.explanation.overlay", full)
    with pytest.raises(FileError, match="free some space"):
        explain(model, images, "gradcam").save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_has_a_row_per_image_and_a_column_per_method(model, images):
    explained = explain(model, images, METHODS)
    titles = [axes.get_title() for axes in explained.plot().axes if axes.get_title()]
    assert titles == ["image", *METHODS] * 2
    assert len([axes for axes in explained["gradcam"].plot(max_images=1).axes if axes.get_title()]) == 2
    assert explained._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no explanation"):
        Explanations().plot()


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_shown_grey_in_their_own_range(channels):
    images = torch.linspace(-3, 5, channels * 16).view(1, channels, 4, 4)
    shown = Explanation(torch.zeros(1, 4, 4), torch.tensor([0]), "gradcam", images)._pictures(1)[0]
    assert shown.shape == (4, 4)
    assert (shown.min(), shown.max()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_more_channels_than_a_picture_has_are_shown_grey_whatever_their_normalisation(channels):
    images = torch.linspace(-3, 5, channels * 16).view(1, channels, 4, 4)
    explanation = Explanation(torch.zeros(1, 4, 4), torch.tensor([0]), "gradcam", images)
    assert explanation._pictures(1, 0, (0.5,) * channels, (1.0,) * channels)[0].shape == (4, 4)
    assert explanation.plot((0.5,) * channels, (1.0,) * channels).axes


def test_the_folder_that_one_stands_in_can_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = Explanation(torch.eye(8)[None], torch.tensor([3]), "gradcam").save(".")
    assert saved == tmp_path
    assert load_explanations(tmp_path)["gradcam"].targets.tolist() == [3]


def test_an_overlay_mixes_the_grey_picture_with_the_colours_of_the_map():
    explanation = Explanation(torch.tensor([[[0.0, 2.0]]]), torch.tensor([0]), "gradcam")
    white = np.full((1, 2, 3), 255, dtype=np.uint8)
    assert explanation.overlay(white, alpha=0.0).tolist() == [[[255] * 3] * 2]
    assert explanation.overlay(white, alpha=1.0).tolist() == [[[0, 0, 4], [252, 255, 164]]]  # the ends of inferno
    assert np.array_equal(explanation.overlay(white / 255.0), explanation.overlay(white))
    with pytest.raises(InputError, match=r"image\.permute"):
        explanation.overlay(np.zeros((3, 1, 2)))
    with pytest.raises(InputTypeError, match="must be uint8"):
        explanation.overlay(white.astype(np.int64))


def test_the_description_is_short():
    explanation = Explanation(torch.linspace(-1, 2, 40).view(10, 2, 2), torch.arange(10), "gradient")
    text = "Explanation(method='gradient', maps=(10, 2, 2) in [-1, 2], targets=[0, 1, 2, 3, 4, 5, 6, 7, ...])"
    assert (repr(explanation), len(explanation)) == (text, 10)
    assert explanation.numpy().dtype == np.float32


def test_explanations_are_scored_as_each_of_them(model, images):
    explained = explain(model, images, METHODS, targets=[0, 2])
    scores = evaluate(model, images, explained, metrics=["pid8", "sparseness"], masks=None)
    assert list(scores) == METHODS
    for name, explanation in explained.items():
        alone = evaluate(model, images, explanation, metrics=["pid8", "sparseness"])
        assert all(torch.equal(scores[name][metric], values) for metric, values in alone.items())
    first, *rows = repr(scores).splitlines()
    assert first.split() == ["2", "samples", "pid8", "sparseness"]
    assert [row.split()[0] for row in rows] == METHODS
    assert rows[0].split()[1] == f"{scores['gradcam']['pid8'].mean():.4f}"
    with pytest.raises(InputTypeError, match="one by one"):
        evaluate(model, images, explained, metrics=["randomisation"], explainer="gradcam")
