"""Object detection data in the Pascal VOC layout: VOC itself, or any set of images with XML annotations."""

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

from datamodules.base import ImageDataModule, data_root
from datamodules.io.boxes import BoxDataset, BoxTransform, Objects, collate_boxes
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import SPLITS, Split, readable_records
from datamodules.io.transforms import Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import MAX_PIXELS, SUFFIXES, by_stem, oriented_size
from labn.io.readers import path_inside, read_text

PixelBox = tuple[float, float, float, float]

MAX_XML = 2**24
"""Largest size of an annotation file in bytes."""


@dataclass(frozen=True)
class AnnotatedObject:
    """One object of an annotation file.

    Attributes:
        name: name of the class.
        box: edges x1, y1, x2, y2 in pixels.
        difficult: whether the file marks the object as difficult to recognise.
    """

    name: str
    box: PixelBox
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """The content of one annotation file.

    Attributes:
        width: width of the image in pixels.
        height: height of the image in pixels.
        objects: objects that are used.
        notes: one sentence for each object that was clipped or left out.
    """

    width: int
    height: int
    objects: tuple[AnnotatedObject, ...]
    notes: tuple[str, ...]


def read_annotation(path: Path, on_bad_box: str = "stop") -> Annotation:
    """Read an annotation file.

    VOC counts pixels from 1 and includes the last one, so the edges are x1 = xmin - 1 and x2 = xmax. An object without
    area (xmax <= xmin or ymax <= ymin) is left out with a note.

    Args:
        path: the XML file.
        on_bad_box: `stop` raises for a box that reaches outside the image, `clip` clips it with a note.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the XML is broken or declares a document type (the message has file and line), a field is missing or
            not a number, or a box reaches outside the image.

    Example:
        >>> import tempfile
        >>> text = '''<annotation><size><width>20</width><height>10</height></size><object><name>cat</name>
        ... <bndbox><xmin>1</xmin><ymin>3</ymin><xmax>8</xmax><ymax>10</ymax></bndbox></object></annotation>'''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "1.xml"
        ...     _ = path.write_text(text)
        ...     annotation = read_annotation(path)
        >>> annotation.objects[0].box
        (0.0, 2.0, 8.0, 10.0)
    """
    if not path.is_file():
        raise MissingFileError(f"Annotation {path} does not exist.")
    root = _parse_xml(path)
    size = int(_number(root, "size/width", str(path))), int(_number(root, "size/height", str(path)))
    if min(size) < 1:
        raise InputError(f"{path}: size is {size[0]} x {size[1]}; width and height must be at least one pixel.")
    objects: list[AnnotatedObject] = []
    notes: list[str] = []
    for number, element in enumerate(root.iter("object"), start=1):
        where = f"{path}, object {number}"
        used, note = _clip_or_drop(_parse_object(element, where), size, on_bad_box, where)
        objects += [used] if used else []
        notes += [note] if note else []
    return Annotation(size[0], size[1], tuple(objects), tuple(notes))


