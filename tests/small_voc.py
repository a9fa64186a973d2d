"""A data set of a few images in the Pascal VOC layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

Box = tuple[str, tuple[float, float, float, float]]
SPLITS = {"train": ["a", "b", "c"], "val": ["d"], "test": ["e"]}
OBJECTS: dict[str, list[Box]] = {
    "a": [("cat", (11, 6, 30, 25)), ("dog", (41, 1, 60, 40))],
    "b": [("dog", (1, 1, 60, 40))],
    "c": [],
    "d": [("cat", (1, 1, 30, 20))],
    "e": [("dog", (31, 21, 60, 40)), ("cat", (5, 5, 5, 5))],
}


def xml(objects: list[Box], size: tuple[int, int] = (60, 40), difficult: int = 0) -> str:
    entries = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>\n"
        for name, (x1, y1, x2, y2) in objects
    )
    return (
        f"<annotation>\n<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n"
        f"{entries}</annotation>\n"
    )


def annotation(root: Path, name: str) -> Path:
    return root / "Annotations" / f"{name}.xml"


def write_voc(root: Path) -> Path:
    """Five images of 60 x 40 pixels with two classes; one box has no area."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split, names in SPLITS.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for seed, (name, objects) in enumerate(OBJECTS.items()):
        image = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        assert cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image)
        annotation(root, name).write_text(xml(objects))
    return root
