"""SyntheticRelations: seeded images of shapes whose class is where a disc lies beside a square, painted in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.io.layered_scene import BlendedLayer, LayeredScene
from datamodules.io.sources import Source
from datamodules.io.splits import SPLITS, Split
from datamodules.io.transforms import Augmentation
from datamodules.synthetic import DrawnSource
from labn.errors import InputError

Array = np.ndarray[Any, Any]

DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "below": (0.0, 1.0),
    "left": (-1.0, 0.0),
    "above": (0.0, -1.0),
}
"""Classes -> (x, y) from the square to the disc; y counts downwards."""

_DISTANCE = 16.0  # between the centres of square and disc, in units of 1/64 of the side
_REACH = 8.0  # radius of the circle round a shape that no other shape enters


class RelationPainter:
    """Paints a square, a disc beside it, and 3 to 5 triangles and crosses elsewhere, all in random colours.

    The class is the direction from the square to the disc. Neither of the two tells it alone, and the other shapes, in
    the same colours and of the same area, tell nothing: the truth is a relation of two shapes, and no texture.

    Args:
        size: side in pixels, at least 48; all shapes scale with it.

    Raises:
        InputError: `size` is below 48, where squares and discs look alike.
    """

    def __init__(self, size: int) -> None:
        if size < 48:
            raise InputError(f"image_size is {size}; images of shapes need at least 48 pixels.")
        self.size, self.unit = size, size / 64
        self.y, self.x = np.mgrid[:size, :size] + 0.5

    def scene(self, rng: np.random.Generator, direction: tuple[float, float]) -> LayeredScene:
        """The objects of one image, the square first and the disc second.

        Args:
            rng: generator of all random numbers of the image.
            direction: (x, y) from the square to the disc.
        """
        square, disc = self._pair(rng, direction)
        layers = [
            BlendedLayer("square", self._polygon(square, 4.9, 4, rng.uniform(-0.3, 0.3)), self._colour(rng)),
            BlendedLayer("disc", self._disc(disc, 5.5), self._colour(rng)),
        ]
        taken = [square, disc]
        for number in range(int(rng.integers(3, 6))):
            at, turn = self._free_position(rng, taken), rng.uniform(0, 2 * np.pi)
            kind = ("triangle", "cross")[int(rng.integers(2))]
            alpha = self._polygon(at, 4.3, 3, turn) if kind == "triangle" else self._cross(at, turn)
            layers.append(BlendedLayer(f"{kind} {number + 1}", alpha, self._colour(rng)))
            taken.append(at)
        shape = (self.size, self.size, 3)
        slope = rng.normal(0, 0.1, 2)
        grey = rng.uniform(0.4, 0.6) + (slope[0] * self.x + slope[1] * self.y) / self.size
        background = np.broadcast_to(grey[..., None], shape).astype(np.float32)
        return LayeredScene(background, tuple(layers), np.ones(shape[:2]), rng.normal(0, 0.03, shape))

    def _pair(self, rng: np.random.Generator, direction: tuple[float, float]) -> tuple[Array, Array]:
        """Centres (x, y) of square and disc; the direction varies by up to 20 degrees."""
        turn = rng.uniform(-0.35, 0.35)
        x, y = direction
        step = np.array([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)])
        half = 0.5 * _DISTANCE * self.unit * step
        margin = _REACH * self.unit + np.abs(half)
        middle = rng.uniform(margin, self.size - margin)
        return middle - half, middle + half

    def _free_position(self, rng: np.random.Generator, taken: list[Array]) -> Array:
        """A centre (x, y) of a shape that touches no other shape."""
        gap = 2 * _REACH * self.unit
        while True:
            at = rng.uniform(_REACH * self.unit, self.size - _REACH * self.unit, 2)
            if all(np.hypot(*(at - other)) > gap for other in taken):
                return at
            gap *= 0.995  # a smaller gap after each failure makes the loop end in a crowded image too

    def _colour(self, rng: np.random.Generator) -> Array:
        """A colour with one channel high, one low and one anywhere."""
        return rng.permutation([rng.uniform(0.85, 1.0), rng.uniform(0.0, 0.15), rng.uniform(0.0, 1.0)])

    def _soft(self, distance: Array) -> Array:
        """Opacity of a signed distance in pixels from the outline, negative inside: a ramp one pixel wide."""
        return np.clip(0.5 - distance, 0, 1)

    def _disc(self, at: Array, radius: float) -> Array:
        return self._soft(np.hypot(self.x - at[0], self.y - at[1]) - radius * self.unit)

    def _polygon(self, at: Array, inner: float, corners: int, turn: float) -> Array:
        """A regular polygon whose sides lie `inner` units from its centre."""
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        x, y = self.x - at[0], self.y - at[1]
        return self._soft(np.max([x * np.cos(a) + y * np.sin(a) for a in angles], 0) - inner * self.unit)

    def _cross(self, at: Array, turn: float) -> Array:
        """Two bars at a right angle."""
        x, y = self.x - at[0], self.y - at[1]
        along = np.abs(x * np.cos(turn) + y * np.sin(turn)), np.abs(y * np.cos(turn) - x * np.sin(turn))
        bars = [np.maximum(a - 6.5 * self.unit, b - 2.2 * self.unit) for a, b in (along, along[::-1])]
        return self._soft(np.minimum(*bars))


# Part of the data hash; has to be increased whenever the same arguments paint other pixels.
_VERSION = 2


class SyntheticRelations(ImageDataModule):
    """Images of shapes in four classes: the disc lies right of, below, left of or above the square.

    Every image has 3 to 5 further shapes, triangles and crosses, which tell nothing about the class. The mask covers
    square and disc. Image `index` of a split depends on (data_seed, split, index) alone. A split is painted once, in
    `setup`, and kept in memory (uint8).

    Args:
        n_train: number of training images; the classes are equally frequent up to one image.
        n_val: number of validation images.
        n_test: number of test images.
        image_size: side in pixels, at least 48.
        data_seed: seed of the images.
        mean: mean of each channel for values in [0,1].
        std: standard deviation of each channel for values in [0,1].
        augmentation: augmentation of the training split; none by default, because a flip changes the class.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        InputError: a split has fewer than four images, or `image_size` is below 48.

    Example:
        >>> data = SyntheticRelations(n_train=8, n_val=4, n_test=4, image_size=48)
        >>> data.class_names, sorted(data.labels("test").tolist())
        (['right', 'below', 'left', 'above'], [0, 1, 2, 3])
        >>> data.scene("test", 0).names[:2]
        ('square', 'disc')
    """

    def __init__(
        self,
        n_train: int = 2400,
        n_val: int = 300,
        n_test: int = 300,
        image_size: int = 64,
        data_seed: int = 0,
        mean: list[float] | None = [0.49, 0.49, 0.49],  # noqa: B006 (read only)
        std: list[float] | None = [0.167, 0.167, 0.167],  # noqa: B006 (read only)
        augmentation: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, mean, std, augmentation=augmentation, cache_images=True, **kwargs)
        self.counts: dict[Split, int] = {"train": n_train, "val": n_val, "test": n_test}
        for split, count in self.counts.items():
            if count < len(DIRECTIONS):
                raise InputError(f"n_{split} is {count}; every class needs an image, so at least {len(DIRECTIONS)}.")
        self.data_seed, self.painter = data_seed, RelationPainter(image_size)
        self.class_names = list(DIRECTIONS)
        self.positive_classes = tuple(range(len(DIRECTIONS)))

    @property
    def event_classes(self) -> tuple[int, ...]:
        """No class is an event."""
        return ()

    def _build(self) -> dict[Split, Source]:
        return {split: RelationSource(self.painter, self.data_seed, split, n) for split, n in self.counts.items()}


class RelationSource(DrawnSource):
    """A split of `SyntheticRelations`; `load` paints the image."""

    def __init__(self, painter: RelationPainter, seed: int, split: Split, count: int) -> None:
        order = np.random.default_rng([seed, SPLITS.index(split)])
        super().__init__(seed, split, order.permutation(np.arange(count, dtype=np.int64) % len(DIRECTIONS)))
        self.painter = painter
        self.identity = ["synthetic relations", _VERSION, seed, painter.size]

    def load(self, index: int) -> tuple[Array, Array]:
        """See `Source.load`."""
        scene = self.scene(index)
        square, disc = scene.masks()[:2]
        return scene.draw(), square | disc

    def scene(self, index: int) -> LayeredScene:
        """See `Source.scene`."""
        direction = tuple(DIRECTIONS.values())[int(self.labels[index])]
        return self.painter.scene(self.generator(index), direction)