def _parse_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file without a document type.

    A document type could expand a few lines to gigabytes, or include other files; the first pass raises for it.
    """
    if path.stat().st_size > MAX_XML:
        raise InputError(f"{path} is larger than {MAX_XML} bytes; an annotation file must be smaller.")
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
    item: AnnotatedObject, size: tuple[int, int], on_bad_box: str, where: str
) -> tuple[AnnotatedObject | None, str | None]:
    """The object with its box clipped to the image, or None if it has no area; and a note about the change."""
    x1, y1, x2, y2 = item.box
    if x2 - x1 <= 1 or y2 - y1 <= 1:  # edges are one pixel further apart than VOC's inclusive coordinates
        return None, f"{where} ({item.name}) has a box without area and is left out."
    width, height = size
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    if clipped == item.box:
        return item, None
    if on_bad_box == "stop" or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise InputError(
            f"{where} ({item.name}): its box reaches outside the image of {width} x {height} pixels; correct it, or "
            "set on_bad_box: clip for boxes that lie partly inside."
        )
    return replace(item, box=clipped), f"{where} ({item.name}) reaches outside the image and is clipped."


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
    """Images with boxed objects in `root/{Annotations,ImageSets/Main,JPEGImages}`, squashed to squares.

    Batches carry `boxes`, `labels` and `difficult` as lists with one tensor per image: (n,4) float32 x1, y1, x2, y2 in
    pixels of the resized image, (n,) int64 object classes (0 is the first of `class_names`; there is no background
    class), and (n,) bool. `label` is the class of the image's largest object, or -1 for an image without objects.
    Difficult objects are left out of training; boxes without area are dropped in every split, with a warning.

    Args:
        root: the data set's folder, or a folder above it that holds no other; None takes `$LABN_DATA/<name>`.
        name: folder of the data set in `$LABN_DATA`.
        classes: names of the object classes, in the order of their labels; None takes all names in the annotations of
            all splits, sorted.
        image_sets: split -> name of its list in ImageSets/Main, without `.txt`. Validation and test may share images;
            training must not share images with them.
        on_bad_box: "stop" raises for a box that reaches outside its image, "clip" clips it and lists it in `report()`.
        min_visibility: training objects are dropped where a crop leaves less than this share of their area.
        image_size: side in pixels; SSD300 needs 300.
        mean: mean of each channel for values in [0,1]; ImageNet's by default.
        std: standard deviation of each channel for values in [0,1]; ImageNet's by default.
        augmentation: augmentation of the training split; by default horizontal flips, crops of at least half of the
            image, and colour jitter.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: a folder, list, annotation or image is missing (raised when the data is first used).
        InputError: an argument is wrong (at once); or, when the data is first used, lists overlap or name an image
            twice, an annotation is broken, its size is not that of the image, or a class is not in `classes`.

    Example:
        >>> import tempfile, cv2
        >>> object_ = "<object><name>cat</name><bndbox>{}</bndbox></object>"
        >>> edges = "<xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>5</ymax>"
        >>> size = "<size><width>20</width><height>10</height></size>"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        ...         (Path(folder) / name).mkdir(parents=True)
        ...     for split in ("train", "val", "test"):
        ...         _ = Path(f"{folder}/ImageSets/Main/{split}.txt").write_text(f"{split}_1")
        ...         annotation = f"<annotation>{size}{object_.format(edges)}</annotation>"
        ...         _ = Path(f"{folder}/Annotations/{split}_1.xml").write_text(annotation)
        ...         _ = cv2.imwrite(f"{folder}/JPEGImages/{split}_1.png", np.zeros((10, 20, 3), np.uint8))
        ...     data = VOC(folder, image_size=40)
        ...     sample = data.dataset("test")[0]
        >>> data.class_names, sample["labels"].tolist(), sample["boxes"].tolist()
        (['cat'], [0], [[0.0, 0.0, 20.0, 20.0]])
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
        augmentation: Augmentation | None = DETECTION,
        **kwargs: Any,
    ) -> None:
        if on_bad_box not in ("stop", "clip"):
            raise InputError(f"on_bad_box is {on_bad_box!r}; it must be 'stop' or 'clip'.")
        # Classes of images with several objects cannot be balanced, so `balanced_sampler` is not offered.
        super().__init__(image_size, mean, std, augmentation=augmentation, balanced_sampler=False, **kwargs)
        self._root_arguments = (name, root)
        self.image_sets = {split: split for split in SPLITS} | (image_sets or {})
        if unknown := self.image_sets.keys() - set(SPLITS):
            raise InputError(f"image_sets has the split {unknown.pop()!r}; splits are {', '.join(SPLITS)}.")
        self.on_bad_box, self.min_visibility = on_bad_box, min_visibility
        self._classes = classes

    @cached_property
    def root(self) -> Path:
        """The data set's folder: the argument, or the only folder in VOC's layout up to two levels below it.

        Raises:
            MissingFileError: the folder does not exist, or holds no folder or several folders in VOC's layout.
        """
        return find_voc_root(data_root(*self._root_arguments))

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Object classes: the argument `classes`, or all names in the annotations, sorted."""
        if self._classes is not None:
            return self._classes
        names = {o.name for file in self._annotations.values() for o in file.objects}
        if not names:
            raise InputError(f"No annotation of {self.root} names an object; a detector needs at least one class.")
        return sorted(names)

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
        folder = self.root / "ImageSets" / "Main"
        path = folder / f"{name}.txt"
        if not folder.is_dir():
            raise MissingFileError(
                f"{self.root} has no folder ImageSets/Main; put train.txt, val.txt and test.txt there, with the name "
                "of one image (without suffix) per line."
            )
        if not path.is_file():
            has = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))[:20]) or "no list"
            raise MissingFileError(f"Image list {path} does not exist; set image_sets to lists that do ({has}).")
        lines = [(n, text.split()[0]) for n, text in enumerate(read_text(path).splitlines(), start=1) if text.strip()]
        if not lines:
            raise InputError(f"Image list {path} is empty; every split needs an image.")
        line_of: dict[str, int] = {}
        for number, word in lines:
            path_inside(self.root / "Annotations", f"{word}.xml", f"{path}, line {number}", self.strict_links)
            if word in line_of:
                raise InputError(
                    f"{path}, line {number}: {word!r} is already in line {line_of[word]}; every image needs exactly "
                    "one line."
                )
            line_of[word] = number
        return list(line_of)

    @cached_property
    def _annotations(self) -> dict[str, Annotation]:
        names = dict.fromkeys(name for split in SPLITS for name in self._lists[split])
        return {n: read_annotation(self.root / "Annotations" / f"{n}.xml", self.on_bad_box) for n in names}

    @cached_property
    def _objects(self) -> dict[str, Objects]:
        return {name: self._numbered(name, file) for name, file in self._annotations.items()}

    def _numbered(self, name: str, file: Annotation) -> Objects:
        for number, item in enumerate(file.objects, start=1):
            if item.name not in self.class_names:
                raise InputError(
                    f"{self.root / 'Annotations' / name}.xml, object {number}: class {item.name!r} is not one of "
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
            good, notes = readable_records(records, self.on_bad_image, [self.root], strict_links=self.strict_links)
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
        """Compare the image's size with that of its annotation, which the boxes are scaled by."""
        file, size = self._annotations[record.name], oriented_size(record.path)
        if size != (file.width, file.height):
            raise InputError(
                f"Annotation {self.root / 'Annotations' / record.name}.xml is of {file.width} x {file.height} pixels, "
                f"but image {record.path} has {size[0]} x {size[1]} (with its EXIF orientation applied); make them "
                "agree."
            )

    def objects(self, split: Split) -> list[Objects]:
        """The objects of every sample of a split, in order."""
        return [self._objects[name] for name in self.source(split).names]

    def dataset(self, split: Split, augment: bool = False) -> BoxDataset:
        """The split as a dataset of single samples; `augment` also leaves difficult objects out."""
        chosen = self.augmentation if augment else None
        transform = BoxTransform(self.image_size, self.mean, self.std, chosen, self.min_visibility)
        return BoxDataset(self.source(split), self.objects(split), transform, self.seed, drop_difficult=augment)

    collate = staticmethod(collate_boxes)

    def _class_counts(self, split: Split) -> list[int]:
        """Number of objects of every class in a split."""
        counts = Counter(int(label) for o in self.objects(split) for label in o.labels)
        return [counts[label] for label in range(self.num_classes)]

    def _counts(self, split: Split) -> str:
        per_class = ", ".join(f"{name} {n}" for name, n in zip(self.class_names, self._class_counts(split)))
        return f"  {split}: {len(self.source(split))} images ({per_class}), data hash {self.fingerprint(split)}"


