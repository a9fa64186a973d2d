"""Records of the gallery: per sample a small picture, its mask, every map in 8-bit levels, and the player's steps."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from labn.errors import InputError
from labn.postprocess.overlay import color_scale
from labn.results.reader import Card

Array = np.ndarray[Any, Any]

LEVELS = 254
"""Highest level of a stored map; an even number, so that level 127 is exactly 0 on a symmetric scale."""
PNG_LIMIT = 3000
"""Maximum bytes of a losslessly stored map; larger ones, which are noisy, are stored as JPEG."""


@dataclass(frozen=True)
class Picture:
    """One explained sample.

    Attributes:
        index: position in the split.
        name: name in the tables.
        label: true class.
        prediction: class with the highest probability.
        target: explained class.
        probability: probability of the label, in [0, 1].
        confidence: probability of the prediction, in [0, 1].
        image: (H, W, 3) or (H, W) in [0, 1].
        mask: (H, W) bool ground truth, or None.
        boxes: (n, 4) x1, y1, x2, y2 in pixels, or None.
    """

    index: int
    name: str
    label: int
    prediction: int
    target: int
    probability: float
    confidence: float
    image: Array
    mask: Array | None = None
    boxes: Array | None = None


def data_uri(kind: str, data: bytes) -> str:
    """The bytes of an image file as a URI `data:image/<kind>;base64,...`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shrink(array: Array, side: int) -> Array:
    """Reduce (H, W, ...) to a longer side of at most `side` pixels by averaging areas; smaller arrays are unchanged."""
    height, width = array.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return array
    return cv2.resize(
        array, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )


def picture_uri(image: Array, side: int, quality: int = 80) -> str:
    """A picture (H, W, 3) or (H, W) in [0, 1] as the data URI of a JPEG with at most `side` pixels per side."""
    small = (shrink(image.astype(np.float32), side).clip(0, 1) * 255).round().astype(np.uint8)
    # OpenCV encodes channels in the order blue, green, red.
    return data_uri("jpeg", _encode(".jpg", small[..., ::-1] if small.ndim == 3 else small, quality))


def fill_uri(image: Array, side: int) -> str:
    """The fill of removed pixels, (H, W, 3) or (H, W) in [0, 1], as a data URI; a single pixel is stored losslessly."""
    if image.shape[:2] != (1, 1):
        return picture_uri(image, side)
    pixel = (image * 255).round().astype(np.uint8)
    return data_uri("png", _encode(".png", pixel[..., ::-1] if pixel.ndim == 3 else pixel))


def mask_uri(mask: Array, side: int) -> str:
    """A mask (H, W) bool as the data URI of a PNG; a pixel is set if at least half of its area is."""
    # A mask so thin that no pixel is half covered keeps its most covered pixels instead of vanishing.
    small = shrink(mask.astype(np.float32), side)
    return data_uri("png", _encode(".png", ((small >= min(0.5, small.max())) * (small > 0) * 255).astype(np.uint8)))


def map_entry(heat: Array, side: int) -> dict[str, Any]:
    """A map (H, W) as an image of levels v in 0..254, which stand for the values low + (high - low) v / 254.

    The limits are those of the reduced map, in its own units: for a signed map symmetric around 0 and without outliers
    (`labn.postprocess.overlay.color_scale`). Values beyond the limits are clipped.
    """
    small = shrink(heat.astype(np.float32), side)
    low, high, colors = color_scale(small)
    levels = ((small - low) / (high - low) * LEVELS).round().clip(0, LEVELS).astype(np.uint8)
    data, kind = _encode(".png", levels), "png"
    if len(data) > PNG_LIMIT:
        data, kind = _encode(".jpg", levels, 70), "jpeg"
    return {"data": data_uri(kind, data), "low": low, "high": high, "signed": low < 0, "colors": colors}


def steps_text(steps: Array) -> str:
    """The step at which each patch moves, (rows, columns), as base64 of little-endian 16-bit integers."""
    return base64.b64encode(np.ascontiguousarray(steps, dtype="<u2").tobytes()).decode()


def make_card(picture: Picture, maps: Mapping[str, Array], *, picture_side: int = 160, map_side: int = 96) -> Card:
    """The gallery's record of one sample, in JSON-compatible types.

    Args:
        picture: the sample.
        maps: explainer -> (H, W) map, not normalised.
        picture_side: longer side of the picture in pixels.
        map_side: longer side of the maps in pixels.
    """
    height, width = picture.image.shape[:2]
    boxes = np.zeros((0, 4)) if picture.boxes is None else np.asarray(picture.boxes, dtype=float).reshape(-1, 4)
    # An empty mask would be drawn as nothing; None saves its bytes.
    mask = picture.mask if picture.mask is not None and picture.mask.any() else None
    return {
        "index": picture.index,
        "name": picture.name,
        "label": picture.label,
        "prediction": picture.prediction,
        "target": picture.target,
        "probability": picture.probability,
        "confidence": picture.confidence,
        "picture": picture_uri(picture.image, picture_side),
        "mask": None if mask is None else mask_uri(mask, picture_side),
        # Relative to the image, because the picture on the page has another size.
        "boxes": (boxes / [width, height, width, height]).round(4).tolist(),
        "maps": {name: map_entry(heat, map_side) for name, heat in maps.items()},
    }


def _encode(suffix: str, array: Array, quality: int | None = None) -> bytes:
    options = [] if quality is None else [cv2.IMWRITE_JPEG_QUALITY, quality]
    ok, data = cv2.imencode(suffix, array, options)
    if not ok:
        raise InputError(f"an array {array.shape} {array.dtype} cannot be encoded as {suffix}.")
    return data.tobytes()
