"""IDRiD, the Indian Diabetic Retinopathy Image Dataset (Porwal et al., Data 2018), in its published layout."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.base import ImageDataModule, data_root
from datamodules.io.image_checks import image_error
from datamodules.io.photo_matching import cached_matches
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import Split, readable_records, split_off, without_copies
from datamodules.io.statistics import default_cache_dir
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import by_stem, check_crop, image_files
from labn.io.readers import path_inside, read_table

_GRADING, _SEGMENTATION = "B. Disease Grading", "A. Segmentation"
_IMAGES, _TRUTHS = "1. Original Images", "2. All Segmentation Groundtruths"
_FOLDERS = {"train": "a. Training Set", "test": "b. Testing Set"}
_CSVS = {
    "train": "a. IDRiD_Disease Grading_Training Labels.csv",
    "test": "b. IDRiD_Disease Grading_Testing Labels.csv",
}
# Without "5. Optic Disc", which is not a lesion: every healthy eye has one.
_LESIONS = ("1. Microaneurysms", "2. Haemorrhages", "3. Hard Exudates", "4. Soft Exudates")
_GRADES = ["no retinopathy", "mild", "moderate", "severe", "proliferative"]


def read_grades(path: Path) -> dict[str, int]:
    """Image name -> grade (0 to 4), from one of the data set's label files.

    The published files have empty trailing columns and rows, and spaces behind column names; all are ignored.

    Raises:
        MissingFileError: the file does not exist.
        InputError: a column is missing, a name has two rows, or a grade is not an integer from 0 to 4.
    """
    if not path.is_file():
        raise MissingFileError(f"Label file {path} does not exist.")
    grades: dict[str, int] = {}
    for line in read_table(path, ("Image name", "Retinopathy grade")):
        _add_grade(grades, line["Image name"], line["Retinopathy grade"], line.where)
    return grades


def _add_grade(grades: dict[str, int], name: str, grade: str, where: str) -> None:
    if name in grades:
        raise InputError(f"{where}: image {name!r} already has a row; every image needs exactly one.")
    if grade not in {"0", "1", "2", "3", "4"}:
        raise InputError(f"{where}: retinopathy grade {grade!r} of image {name!r} must be an integer from 0 to 4.")
    grades[name] = int(grade)


def pair_with_grades(images: list[Path], grades: dict[str, int], csv_path: Path) -> list[tuple[Path, int]]:
    """Pair every image file with its grade, sorted by file name.

    Raises:
        InputError: a row has no image, an image has no row, or two images share a name; the message names it.
    """
    by_name = by_stem(images)
    folder = images[0].parent if images else "the image folder"
    if missing := [name for name in grades if name not in by_name]:
        raise InputError(
            f"{csv_path} has a row for {missing[0]!r}, but {folder} has no such image ({len(missing)} such rows)."
        )
    if unlabelled := [path for path in images if path.stem not in grades]:
        raise InputError(f"Image {unlabelled[0]} has no row in {csv_path} ({len(unlabelled)} such images).")
    return [(by_name[name], grades[name]) for name in sorted(by_name)]


@dataclass(frozen=True)
class LesionMasks:
    """Lesion masks of the segmentation data by the grading image of the same photograph.

    Attributes:
        files: (grading folder, image name) -> mask files; of two segmentation images of one photograph both sets.
        notes: how segmentation and grading images were matched, for `IDRiD.report`.
    """

    files: dict[tuple[str, str], tuple[Path, ...]]
    notes: tuple[str, ...] = ()


Pair = tuple[tuple[str, str], tuple[str, str]]
"""(segmentation folder, image name) and (grading folder, image name) of one photograph."""


def lesion_masks(root: Path, cache_dir: Path | None = None, strict_links: bool = True) -> LesionMasks:
    """Find the lesion masks of the grading images, which have other numbers than the segmentation images.

    `segmentation_to_grading.csv` says which images are the same photograph. Without that table, which is not part of
    the official archives, the pictures are compared.

    Args:
        root: the data set's folder.
        cache_dir: folder that keeps the result of the comparison.
        strict_links: whether links may not lead out of `root`.
    """
    table, truths = root / "segmentation_to_grading.csv", root / _SEGMENTATION / _TRUTHS
    notes: list[str] = []
    if table.is_file():
        pairs = _read_pairs(table, truths, strict_links)
    elif truths.is_dir():
        pairs, notes = segmentation_pairs(root, default_cache_dir() if cache_dir is None else cache_dir)
    else:
        return LesionMasks({})
    masks: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for (folder, image), grading in pairs:
        folders = [truths / folder / kind for kind in _LESIONS]
        files = [file for kind in folders if kind.is_dir() for file in kind.iterdir()]
        # A comparison and no pattern: the table is a stranger's, and its name may be a path.
        masks[grading] += sorted(file for file in files if file.name.startswith(f"{image}_"))
    return LesionMasks({key: tuple(paths) for key, paths in masks.items()}, tuple(notes))


def _read_pairs(table: Path, truths: Path, strict_links: bool) -> list[Pair]:
    pairs = []
    for row in read_table(table, ("segmentation set", "segmentation image", "grading set", "grading image")):
        segmentation = row["segmentation set"], row["segmentation image"]
        path_inside(truths, "/".join(segmentation), row.where, strict_links)
        pairs.append((segmentation, (row["grading set"], row["grading image"])))
    return pairs


def segmentation_pairs(root: Path, cache_dir: Path) -> tuple[list[Pair], list[str]]:
    """Match segmentation images with grading images by comparing the pictures.

    Args:
        root: the data set's folder, with the official archives "A. Segmentation" and "B. Disease Grading".
        cache_dir: folder that keeps the result under a hash of all files.

    Returns:
        The pairs, and notes that name the segmentation images without a grading image, or with several.
    """
    photos, candidates = (_all_images(root / part / _IMAGES) for part in (_SEGMENTATION, _GRADING))
    if not photos:
        return [], [
            f"  no lesion masks: {root / _SEGMENTATION / _IMAGES} has no image to compare with the grading images"
        ]
    matches = cached_matches(photos, candidates, cache_dir)
    pairs = [(_key(photos[i]), _key(candidates[j])) for i, found in matches.matched.items() for j in found]
    notes = [
        f"  lesion masks: {len(matches.matched)} of {len(photos)} segmentation images are photographs of the grading "
        "data (found by comparing the pictures)"
    ]
    for numbers, reason in ((matches.missing, "not in the grading data"), (matches.ambiguous, "like several of them")):
        if numbers:
            names = ", ".join("/".join(_key(photos[number])) for number in numbers)
            notes.append(f"  segmentation images {reason}, whose masks are not used: {names}")
    return pairs, notes


def _all_images(folder: Path) -> list[Path]:
    """Readable images of the training and the testing folder; damaged ones are reported when the splits are read."""
    folders = [folder / name for name in _FOLDERS.values() if (folder / name).is_dir()]
    return [path for part in folders for path in image_files(part) if image_error(path) is None]


def _key(path: Path) -> tuple[str, str]:
    return path.parent.name, path.stem


class IDRiD(ImageDataModule):
    """IDRiD disease grading: 413 training and 103 test fundus photographs, grades 0 (healthy) to 4 (proliferative).

    Images are prepared as in JSAI 2022: cropped to (290, 0, 3701, 2849) of the 4288 x 2848 originals, then squashed to
    224 x 224. The crop is given in fractions, so that scaled copies of the data set work too. One training image is
    identical to a test image and is removed from training (412 remain); identical training images stay on one side of
    the train / validation split; `report()` lists both. `mask` is the union of microaneurysms, haemorrhages, hard and
    soft exudates for the images that the segmentation data contains, and all False for the others. Segmentation images
    have other numbers: `segmentation_to_grading.csv` pairs them with grading images, or else a comparison of the
    pictures, whose result is kept in `cache_dir`.

    Args:
        root: folder with "B. Disease Grading"; None takes `$LABN_DATA/idrid`.
        task: "binary" (grade 0 against 1-4) or "grades" (five classes).
        image_size: side in pixels.
        crop: (left, top, right, bottom) as fractions of width and height, clipped to the image; None uses all of it.
        val_fraction: share of the training images for validation.
        split_seed: seed of the train / validation split.
        masks: whether batches carry lesion masks.
        mean: mean of each channel for values in [0,1]; by default that of the cropped training images.
        std: standard deviation of each channel for values in [0,1]; by default that of the cropped training images.
        augmentation: augmentation of the training split; the published one (JSAI 2022) by default.
        cache_images: decode each split once, into uint8 memory; on by default, because the originals are large.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: a folder or a label file is missing (raised when the data is first used).
        InputError: the crop is empty or given in pixels (at once); or, when the data is first used, a row has no image,
            an image has no row, two images share a name, a grade is not in 0-4, or an image file is damaged.

    Example:
        >>> import tempfile
        >>> data = IDRiD(task="grades")
        >>> data.class_names
        ['no retinopathy', 'mild', 'moderate', 'severe', 'proliferative']
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Path(folder) / "labels.csv"
        ...     _ = table.write_text("Image name,Retinopathy grade,,\\nIDRiD_001,3,,\\nIDRiD_002,0,,\\n")
        ...     read_grades(table)
        {'IDRiD_001': 3, 'IDRiD_002': 0}
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        task: Literal["binary", "grades"] = "binary",
        image_size: int = 224,
        crop: tuple[float, float, float, float] | None = (290 / 4288, 0.0, 3701 / 4288, 2849 / 2848),
        val_fraction: float = 0.2,
        split_seed: int = 42,
        masks: bool = True,
        mean: list[float] | None = [0.4329, 0.2094, 0.0687],  # noqa: B006 (read only)
        std: list[float] | None = [0.3083, 0.1643, 0.0829],  # noqa: B006 (read only)
        augmentation: Augmentation | None = PUBLISHED,
        cache_images: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, mean, std, augmentation=augmentation, cache_images=cache_images, **kwargs)
        if task not in ("binary", "grades"):
            raise InputError(f"task is {task!r}; it must be 'binary' or 'grades'.")
        self.root, self.task, self.crop, self.masks = root, task, check_crop(crop), masks
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.class_names = ["no retinopathy", "retinopathy"] if task == "binary" else list(_GRADES)
        self.positive_classes = tuple(range(1, len(self.class_names)))

    def _build(self) -> dict[Split, Source]:
        root = data_root("idrid", self.root)
        lesions = lesion_masks(root, self.cache_dir, self.strict_links) if self.masks else LesionMasks({})
        masks = lesions.files
        test, notes_test = readable_records(
            self._records(root, "test", masks), self.on_bad_image, [root], strict_links=self.strict_links
        )
        train, notes_train = readable_records(
            self._records(root, "train", masks), self.on_bad_image, [root], strict_links=self.strict_links
        )
        train, notes_copies = without_copies(train, test)
        train, val, notes_groups = split_off(train, self.val_fraction, self.split_seed)
        self._notes = [*notes_test, *notes_train, *notes_copies, *notes_groups, *lesions.notes]
        splits: dict[Split, list[Record]] = {"train": train, "val": val, "test": test}
        return {
            split: FileSource(records, self.image_size, self.crop, has_masks=bool(masks))
            for split, records in splits.items()
        }

    def _records(self, root: Path, split: str, masks: dict[tuple[str, str], tuple[Path, ...]]) -> list[Record]:
        folder = root / _GRADING / _IMAGES / _FOLDERS[split]
        if not folder.is_dir():
            raise MissingFileError(f"Image folder {folder} does not exist; `root` must contain '{_GRADING}'.")
        table = root / _GRADING / "2. Groundtruths" / _CSVS[split]
        pairs = pair_with_grades(image_files(folder), read_grades(table), table)
        binary = self.task == "binary"
        return [
            Record(path.stem, min(grade, 1) if binary else grade, path, masks.get((_FOLDERS[split], path.stem), ()))
            for path, grade in pairs
        ]
