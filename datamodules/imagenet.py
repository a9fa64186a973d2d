"""ImageNet (ILSVRC 2012) for testing: one folder per class, or a flat folder with a rule for the labels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from scipy.io import loadmat
from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights

from datamodules.base import ImageDataModule, data_root
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import Split, readable_records
from labn.errors import InputError, MissingFileError
from labn.io.images import image_files
from labn.io.readers import read_rows, read_text, whole_number

_SYNSET = re.compile(r"n\d{8}")
_VALIDATION = re.compile(r"^ILSVRC2012_val_(\d{8})$")


@cache
def synsets() -> dict[str, int]:
    """WordNet synset (`n01440764`) -> class index, in the usual order of ImageNet classifiers."""
    return {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}


def class_index(word: str, where: str) -> int:
    """Class index of a word that is a synset or a number from 0 to 999.

    Raises:
        InputError: the word is neither; the message begins with `where`.
    """
    index = synsets().get(word, whole_number(word))
    if index is None or index >= len(synsets()):
        raise InputError(
            f"{where}: {word[:100]!r} must be one of the 1000 synsets, such as n01440764, or from 0 to 999."
        )
    return index


def labels_by_synset(files: list[Path], argument: str) -> list[int]:
    """Labels from the synset in the file's name, or in the name of its folder; `argument` is not used."""
    labels = []
    for file in files:
        synset = _SYNSET.search(file.stem) or _SYNSET.search(file.parent.name)
        if synset is None:
            raise InputError(
                f"Image {file} has no synset (n and eight digits) in its name or its folder's; "
                "set class_rule to devkit:<folder>, csv:<file> or every:<k>."
            )
        labels.append(class_index(synset[0], f"Image {file}"))
    return labels


def labels_by_position(files: list[Path], argument: str) -> list[int]:
    """Labels `argument` * i for image i in sorted order."""
    if not argument.isdecimal() or int(argument) * (len(files) - 1) >= len(synsets()):
        raise InputError(
            f"class_rule is 'every:{argument}'; the number after 'every:' times {len(files) - 1}, the position of the "
            "last image, must be a class from 0 to 999."
        )
    return [int(argument) * position for position in range(len(files))]


def labels_by_table(files: list[Path], argument: str) -> list[int]:
    """Labels from the CSV file `argument`: a header, then rows of image name and synset or class index.

    Words behind the first of the second column are ignored, as the boxes in LOC_val_solution.csv.
    """
    path = Path(os.path.expandvars(argument))
    if not path.is_file():
        raise MissingFileError(f"class_rule is 'csv:{argument}'; there is no such file.")
    table = [(line, row) for line, row in list(read_rows(path))[1:] if len(row) > 1]
    rows = {Path(row[0]).stem: (f"{path}, line {line}", (row[1].split() or [""])[0]) for line, row in table}
    if missing := [image for image in files if image.stem not in rows]:
        raise InputError(f"Image {missing[0]} has no row in {path} ({len(missing)} such images).")
    return [class_index(word, where) for where, word in (rows[image.stem] for image in files)]


def labels_by_devkit(files: list[Path], argument: str) -> list[int]:
    """Labels from the development kit of ILSVRC 2012 in the folder `argument`.

    Line n of `ILSVRC2012_validation_ground_truth.txt` is the class of `ILSVRC2012_val_<n>.JPEG`, a number from 1 to
    1000 in the kit's own order of synsets, which is that of `meta.mat` and not that of ImageNet classifiers. In place
    of `meta.mat` a text file `synsets.txt` may list the synsets in that order; a ground truth with
    synsets needs neither.
    """
    folder = Path(os.path.expandvars(argument))
    truth = _devkit_file(folder, "ILSVRC2012_validation_ground_truth.txt")
    words = [line.split()[0] for line in read_text(truth).splitlines() if line.strip()]
    order = devkit_synsets(folder) if all(word.isdecimal() for word in words) else []
    labels = []
    for file in files:
        match = _VALIDATION.search(file.stem)
        if match is None or not 1 <= int(match[1]) <= len(words):
            raise InputError(f"Image {file} must be named ILSVRC2012_val_<n>, with n from 1 to {len(words)} ({truth}).")
        word, where = words[int(match[1]) - 1], f"{truth}, line {int(match[1])}"
        number = whole_number(word) or 0
        if order and not 1 <= number <= len(order):
            raise InputError(f"{where}: class {word[:100]} must be from 1 to {len(order)}.")
        labels.append(class_index(order[number - 1] if order else word, where))
    return labels


