import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from datamodules import SyntheticFundus
from datamodules.io.layered_scene import PixelLayer
from datamodules.io.sources import ArraySource
from datamodules.synthetic import FundusPainter, PaintedSource


@pytest.fixture(scope="module")
def painted() -> ArraySource:
    return ArraySource.preloaded(PaintedSource(FundusPainter(64), 0, "train", 600))


def test_lesions_are_small_and_only_in_the_positive_class(painted: ArraySource) -> None:
    assert painted.masks is not None
    share = np.stack(painted.masks).mean((1, 2))
    assert (share[painted.labels == 0] == 0).all()
    assert (share[painted.labels == 1] > 0.005).all()
    assert share.max() <= 0.03
    assert painted.labels.sum() == 300


@pytest.mark.parametrize("size", [48, 96, 128, 224])
def test_lesions_stay_small_at_other_sizes(size: int) -> None:
    painter = FundusPainter(size)
    shares = [painter.paint(np.random.default_rng(i), True)[1].mean() for i in range(25)]
    assert min(shares) > 0.005
    assert max(shares) <= 0.03


def spots(painter: FundusPainter, seed: int, diseased: bool) -> tuple[np.ndarray, ...]:
    """Which spot (10, 11, ... in drawing order) each pixel shows, the mask, and the size of each spot when drawn."""
    scene = painter.scene(np.random.default_rng(seed), diseased)
    shown, sizes = np.zeros((painter.size, painter.size)), []
    for layer in scene.layers[2:]:
        assert isinstance(layer, PixelLayer)
        for rows, columns, _ in layer.pieces:
            shown[rows, columns] = 10 + len(sizes)
            sizes.append(len(rows))
    return shown, painter.paint(np.random.default_rng(seed), diseased)[1], np.array(sizes)


def test_the_mask_is_the_visible_pixels_of_the_lesions() -> None:
    """Hardly ever does another spot cover a pixel of a lesion, which stays in the mask."""
    painter = FundusPainter(64)
    hidden = pixels = 0
    for seed in range(150):
        shown, mask, _ = spots(painter, seed, True)
        lesions = sum(
            layer.name.startswith("lesion") for layer in painter.scene(np.random.default_rng(seed), True).layers
        )
        visible = (shown >= 10) & (shown < 10 + 2 * lesions)
        assert not (visible & ~mask).any()
        hidden, pixels = hidden + (mask & ~visible).sum(), pixels + mask.sum()
    assert hidden <= 1e-3 * pixels


def test_spots_hardly_overlap_in_either_class() -> None:
    painter = FundusPainter(64)
    for diseased in (False, True):
        lost = []
        for seed in range(100):
            shown, _, sizes = spots(painter, seed, diseased)
            lost.append(1 - (shown >= 10).sum() / sizes.sum())
        assert np.mean(lost) < 0.01


def test_a_blob_has_exactly_the_requested_number_of_pixels() -> None:
    painter = FundusPainter(64)
    for count in range(1, 60):
        rows, columns = painter._blob(np.random.default_rng(count), count)
        assert len(set(zip(rows.tolist(), columns.tolist()))) == count


def histograms(images: np.ndarray, bins: int = 8) -> np.ndarray:
    """Joint colour histograms (N, bins^3)."""
    level = images.astype(int) * bins // 256
    code = (level[..., 0] * bins + level[..., 1]) * bins + level[..., 2]
    return np.stack([np.bincount(c.ravel(), minlength=bins**3) for c in code])


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_colour_statistics_do_not_separate_the_classes(painted: ArraySource, strength: float) -> None:
    test = ArraySource.preloaded(PaintedSource(FundusPainter(64), 0, "test", 400))
    for features in (histograms, lambda images: np.sort(images.mean(-1).reshape(len(images), -1), 1)[:, ::8]):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        classifier.fit(features(np.stack(painted.images)), painted.labels)
        assert classifier.score(features(np.stack(test.images)), test.labels) < 0.65


def test_images_depend_on_seed_split_and_index_alone() -> None:
    painter = FundusPainter(64)
    train = PaintedSource(painter, 5, "train", 20)
    first = train.load(3)
    train.load(4)
    again = PaintedSource(FundusPainter(64), 5, "train", 20).load(3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    for other in (PaintedSource(painter, 6, "train", 20), PaintedSource(painter, 5, "val", 20)):
        assert not np.array_equal(other.load(3)[0], first[0])
    assert not np.array_equal(train.load(4)[0], first[0])


def test_synthetic_batches_have_masks_and_the_default_statistics() -> None:
    data = SyntheticFundus(n_train=200, n_val=6, n_test=5, batch_size=200)
    data.setup("fit")
    assert (data.num_classes, data.class_names, data.positive_classes) == (2, ["healthy", "lesions"], (1,))
    batch = next(iter(data.train_dataloader()))
    assert batch["mask"].any(2).any(1).tolist() == (batch["label"] == 1).tolist()
    assert batch["image"].mean((0, 2, 3)).abs().max() < 0.05
    assert (batch["image"].std((0, 2, 3)) - 1).abs().max() < 0.05
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [200, 6, 5]
    assert data.sample_name("test", 4) == "test_00004"
    assert torch.equal(data.labels("train"), SyntheticFundus(n_train=200).labels("train"))
    assert data.fingerprint("val") != SyntheticFundus(n_val=6, data_seed=1).fingerprint("val")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="n_val is 1; both classes need an image"):
        SyntheticFundus(n_val=1)
    with pytest.raises(ValueError, match="image_size is 32; synthetic fundus images need at least 48 pixels"):
        SyntheticFundus(image_size=32)
