"""SyntheticFundus: seeded fundus-like images with exact lesion masks, painted in memory without any file."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from datamodules.base import ImageDataModule
from datamodules.io.layered_scene import BlendedLayer, Layer, LayeredScene, PixelLayer
from datamodules.io.sources import Source
from datamodules.io.splits import SPLITS, Split
from datamodules.io.transforms import FLIPS, Augmentation
from labn.errors import InputError

Array = np.ndarray[Any, Any]

Pixels = tuple[Array, Array]

_BACKGROUND = np.array([0.80, 0.36, 0.14])

_VESSEL = np.array([0.46, 0.10, 0.06])

_BRIGHT = np.array([0.98, 0.86, 0.42])

_DARK = np.array([0.34, 0.05, 0.05])

_DISC = np.array([1.0, 0.80, 0.50])


class FundusPainter:
    """Paints fundus-like images: an orange disc on black with optic disc, vessels, uneven light and spots.

    Every image has 4 to 6 pairs of a bright and a dark spot. In a healthy eye the spots of a pair lie apart, as smooth
    compact blobs. In a diseased eye 2 or 3 pairs form lesions: the dark spot lies in the middle, and the bright pixels
    form a broken ring around it (like circinate exudates around a leaking microaneurysm). A lesion has exactly as many
    bright and dark pixels, of the same colours, as the pair that it replaces, so that only their arrangement, and
    neither colours nor amounts, distinguishes the classes.

    Args:
        size: side in pixels, at least 48; all shapes scale with it.

    Raises:
        InputError: `size` is below 48, where the gaps of a ring would vanish.
    """

    def __init__(self, size: int) -> None:
        if size < 48:
            raise InputError(f"image_size is {size}; synthetic fundus images need at least 48 pixels.")
        self.size, self.unit = size, size / 64
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32)
        reach = int(np.ceil(7 * self.unit))
        self.dy, self.dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)

    def paint(self, rng: np.random.Generator, diseased: bool) -> tuple[Array, Array]:
        """Paint one image.

        Args:
            rng: generator of all random numbers of the image.
            diseased: whether to paint lesions.

        Returns:
            image (S,S,3) uint8 RGB and mask (S,S) bool, True on exactly the pixels of the lesions; another spot covers
            one of them in about one of a thousand images.
        """
        scene = self.scene(rng, diseased)
        lesions = [layer.opacity(self.size) > 0 for layer in scene.layers if layer.name.startswith("lesion")]
        return scene.draw(), np.any([np.zeros((self.size, self.size), dtype=bool), *lesions], axis=0)

    def scene(self, rng: np.random.Generator, diseased: bool) -> LayeredScene:
        """The image of `paint` as objects: vessels, disc, and then every lesion and every other spot.

        Args:
            rng: generator of all random numbers of the image.
            diseased: whether to paint lesions.
        """
        centre = self.size / 2 + rng.normal(0, 0.6 * self.unit, 2)
        radius = self.size * rng.uniform(0.44, 0.48)
        background, eye = self._eye(rng, centre, radius)
        spots = self._spots(rng, centre, radius, lesions=int(rng.integers(2, 4)) if diseased else 0)
        light = self._light(rng, centre, radius)
        return LayeredScene(background, (*eye, *spots), light, rng.normal(0, 0.012, (self.size, self.size, 3)))

    def _eye(self, rng: np.random.Generator, centre: Array, radius: float) -> tuple[Array, list[Layer]]:
        """The eyeground (S,S,3) float32 in [0,1] with its macula, and the layers of vessels and optic disc."""
        tint = _BACKGROUND * rng.uniform(0.85, 1.15, 3).clip(0.9, 1.1)
        image = np.broadcast_to(tint, (self.size, self.size, 3)).astype(np.float32)
        side = rng.choice((-1.0, 1.0))
        head = centre + radius * np.array([0.62 * side, rng.normal(0, 0.06)])
        macula = centre + radius * np.array([-0.08 * side, rng.normal(0.04, 0.05)])
        image *= 1 - 0.22 * self._glow(macula, 0.17 * radius)[..., None]
        vessels = self._vessels(rng, head, -side, radius)
        disc = np.clip(1.5 * self._glow(head, 0.15 * radius) ** 2, 0, 1)
        return image, [BlendedLayer("vessels", vessels, _VESSEL), BlendedLayer("disc", 0.85 * disc, _DISC)]

    def _glow(self, centre: Array, width: float) -> Array:
        """Gaussian bump of height 1 and standard deviation `width`, (S,S)."""
        return np.exp(-((self.x - centre[0]) ** 2 + (self.y - centre[1]) ** 2) / (2 * width**2))

    def _vessels(self, rng: np.random.Generator, head: Array, away: float, radius: float) -> Array:
        """Opacity (S,S) of four vessel arcades from the optic disc, each with two branches, anti-aliased."""
        layer = np.zeros((self.size, self.size), dtype=np.uint8)
        for vertical, spread in ((-1, 1.0), (-1, 0.45), (1, 1.0), (1, 0.45)):
            bend = rng.uniform(0.8, 1.15)
            t = np.linspace(0, 1, 24)
            x = head[0] + away * radius * (1.5 * t**1.5) * bend
            y = head[1] + vertical * spread * radius * 0.95 * np.sin(0.75 * np.pi * t * bend) + rng.normal(0, 0.2, 24)
            trunk = np.stack([x, y], 1)
            self._stroke(layer, trunk, 1.1 * self.unit, 200)
            for start in rng.integers(6, 18, 2):
                turn = rng.uniform(0.3, 0.9) * rng.choice((-1, 1))
                step = trunk[start + 1] - trunk[start]
                turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ step
                curve = np.linspace(0, 9, 12)[:, None] * turned + np.linspace(0, 1, 12)[:, None] ** 2 * step * 4
                self._stroke(layer, trunk[start] + curve, 0.5 * self.unit, 120)
        return (layer / 255.0).astype(np.float32)

    def _stroke(self, layer: Array, points: Array, width: float, strength: int) -> None:
        # `shift=4`: OpenCV takes sub-pixel coordinates as integers in units of 1/16 pixel.
        fixed_point = np.round(points * 16).astype(np.int32)[:, None]
        cv2.polylines(layer, [fixed_point], False, strength, max(1, round(width)), cv2.LINE_AA, shift=4)

    def _spots(self, rng: np.random.Generator, centre: Array, radius: float, lesions: int) -> list[Layer]:
        """All pairs of spots; the first `lesions` pairs form lesions, which lie near each other."""
        layers: list[Layer] = []
        taken: list[tuple[float, float, float]] = []
        turn = rng.uniform(0, 2 * np.pi)
        focus = centre + radius * rng.uniform(0.2, 0.5) * np.array([np.cos(turn), np.sin(turn)])
        for pair in range(int(rng.integers(4, 7))):
            ring, core = self._lesion(rng)
            colours = (_BRIGHT * rng.uniform(0.85, 1.0), _DARK * rng.uniform(0.85, 1.15))
            if pair < lesions:
                at = self._free_position(rng, taken, focus, 0.22 * radius, 5.2 * self.unit, centre, radius)
                pieces = (self._grained(rng, pixels, at, colour) for pixels, colour in zip((ring, core), colours))
                layers.append(PixelLayer(f"lesion {pair + 1}", tuple(pieces)))
                continue
            for kind, pixels, colour in zip(("bright", "dark"), (ring, core), colours):
                blob = self._blob(rng, len(pixels[0]))
                at = self._free_position(rng, taken, centre, 0.5 * radius, 3.8 * self.unit, centre, radius)
                piece = self._grained(rng, blob, at, colour)
                layers.append(PixelLayer(f"{kind} spot {pair + 1 - lesions}", (piece,)))
        return layers

    def _lesion(self, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
        """Pixel offsets (rows, columns) of a broken ring and of the round spot in its middle."""
        distance, angle = np.hypot(self.dx, self.dy), np.arctan2(self.dy, self.dx)
        ring = np.abs(distance - rng.uniform(3.4, 4.2) * self.unit) < 0.75 * self.unit
        gaps = np.cos(rng.integers(4, 7) * angle + rng.uniform(0, 2 * np.pi)) > -0.45
        return self._offsets(ring & gaps), self._offsets(distance < rng.uniform(1.45, 1.95) * self.unit)

    def _blob(self, rng: np.random.Generator, count: int) -> Pixels:
        """Pixel offsets of an ellipse: the `count` pixels with the smallest elliptic distance to its centre."""
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.7)
        along = self.dx * np.cos(turn) + self.dy * np.sin(turn)
        across = self.dy * np.cos(turn) - self.dx * np.sin(turn)
        nearest = np.argsort((along / stretch) ** 2 + (across * stretch) ** 2, axis=None, kind="stable")[:count]
        chosen = np.zeros(self.dx.shape, dtype=bool)
        chosen.flat[nearest] = True
        return self._offsets(chosen)

    def _offsets(self, chosen: Array) -> Pixels:
        rows, columns = np.nonzero(chosen)
        middle = self.dx.shape[0] // 2
        return rows - middle, columns - middle

    def _free_position(
        self,
        rng: np.random.Generator,
        taken: list[tuple[float, float, float]],
        focus: Array,
        spread: float,
        reach: float,
        centre: Array,
        radius: float,
    ) -> Array:
        """A pixel (x, y) near `focus` where a shape of radius `reach` overlaps no other shape and lies in the disc."""
        gap = reach
        while True:
            at = focus + rng.normal(0, spread, 2)
            inside = np.hypot(*(at - centre)) < 0.9 * radius - reach
            if inside and all((at[0] - x) ** 2 + (at[1] - y) ** 2 > (gap + r) ** 2 for x, y, r in taken):
                taken.append((float(at[0]), float(at[1]), gap))
                return np.round(at).astype(int)
            # Smaller gaps and a wider search after each failure make the loop end in a crowded eye too.
            gap, spread = 0.995 * gap, min(1.01 * spread, 0.6 * radius)

    def _grained(
        self, rng: np.random.Generator, pixels: Pixels, at: Array, colour: Array
    ) -> tuple[Array, Array, Array]:
        """Rows, columns and grained colours (n,3) of pixel offsets around (x, y)."""
        grain = rng.normal(1, 0.06, (len(pixels[0]), 1))
        return pixels[0] + at[1], pixels[1] + at[0], colour * grain

    def _light(self, rng: np.random.Generator, centre: Array, radius: float) -> Array:
        """Uneven light (S,S), 0 outside the round field of view."""
        light = 0.62 + 0.42 * self._glow(centre + rng.normal(0, 0.3 * radius, 2), rng.uniform(0.8, 1.3) * radius)
        edge = radius - np.hypot(self.x - centre[0], self.y - centre[1])
        return light * np.clip(edge / (1.5 * self.unit), 0, 1)


# Part of the data hash; has to be increased whenever the same arguments paint other pixels.
_VERSION = 1


def synthetic_labels(seed: int, split: int, count: int) -> np.ndarray:
    """Labels (count,) int64 in a seeded order: floor(count / 2) ones, and zeros.

    Example:
        >>> sorted(synthetic_labels(0, 0, 5).tolist())
        [0, 0, 0, 1, 1]
    """
    labels = np.arange(count, dtype=np.int64) % 2
    return np.random.default_rng([seed, split]).permutation(labels)


class SyntheticFundus(ImageDataModule):
    """Synthetic fundus images of two classes, healthy (0) and with lesions (1), with exact masks of the lesions.

    Image `index` of a split depends on (data_seed, split, index) alone. Lesions are broken bright rings around a dark
    spot and cover at most 3 % of the pixels. Every image has bright and dark blobs of the same colours and with as many
    pixels, so that colour statistics do not distinguish the classes. A split is painted once, in `setup`, and kept in
    memory (uint8).

    Args:
        n_train: number of training images; half of the images of every split have lesions.
        n_val: number of validation images.
        n_test: number of test images.
        image_size: side in pixels, at least 48.
        data_seed: seed of the images.
        mean: mean of each channel for values in [0,1].
        std: standard deviation of each channel for values in [0,1].
        augmentation: augmentation of the training split; only flips by default, because a crop or an erased rectangle
            can remove all lesions of an image and make its label wrong.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        InputError: a split has fewer than two images, or `image_size` is below 48.

    Example:
        >>> data = SyntheticFundus(n_train=4, n_val=2, n_test=2, image_size=48, batch_size=2)
        >>> data.setup("test")
        >>> batch = next(iter(data.test_dataloader()))
        >>> batch["image"].shape, batch["mask"].any(dim=(1, 2)).tolist() == batch["label"].bool().tolist()
        (torch.Size([2, 3, 48, 48]), True)
    """

    def __init__(
        self,
        n_train: int = 1600,
        n_val: int = 300,
        n_test: int = 300,
        image_size: int = 64,
        data_seed: int = 0,
        mean: list[float] | None = [0.454, 0.215, 0.091],  # noqa: B006 (read only)
        std: list[float] | None = [0.348, 0.187, 0.085],  # noqa: B006 (read only)
        augmentation: Augmentation | None = FLIPS,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, mean, std, augmentation=augmentation, cache_images=True, **kwargs)
        self.counts: dict[Split, int] = {"train": n_train, "val": n_val, "test": n_test}
        for split, count in self.counts.items():
            if count < 2:
                raise InputError(f"n_{split} is {count}; both classes need an image, so at least 2.")
        self.data_seed = data_seed
        self.painter = FundusPainter(image_size)
        self.class_names = ["healthy", "lesions"]

    def _build(self) -> dict[Split, Source]:
        return {split: PaintedSource(self.painter, self.data_seed, split, n) for split, n in self.counts.items()}


class DrawnSource(Source):
    """A split of drawn images; image `index` depends on (seed, split, index) alone. Subclasses draw it.

    Args:
        seed: seed of all splits.
        split: name of the split.
        labels: (N,) int64, the class of every image.
    """

    has_masks = has_scenes = True

    def __init__(self, seed: int, split: Split, labels: np.ndarray) -> None:
        self.seed, self.stream, self.labels = seed, SPLITS.index(split), labels
        self.names = [f"{split}_{i:05d}" for i in range(len(labels))]

    def generator(self, index: int) -> np.random.Generator:
        """The random numbers of an image."""
        return np.random.default_rng([self.seed, self.stream, index])


class PaintedSource(DrawnSource):
    """A split of `SyntheticFundus`; `load` paints the image."""

    def __init__(self, painter: FundusPainter, seed: int, split: Split, count: int) -> None:
        super().__init__(seed, split, synthetic_labels(seed, SPLITS.index(split), count))
        self.painter = painter
        self.identity = ["synthetic fundus", _VERSION, seed, painter.size]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Source.load`."""
        return self.painter.paint(self.generator(index), bool(self.labels[index]))

    def scene(self, index: int) -> LayeredScene:
        """See `Source.scene`."""
        return self.painter.scene(self.generator(index), bool(self.labels[index]))
