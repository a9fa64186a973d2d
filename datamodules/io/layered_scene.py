"""Images as layers that are painted one over the other, each of which can be left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer(ABC):
    """An object of a scene.

    Attributes:
        name: name of the object.
    """

    name: str

    @abstractmethod
    def opacity(self, size: int) -> Array:
        """Share (S, S) in [0, 1] of each pixel that shows this object and not what lies below it."""

    @abstractmethod
    def paint(self, image: Array) -> None:
        """Paint the object over an image (S, S, 3) float32, in place."""


@dataclass(frozen=True)
class BlendedLayer(Layer):
    """An object of one colour with soft edges: pixels become alpha * colour + (1 - alpha) * pixels.

    Attributes:
        name: name of the object.
        alpha: (S, S) opacity in [0, 1].
        colour: (3,) in [0, 1].
    """

    alpha: Array
    colour: Array

    def opacity(self, size: int) -> Array:
        """See `Layer.opacity`."""
        return self.alpha

    def paint(self, image: Array) -> None:
        """See `Layer.paint`."""
        image += self.alpha[..., None] * (self.colour - image)


@dataclass(frozen=True)
class PixelLayer(Layer):
    """An object whose pixels hide everything below them.

    Attributes:
        name: name of the object.
        pieces: (rows, columns, colours) of the parts, painted in this order; colours are (n, 3).
    """

    pieces: tuple[tuple[Array, Array, Array], ...]

    def opacity(self, size: int) -> Array:
        """See `Layer.opacity`."""
        alpha = np.zeros((size, size))
        for rows, columns, _ in self.pieces:
            alpha[rows, columns] = 1.0
        return alpha

    def paint(self, image: Array) -> None:
        """See `Layer.paint`."""
        for rows, columns, colours in self.pieces:
            image[rows, columns] = colours


@dataclass(frozen=True)
class LayeredScene:
    """An image as background, layers, light and noise; all random numbers are drawn before the first painting.

    Attributes:
        background: (S, S, 3) float32.
        layers: the objects, the lowest first.
        light: (S, S), what the painted image is multiplied by; 0 where nothing is seen.
        noise: (S, S, 3), added at the end.

    Example:
        >>> blank, dot = np.zeros((2, 2, 3), np.float32), np.array([[1.0, 0.0], [0.0, 0.0]])
        >>> layers = (BlendedLayer("dot", dot, np.ones(3)),)
        >>> scene = LayeredScene(blank, layers, np.ones((2, 2)), np.zeros((2, 2, 3)))
        >>> scene.draw()[0, 0].tolist(), scene.draw(np.array([False]))[0, 0].tolist(), scene.masks().sum()
        ([255, 255, 255], [0, 0, 0], np.int64(1))
    """

    background: Array
    layers: tuple[Layer, ...]
    light: Array
    noise: Array

    def draw(self, kept: Array | None = None) -> Array:
        """The image (S, S, 3) uint8 with the objects `kept` (O,) bool; None draws all."""
        image = self.background.copy()
        for number, layer in enumerate(self.layers):
            if kept is None or kept[number]:
                layer.paint(image)
        image *= self.light[..., None]
        image += self.noise
        return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)

    def masks(self) -> Array:
        """Pixels (O, S, S) bool of every object: where it is seen with at least half of its greatest opacity.

        A pixel belongs to at most one object, to the one that contributes most to it. An object that others cover has
        no pixel.
        """
        size = len(self.background)
        opacities = np.stack([layer.opacity(size) for layer in self.layers])
        # What lies above hides a layer; the product starts with the field of view.
        above = np.cumprod(np.concatenate([(self.light > 0)[None], 1 - opacities[:0:-1]]), 0)[::-1]
        seen = opacities * above
        highest = np.arange(len(seen))[:, None, None] == seen.argmax(0)
        return highest & (seen > 0) & (seen >= 0.5 * opacities.max((1, 2), keepdims=True))