def find_voc_root(folder: Path) -> Path:
    """`folder`, or the only folder with `Annotations` and `JPEGImages` up to two levels below it.

    The official archive unpacks to `VOCdevkit/VOC2012`, so that the folder above is often given.

    Raises:
        MissingFileError: there is no such folder, or several of them.
    """
    layouts = [p for p in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))) if _is_voc(p)]
    if layouts[:1] == [folder] or len(layouts) == 1:
        return layouts[0]
    if layouts:
        names = ", ".join(str(path.relative_to(folder)) for path in layouts)
        raise MissingFileError(f"{folder} holds several folders in VOC's layout ({names}); set `root` to one of them.")
    missing = [name for name in ("Annotations", "ImageSets/Main", "JPEGImages") if not (folder / name).is_dir()]
    raise MissingFileError(f"{folder} has no folder {' and no folder '.join(missing)}; `root` must hold VOC's layout.")


def _is_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


class VOCSource(FileSource):
    """Image files whose data hash includes their objects; the label of an image without any is -1."""

    least_label = -1

    def __init__(self, records: list[Record], size: int, objects: list[Objects]) -> None:
        super().__init__(records, size)
        self._objects = objects

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """The identity of the files and settings, followed by all objects."""
        objects = [(o.boxes.tolist(), o.labels.tolist(), o.difficult.tolist()) for o in self._objects]
        return [*super().identity, "boxes", *objects]


def largest_class(objects: Objects) -> int:
    """Class of the object with the largest area; -1 without any object."""
    if not len(objects):
        return -1
    x1, y1, x2, y2 = objects.boxes.T
    return int(objects.labels[np.argmax((x2 - x1) * (y2 - y1))])
