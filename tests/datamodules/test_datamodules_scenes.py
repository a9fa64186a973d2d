"""Scenes: images as lists of objects, drawn again without some of them."""

import numpy as np
import pytest
import torch

from datamodules import SyntheticFundus, SyntheticRelations
from datamodules.io.layered_scene import BlendedLayer, LayeredScene, PixelLayer
from datamodules.relations import DIRECTIONS, RelationPainter, RelationSource
from datamodules.synthetic import FundusPainter, PaintedSource

SOURCES = {
    "fundus": PaintedSource(FundusPainter(64), 3, "test", 12),
    "fundus 96": PaintedSource(FundusPainter(96), 3, "test", 6),
    "relations": RelationSource(RelationPainter(64), 3, "test", 12),
}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]


def test_the_whole_scene_is_the_image(source):
    for index in range(len(source)):
        assert np.array_equal(source.scene(index).draw(), source.load(index)[0])


def test_a_removed_object_changes_its_own_pixels_alone(source):
    for index in range(len(source)):
        scene = source.scene(index)
        whole, masks = scene.draw().astype(int), scene.masks()
        for number, layer in enumerate(scene.layers):
            kept = np.ones(len(masks), dtype=bool)
            kept[number] = False
            change, opacity = np.abs(scene.draw(kept) - whole).max(-1), layer.opacity(source.painter.size)
            assert not change[opacity == 0].any()
            # Soft edges change in proportion to their opacity, up to the rounding to whole numbers.
            assert (change <= 255 * opacity + 1).all()
            assert (change[masks[number]] > 0).mean() > 0.9


def test_objects_share_no_pixel_and_are_seen(source):
    for index in range(len(source)):
        masks = source.scene(index).masks()
        assert masks.sum(0).max() == 1
        assert masks.any((1, 2)).all()


def test_any_subset_is_drawn_as_if_the_others_had_never_been_there(source):
    """Two removals in either order, and all of them, which leaves the background."""
    scene = source.scene(1)
    none = scene.draw(np.zeros(len(scene.layers), dtype=bool))
    bare = LayeredScene(scene.background, (), scene.light, scene.noise)
    assert np.array_equal(none, bare.draw())
    kept = np.ones(len(scene.layers), dtype=bool)
    kept[[0, 2]] = False
    left = tuple(layer for layer, stays in zip(scene.layers, kept) if stays)
    assert np.array_equal(scene.draw(kept), LayeredScene(scene.background, left, scene.light, scene.noise).draw())


def test_masks_of_layers_by_hand():
    soft = BlendedLayer("soft", np.array([[0.4, 0.8], [0.3, 0.0]]), np.ones(3))
    hard = PixelLayer("hard", ((np.array([0]), np.array([1]), np.zeros((1, 3))),))
    light = np.array([[1.0, 1.0], [0.0, 1.0]])
    scene = LayeredScene(np.zeros((2, 2, 3), np.float32), (soft, hard), light, np.zeros((2, 2, 3)))
    # (0, 0) is at half of the greatest opacity, (0, 1) is hidden by the layer above, (1, 0) is in the dark.
    assert scene.masks().tolist() == [[[True, False], [False, False]], [[False, True], [False, False]]]


def test_lesions_and_their_number_are_those_of_the_mask():
    source = PaintedSource(FundusPainter(64), 0, "train", 40)
    for index in range(40):
        scene, (_, mask) = source.scene(index), source.load(index)
        lesions = np.array([layer.name.startswith("lesion") for layer in scene.layers])
        assert bool(lesions.any()) == bool(source.labels[index])
        assert np.array_equal(scene.masks()[lesions].any(0) | np.zeros_like(mask), mask)
        assert len(scene.layers) == len({layer.name for layer in scene.layers})


def test_the_class_of_a_relation_is_the_direction_from_square_to_disc():
    source = RelationSource(RelationPainter(64), 0, "train", 40)
    y, x = np.mgrid[:64, :64]
    for index in range(40):
        square, disc, *others = source.scene(index).masks()
        step = np.array([x[disc].mean() - x[square].mean(), y[disc].mean() - y[square].mean()])
        assert np.argmax(np.array(list(DIRECTIONS.values())) @ step) == source.labels[index]
        assert 3 <= len(others) <= 5
    assert np.bincount(source.labels).tolist() == [10] * 4


def test_colours_and_places_do_not_tell_the_relation():
    """The disc and the square are everywhere and of every colour in every class."""
    source = RelationSource(RelationPainter(64), 0, "train", 800)
    colours = [np.array([layer.colour for layer in source.scene(i).layers[:2]]).ravel() for i in range(800)]
    for label in range(4):
        of_class = np.stack([c for c, own in zip(colours, source.labels) if own == label])
        assert np.abs(of_class.mean(0) - np.mean(colours, 0)).max() < 0.1


def test_a_data_module_hands_out_scenes_in_the_units_of_its_batches():
    for data in (SyntheticFundus(n_test=4, image_size=48), SyntheticRelations(n_test=4, image_size=48)):
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        for index, image in enumerate(batch["image"]):
            scene = data.scene("test", index)
            assert torch.equal(scene.draw(torch.ones(len(scene.names), dtype=torch.bool)), image)
        assert data.has_scenes("test")


def test_data_that_was_not_drawn_has_no_scenes(tmp_path):
    original = SyntheticFundus(n_train=2, n_val=2, n_test=2, image_size=48)
    original.write_shards(tmp_path)
    from datamodules import TarShards

    data = TarShards(tmp_path)
    assert not data.has_scenes("test")
    with pytest.raises(ValueError, match="not drawn from objects"):
        data.scene("test", 0)


def test_wrong_arguments_of_relations():
    with pytest.raises(ValueError, match="n_val is 3; every class needs an image"):
        SyntheticRelations(n_val=3)
    with pytest.raises(ValueError, match="image_size is 32; images of shapes need at least 48"):
        SyntheticRelations(image_size=32)
