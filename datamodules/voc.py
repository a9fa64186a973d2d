"""Object detection data in the Pascal VOC layout: VOC itself, and any set of images with XML annotations."""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from xml.parsers import expat

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.base import SPLITS, ImageDataModule, OnBadImage, Split, data_root
from datamodules.io.boxes import BoxDataset, BoxTransform, Objects, collate_boxes
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import readable_records
from datamodules.io.transforms import Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import MAX_PIXELS, SUFFIXES, by_stem, oriented_size
from labn.io.readers import path_inside, read_text

PixelBox = tuple[float, float, float, float]

MAX_XML = 2**24
"""Bytes of one annotation."""


@dataclass(frozen=True)
class AnnotatedObject:
    """One object as the file gives it: class name, edges in pixels (x1, y1, x2, y2), and its flag."""

    name: str
    box: PixelBox
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """One XML file: image size in pixels, objects, and what was left out of them, one sentence each."""

    width: int
    height: int
    objects: tuple[AnnotatedObject, ...]
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
        raise MissingFileError(f"Annotation {path} does not exist.")
    root = _parse_xml(path)
    size = int(_number(root, "size/width", str(path))), int(_number(root, "size/height", str(path)))
    if min(size) < 1:
        raise InputError(f"{path}: size is {size[0]} x {size[1]}; width and height must be at least one pixel.")
    objects: list[AnnotatedObject] = []
    notes: list[str] = []
    for place, item in enumerate(root.iter("object"), start=1):
        found, note = _clip_or_drop(
            _parse_object(item, f"{path}, object {place}"), size, on_bad_box, f"{path}, object {place}"
        )
        objects += [found] if found else []
        notes += [note] if note else []
    return Annotation(size[0], size[1], tuple(objects), tuple(notes))