def devkit_synsets(folder: Path) -> list[str]:
    """The synsets of classes 1 to 1000 in the order of the development kit, from `synsets.txt` or `meta.mat`.

    Raises:
        MissingFileError: neither file is there.
        InputError: `meta.mat` is damaged.
    """
    if listed := next((p for p in (folder / "synsets.txt", folder / "data" / "synsets.txt") if p.is_file()), None):
        return [line.split()[0] for line in read_text(listed).splitlines() if line.strip()]
    path = _devkit_file(folder, "meta.mat")
    # SciPy raises many kinds of errors for damaged files.
    try:
        table = loadmat(path, squeeze_me=True)["synsets"]
        # The table also has the inner nodes of the hierarchy, which are no classes.
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
    except Exception as error:
        raise InputError(f"{path} is not the table of synsets of the development kit ({error}).") from error
    return [leaves[number] for number in sorted(leaves)]


def _devkit_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / "data" / name):
        if path.is_file():
            return path
    raise MissingFileError(
        f"class_rule is 'devkit:{folder}'; {folder} has neither {name} nor data/{name}, which are files of "
        "ILSVRC2012_devkit_t12."
    )


CLASS_RULES: dict[str, Callable[[list[Path], str], list[int]]] = {
    "synset": labels_by_synset,
    "every": labels_by_position,
    "csv": labels_by_table,
    "devkit": labels_by_devkit,
}


class ImageNet(ImageDataModule):
    """ImageNet's validation images as the `val` and the `test` split; there is no training split.

    The images lie in `root/val`, or else in `root/images`, or else in `root`: all in the folder itself, or in one
    subfolder per class. They are prepared as is usual for testing classifiers: the shorter side is resized and the
    central square is taken.

    Args:
        root: the folder; `$VARIABLES` are expanded; None takes `$LABN_DATA/imagenet`.
        class_rule: "synset" takes the synset in the name of the file or of its folder; "every:<k>" gives image i of the
            sorted images class k*i; "csv:<file>" reads a table (with a header) of image name and synset or class
            index, such as ImageNet's LOC_val_solution.csv; "devkit:<folder>" reads the ground truth and the order of
            synsets from the official development kit, for the official flat folder of validation images.
        image_size: side of the central square in pixels.
        shorter: length in pixels that the shorter side is resized to.
        mean: mean of each channel for values in [0,1]; ImageNet's by default.
        std: standard deviation of each channel for values in [0,1]; ImageNet's by default.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: `root` or the table of classes is missing (raised when the data is first used).
        InputError: the rule is unknown (at once); or, when the data is first used, there is no image, an image has no
            class, or an image file is damaged.

    Example:
        >>> import tempfile, cv2
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for synset in ("n01440764", "n01443537"):
        ...         (Path(folder) / "val" / synset).mkdir(parents=True)
        ...         _ = cv2.imwrite(f"{folder}/val/{synset}/1.png", np.zeros((9, 12, 3), np.uint8))
        ...     data = ImageNet(folder, image_size=6, shorter=8)
        ...     labels = data.labels("test").tolist()
        >>> labels, [data.class_names[label] for label in labels]
        ([0, 1], ['tench', 'goldfish'])
    """

    has_training_split = False

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        class_rule: str = "synset",
        image_size: int = 224,
        shorter: int = 256,
        mean: list[float] | None = [0.485, 0.456, 0.406],  # noqa: B006 (read only)
        std: list[float] | None = [0.229, 0.224, 0.225],  # noqa: B006 (read only)
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, mean, std, **kwargs)
        if shorter < image_size:
            raise InputError(f"shorter is {shorter}; it must be at least image_size, {image_size}.")
        rule, _, self._argument = class_rule.partition(":")
        if rule not in CLASS_RULES:
            raise InputError(
                f"class_rule is {class_rule!r}; it must be synset, every:<k>, csv:<file> or devkit:<folder>."
            )
        self.root, self.class_rule, self.shorter, self._rule = root, class_rule, shorter, CLASS_RULES[rule]
        self.class_names = list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
        self.positive_classes = tuple(range(len(self.class_names)))

    def _build(self) -> dict[Split, Source]:
        root = data_root("imagenet", self.root)
        folder = next(path for path in (root / "val", root / "images", root) if path.is_dir())
        # Images in the folder itself make the layout flat; only without any are subfolders read.
        files = image_files(folder) or [f for sub in sorted(folder.iterdir()) if sub.is_dir() for f in image_files(sub)]
        if not files:
            raise InputError(f"{folder} holds neither images nor folders of images.")
        labels = self._rule(files, self._argument)
        records = [Record(str(f.relative_to(folder)), label, f) for f, label in zip(files, labels)]
        records, self._notes = readable_records(records, self.on_bad_image, [root], strict_links=self.strict_links)
        source = FileSource(records, self.image_size, shorter=self.shorter)
        return {"val": source, "test": source}
