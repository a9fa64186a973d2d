"""Pascal VOC annotation files (Everingham et al., IJCV 2010): one XML file per image."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path
from xml.parsers import expat

from datamodules.files import MAX_PIXELS

Pixels = tuple[float, float, float, float]
MAX_XML = 2**24
"""Bytes of one annotation."""


@dataclass(frozen=True)
class Annotated:
    """One object as the file gives it: class name, edges in pixels (x1, y1, x2, y2), and its flag."""

    name: str
    box: Pixels
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """One XML file: image size in pixels, objects, and what was left out of them, one sentence each."""

    width: int
    height: int
    objects: tuple[Annotated, ...]
    notes: tuple[str, ...]


def read_annotation(path: Path, on_bad_box: str = "stop") -> Annotation:
    """Read one annotation.

    VOC counts pixels from 1 and includes the last one, so x1 = xmin - 1 and x2 = xmax as edges. An object without area
    (xmax <= xmin or ymax <= ymin) is left out with a note.

    Args:
        path: the XML file.
        on_bad_box: for a box that leaves the image: `stop` raises, `clip` cuts it and notes it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken XML or a document type (the message has file and line), a missing or non-numeric field, or a
            box outside.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Annotation {path} does not exist.")
    root = _parsed(path)
    size = int(_number(root, "size/width", str(path))), int(_number(root, "size/height", str(path)))
    if min(size) < 1:
        raise ValueError(f"{path}: size is {size[0]} x {size[1]}; width and height must be at least one pixel.")
    objects: list[Annotated] = []
    notes: list[str] = []
    for place, item in enumerate(root.iter("object"), start=1):
        found, note = _checked(_object(item, f"{path}, object {place}"), size, on_bad_box, f"{path}, object {place}")
        objects += [found] if found else []
        notes += [note] if note else []
    return Annotation(size[0], size[1], tuple(objects), tuple(notes))


def _parsed(path: Path) -> ElementTree.Element:
    """The root element; a document type, with which a few lines become gigabytes or name other files, is refused."""
    if path.stat().st_size > MAX_XML:
        raise ValueError(f"{path} is larger than {MAX_XML} bytes; no annotation of one image is.")
    data = path.read_bytes()
    first = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise ValueError(
            f"{path}, line {first.CurrentLineNumber}: it declares a document type (DOCTYPE), which annotations do not "
            "need and this project does not read; remove it."
        )

    first.StartDoctypeDeclHandler = refuse
    try:
        first.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError) as error:
        line, column = (error.lineno, error.offset) if isinstance(error, expat.ExpatError) else error.position
        reason = str(error).split(":")[0]
        raise ValueError(f"{path}, line {line}, column {column}: broken XML ({reason}); repair the file.") from error


def _checked(
    found: Annotated, size: tuple[int, int], on_bad_box: str, where: str
) -> tuple[Annotated | None, str | None]:
    """The object as it is used (None: not at all), and what there is to say about it."""
    x1, y1, x2, y2 = found.box
    if x2 - x1 <= 1 or y2 - y1 <= 1:  # edges are one pixel further apart than VOC's inclusive coordinates
        return None, f"{where} ({found.name}) has a box without area and is left out."
    width, height = size
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    if inside == found.box:
        return found, None
    if on_bad_box == "stop" or inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise ValueError(
            f"{where} ({found.name}): its box reaches outside the image of {width} x {height} pixels; correct it, or "
            "set on_bad_box: clip for boxes that lie partly inside."
        )
    return replace(found, box=inside), f"{where} ({found.name}) reaches outside the image and is clipped."


def _object(item: ElementTree.Element, where: str) -> Annotated:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{where} has no name; give it the name of a class.")
    x1, y1, x2, y2 = (_number(item, f"bndbox/{field}", where) for field in ("xmin", "ymin", "xmax", "ymax"))
    return Annotated(name, (x1 - 1, y1 - 1, x2, y2), (item.findtext("difficult") or "0").strip() == "1")


def _number(element: ElementTree.Element, field: str, where: str) -> float:
    text = element.findtext(field)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_PIXELS:
        raise ValueError(f"{where}: {field} is {(text or '')[:100]!r}; it must be a number of pixels.")
    return value