def _parse_xml(path: Path) -> ElementTree.Element:
    """The root element; a document type, with which a few lines become gigabytes or name other files, is refused."""
    if path.stat().st_size > MAX_XML:
        raise InputError(f"{path} is larger than {MAX_XML} bytes; no annotation of one image is.")
    data = path.read_bytes()
    first = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise InputError(
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
        raise InputError(f"{path}, line {line}, column {column}: broken XML ({reason}); repair the file.") from error


def _clip_or_drop(
    found: AnnotatedObject, size: tuple[int, int], on_bad_box: str, where: str
) -> tuple[AnnotatedObject | None, str | None]:
    """The object as it is used (None: not at all), and what there is to say about it."""
    x1, y1, x2, y2 = found.box
    if x2 - x1 <= 1 or y2 - y1 <= 1:  # edges are one pixel further apart than VOC's inclusive coordinates
        return None, f"{where} ({found.name}) has a box without area and is left out."
    width, height = size
    path_inside = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    if path_inside == found.box:
        return found, None
    if on_bad_box == "stop" or path_inside[2] <= path_inside[0] or path_inside[3] <= path_inside[1]:
        raise InputError(
            f"{where} ({found.name}): its box reaches outside the image of {width} x {height} pixels; correct it, or "
            "set on_bad_box: clip for boxes that lie partly inside."
        )
    return replace(found, box=path_inside), f"{where} ({found.name}) reaches outside the image and is clipped."


def _parse_object(item: ElementTree.Element, where: str) -> AnnotatedObject:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{where} has no name; give it the name of a class.")
    x1, y1, x2, y2 = (_number(item, f"bndbox/{field}", where) for field in ("xmin", "ymin", "xmax", "ymax"))
    return AnnotatedObject(name, (x1 - 1, y1 - 1, x2, y2), (item.findtext("difficult") or "0").strip() == "1")


def _number(element: ElementTree.Element, field: str, where: str) -> float:
    text = element.findtext(field)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_PIXELS:
        raise InputError(f"{where}: {field} is {(text or '')[:100]!r}; it must be a number of pixels.")
    return value


DETECTION = Augmentation(vertical_flip=0.0, rotation=0.0, crop_scale=(0.5, 1.0), erasing=0.0)


class VOC(ImageDataModule):
    """`root/{Annotations,ImageSets/Main,JPEGImages}`, images squashed to image_size x image_size.

    Batches carry `boxes`, `labels` and `difficult` as lists with one tensor per image: (n,4) float32 x1, y1, x2, y2 in
    pixels of the resized image, (n,) int64 object classes (no background; 0 is the first of `class_names`), (n,) bool.
    `label` is the class of the image's largest object, -1 where there is none. Difficult objects are left out of
    training; boxes without area are dropped everywhere with a warning.

    Args:
        root: the data set's folder; None takes `$LABN_DATA/<name>`.
        name: folder of the data set in `$LABN_DATA`.
        classes: names of the object classes, in order; None finds them (sorted) in the annotations of all splits.
        image_sets: split -> name of its list in ImageSets/Main, without `.txt`. Validation and test may share images,
            training shares none with them.
        on_bad_box: for a box that reaches outside its image: "stop" raises, "clip" cuts it and reports it.
        min_visibility: training objects of which a crop leaves less than this share are dropped.
        image_size, mean, std, batch_size, num_workers, seed, drop_last, augmentation, on_bad_image, cache_images,
            cache_dir: see `ImageDataModule`.
    """

    positive_classes = ()

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        name: str = "voc",
        classes: list[str] | None = None,
        image_sets: dict[str, str] | None = None,
        on_bad_box: Literal["stop", "clip"] = "stop",
        min_visibility: float = 0.3,
        image_size: int = 300,
        mean: list[float] | None = [0.485, 0.456, 0.406],  # noqa: B006
        std: list[float] | None = [0.229, 0.224, 0.225],  # noqa: B006
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        drop_last: bool = False,
        augmentation: Augmentation | None = DETECTION,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if on_bad_box not in ("stop", "clip"):
            raise InputError(f"on_bad_box is {on_bad_box!r}; it must be 'stop' or 'clip'.")
        super().__init__(
            image_size,
            mean,
            std,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
            cache_images=cache_images,
            cache_dir=cache_dir,
        )
        self._place = (name, root)
        self.image_sets = {split: split for split in SPLITS} | (image_sets or {})
        if unknown := self.image_sets.keys() - set(SPLITS):
            raise InputError(f"image_sets has the split {unknown.pop()!r}; splits are {', '.join(SPLITS)}.")
        self.on_bad_box, self.min_visibility = on_bad_box, min_visibility
        self._classes = classes

    @cached_property
    def root(self) -> Path:
        """The data set's folder.

        Raises:
            FileNotFoundError: it does not exist.
        """
        return data_root(*self._place)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Object classes: as given, else all names in the annotations, sorted."""
        if self._classes is not None:
            return self._classes
        found = {o.name for file in self._annotations.values() for o in file.objects}
        if not found:
            raise InputError(f"No annotation of {self.root} names an object; a detector needs at least one class.")
        return sorted(found)

    @cached_property
    def _lists(self) -> dict[Split, list[str]]:
        lists = {split: self._list(self.image_sets[split]) for split in SPLITS}
        training = set(lists["train"])
        for split in ("val", "test"):
            if shared := [name for name in lists[split] if name in training]:
                raise InputError(
                    f"image_sets: train ({self.image_sets['train']}.txt) and {split} ({self.image_sets[split]}.txt) of "
                    f"{self.root / 'ImageSets' / 'Main'} both list {shared[0]!r} ({len(shared)} such images); give "
                    "lists that share none."
                )
        return lists

    def _list(self, name: str) -> list[str]:
        path = self.root / "ImageSets" / "Main" / f"{name}.txt"
        if not path.is_file():
            raise MissingFileError(f"Image list {path} does not exist; set image_sets to lists that do.")
        lines = [(n, text.split()[0]) for n, text in enumerate(read_text(path).splitlines(), start=1) if text.strip()]
        if not lines:
            raise InputError(f"Image list {path} is empty; every split needs an image.")
        seen: dict[str, int] = {}
        for number, word in lines:
            path_inside(self.root / "Annotations", f"{word}.xml", f"{path}, line {number}")
            if word in seen:
                raise InputError(
                    f"{path}, line {number}: {word!r} stands in line {seen[word]} already; every image needs exactly "
                    "one line."
                )
            seen[word] = number
        return list(seen)

    @cached_property
    def _annotations(self) -> dict[str, Annotation]:
        names = dict.fromkeys(name for split in SPLITS for name in self._lists[split])
        return {n: read_annotation(self.root / "Annotations" / f"{n}.xml", self.on_bad_box) for n in names}

    @cached_property
    def _objects(self) -> dict[str, Objects]:
        return {name: self._numbered(name, file) for name, file in self._annotations.items()}

    def _numbered(self, name: str, file: Annotation) -> Objects:
        for place, found in enumerate(file.objects, start=1):
            if found.name not in self.class_names:
                raise InputError(
                    f"{self.root / 'Annotations' / name}.xml, object {place}: class {found.name!r} is not one of "
                    f"{', '.join(self.class_names)}; add it to `classes`, or leave `classes` out."
                )
        scale = np.array([file.width, file.height] * 2, dtype=np.float64)
        boxes = np.array([o.box for o in file.objects], dtype=np.float64).reshape(-1, 4) / scale
        labels = np.array([self.class_names.index(o.name) for o in file.objects], dtype=np.int64)
        return Objects(boxes, labels, np.array([o.difficult for o in file.objects], dtype=bool))

    def _build(self) -> dict[Split, Source]:
        self._notes = [note for file in self._annotations.values() for note in file.notes]
        for note in self._notes:
            rank_zero_warn(note)
        files = (p for p in sorted((self.root / "JPEGImages").glob("*")) if p.suffix.lower() in SUFFIXES)
        images = by_stem(p for p in files if p.stem in self._annotations)
        sources: dict[Split, Source] = {}
        for split in SPLITS:
            records = [self._record(name, images) for name in self._lists[split]]
            good, notes = readable_records(records, self.on_bad_image, [self.root])
            self._notes += notes
            for record in good:
                self._check_size(record)
            sources[split] = VOCSource(good, self.image_size, [self._objects[r.name] for r in good])
        return sources

    def _record(self, name: str, images: dict[str, Any]) -> Record:
        if name not in images:
            raise MissingFileError(f"Image {self.root / 'JPEGImages' / name}.jpg of the image lists does not exist.")
        return Record(name, largest_class(self._objects[name]), images[name])

    def _check_size(self, record: Record) -> None:
        """Boxes are scaled by the annotation's size, so an image of another size would get them in wrong places."""
        file, found = self._annotations[record.name], oriented_size(record.path)
        if found != (file.width, file.height):
            raise InputError(
                f"Annotation {self.root / 'Annotations' / record.name}.xml is of {file.width} x {file.height} pixels, "
                f"but image {record.path} has {found[0]} x {found[1]} (as its EXIF orientation turns it); make them "
                "agree."
            )

    def objects(self, split: Split) -> list[Objects]:
        """The objects of every sample of a split, in order."""
        return [self._objects[name] for name in self.source(split).names]

    def dataset(self, split: Split, augment: bool = False) -> BoxDataset:
        """The split as a dataset of single samples, augmented and without difficult objects only on request."""
        chosen = self.augmentation if augment else None
        transform = BoxTransform(self.image_size, self.mean, self.std, chosen, self.min_visibility)
        return BoxDataset(self.source(split), self.objects(split), transform, self.seed, drop_difficult=augment)

    collate = staticmethod(collate_boxes)

    def _counts(self, split: Split) -> str:
        counts = Counter(int(label) for o in self.objects(split) for label in o.labels)
        per_class = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(self.class_names))
        return f"  {split}: {len(self.source(split))} images ({per_class}), data hash {self.fingerprint(split)}"


class VOCSource(FileSource):
    """Image files whose data hash depends on their objects too."""

    def __init__(self, records: list[Record], size: int, objects: list[Objects]) -> None:
        super().__init__(records, size)
        self._objects = objects

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """Files, settings and objects."""
        objects = [(o.boxes.tolist(), o.labels.tolist(), o.difficult.tolist()) for o in self._objects]
        return [*super().identity, "boxes", *objects]


def largest_class(objects: Objects) -> int:
    """Class of the object with the largest area, -1 where there is none."""
    if not len(objects):
        return -1
    x1, y1, x2, y2 = objects.boxes.T
    return int(objects.labels[np.argmax((x2 - x1) * (y2 - y1))])
