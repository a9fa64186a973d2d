"""IDRiD, the Indian Diabetic Retinopathy Image Dataset (Porwal et al., Data 2018), in its own folder layout."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from pathlib import Path
from typing import Literal

from datamodules.base import ImageDataModule, OnBadImage, Split, data_root
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import readable_records, split_off, without_copies
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import by_stem, check_crop, image_files
from labn.io.readers import path_inside, read_table

_GRADING, _SEGMENTATION = "B. Disease Grading", "A. Segmentation"
_IMAGES = "1. Original Images"
_FOLDERS = {"train": "a. Training Set", "test": "b. Testing Set"}
_CSVS = {
    "train": "a. IDRiD_Disease Grading_Training Labels.csv",
    "test": "b. IDRiD_Disease Grading_Testing Labels.csv",
}
# The optic disc is part of a healthy eye: not a lesion.
_LESIONS = ("1. Microaneurysms", "2. Haemorrhages", "3. Hard Exudates", "4. Soft Exudates")
_GRADES = ["no retinopathy", "mild", "moderate", "severe", "proliferative"]


def read_grades(path: Path) -> dict[str, int]:
    """Image name to grade, from one of the data set's CSV files.

    Lives with the files as published: trailing empty columns and rows, header names with trailing spaces.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a name comes twice, or a grade is not an integer from 0 to 4.
    """
    if not path.is_file():
        raise MissingFileError(f"Label file {path} does not exist.")
    grades: dict[str, int] = {}
    for line in read_table(path, ("Image name", "Retinopathy grade")):
        _add_grade(grades, line["Image name"], line["Retinopathy grade"], line.where)
    return grades


def _add_grade(grades: dict[str, int], name: str, grade: str, where: str) -> None:
    if name in grades:
        raise InputError(f"{where}: image {name!r} has a row already; every image needs exactly one.")
    if grade not in {"0", "1", "2", "3", "4"}:
        raise InputError(f"{where}: retinopathy grade {grade!r} of image {name!r} must be an integer from 0 to 4.")
    grades[name] = int(grade)


def pair_with_grades(images: list[Path], grades: dict[str, int], csv_path: Path) -> list[tuple[Path, int]]:
    """Pair every image file with its grade, sorted by file name.

    Raises:
        ValueError: a row has no image, an image has no row, or two images share a name; the message names it.
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


def lesion_masks(root: Path) -> dict[tuple[str, str], tuple[Path, ...]]:
    """(grading folder, grading image) to the lesion mask files of its segmentation twin; empty without that part.

    `segmentation_to_grading.csv` says which grading image a segmentation image is. Where two segmentation images are
    the same grading image, their masks are united.
    """
    table = root / "segmentation_to_grading.csv"
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    if not table.is_file():
        return {}
    truths = root / _SEGMENTATION / "2. All Segmentation Groundtruths"
    for row in read_table(table, ("segmentation set", "segmentation image", "grading set", "grading image")):
        image = path_inside(truths, f"{row['segmentation set']}/{row['segmentation image']}", row.where)
        masks = [p for kind in _LESIONS for p in (image.parent / kind).glob(f"{glob.escape(image.name)}_*")]
        found[row["grading set"], row["grading image"]] += sorted(masks)
    return {key: tuple(paths) for key, paths in found.items()}


class IDRiD(ImageDataModule):
    """IDRiD disease grading: 413 training and 103 test fundus photographs, grades 0 (healthy) to 4 (proliferative).

    The papers' preparation (JSAI 2022): crop to (290, 0, 3701, 2849) of the 4288 x 2848 originals, given as fractions
    so that scaled copies work too, then a squash to 224 x 224. One training image equals a test image and leaves the
    training split (412 remain); identical training images stay on one side of the train / validation split. Both are
    in `report()`. `mask` is the union of microaneurysms, haemorrhages, hard and soft exudates of the images that are
    also in the segmentation part, and all False for the others.

    Args:
        root: folder with "B. Disease Grading"; None for `$LABN_DATA/idrid` (LABN_DATA defaults to ../shared/data).
        task: "binary" (grade 0 against 1-4) or "grades" (five classes).
        image_size: side in pixels.
        crop: (left, top, right, bottom) in fractions of width and height, clipped to the image; None for no crop.
        val_fraction: share of the training images for validation.
        split_seed: of the train / validation split.
        masks: whether batches carry lesion masks.
        mean: per channel, of values in [0,1].
        std: per channel, likewise.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        seed: of the training order and the augmentation.
        balanced_sampler: class-balanced batches.
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; the papers' by default, None for none.
        on_bad_image: "stop" or "skip".
        cache_images: keep decoded images in memory.
        cache_dir: folder of the bias image.

    Raises:
        FileNotFoundError: a folder or a label file is missing (when the data is first needed, as for all below).
        ValueError: an empty crop or one in pixels (at once), a row without image, an image without row, two images of
            one name, a grade outside 0-4, a bad image file.
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
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = PUBLISHED,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            image_size,
            mean,
            std,
            batch_size,
            num_workers,
            seed,
            balanced_sampler,
            drop_last,
            augmentation,
            on_bad_image,
            cache_images,
            cache_dir,
        )
        if task not in ("binary", "grades"):
            raise InputError(f"task is {task!r}; it must be 'binary' or 'grades'.")
        self.root, self.task, self.crop, self.masks = root, task, check_crop(crop), masks
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.class_names = ["no retinopathy", "retinopathy"] if task == "binary" else list(_GRADES)
        self.positive_classes = tuple(range(1, len(self.class_names)))

    def _build(self) -> dict[Split, Source]:
        root = data_root("idrid", self.root)
        masks = lesion_masks(root) if self.masks else {}
        test, notes_test = readable_records(self._records(root, "test", masks), self.on_bad_image, [root])
        train, notes_train = readable_records(self._records(root, "train", masks), self.on_bad_image, [root])
        train, notes_copies = without_copies(train, test)
        train, val, notes_groups = split_off(train, self.val_fraction, self.split_seed)
        self._notes = [*notes_test, *notes_train, *notes_copies, *notes_groups]
        parts: dict[Split, list[Record]] = {"train": train, "val": val, "test": test}
        return {
            split: FileSource(records, self.image_size, self.crop, has_masks=bool(masks))
            for split, records in parts.items()
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
