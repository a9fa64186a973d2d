"""ImageNet (ILSVRC 2012) for testing: the validation layout, or a flat folder with a rule for the classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights

from datamodules.base import ImageDataModule, OnBadImage, Split, data_root
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import readable_records
from labn.errors import InputError, MissingFileError
from labn.io.images import image_files
from labn.io.readers import read_rows

_SYNSET = re.compile(r"n\d{8}")


@cache
def synsets() -> dict[str, int]:
    """WordNet synset (`n01440764`) to class index, in the order in which every ImageNet classifier numbers them."""
    return {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}


def class_index(word: str, where: str) -> int:
    """Class index of a synset or of a number from 0 to 999.

    Raises:
        ValueError: it is neither; the message begins with `where`.
    """
    index = synsets().get(word, int(word) if word.isdecimal() else -1)
    if not 0 <= index < len(synsets()):
        raise InputError(f"{where}: {word!r} must be one of the 1000 synsets, such as n01440764, or from 0 to 999.")
    return index


def labels_by_synset(files: list[Path], argument: str) -> list[int]:
    """The synset in the file's own name, else in that of its folder."""
    labels = []
    for file in files:
        found = _SYNSET.search(file.stem) or _SYNSET.search(file.parent.name)
        if found is None:
            raise InputError(
                f"Image {file} has no synset (n and eight digits) in its name or its folder's; "
                "set class_rule to every:<k> or csv:<file>."
            )
        labels.append(class_index(found[0], f"Image {file}"))
    return labels


def labels_by_position(files: list[Path], argument: str) -> list[int]:
    """Number i in sorted order has class `argument` * i."""
    if not argument.isdecimal() or int(argument) * (len(files) - 1) >= len(synsets()):
        raise InputError(
            f"class_rule is 'every:{argument}'; the number after every: times {len(files) - 1}, the last image's "
            "position, must be a class from 0 to 999."
        )
    return [int(argument) * position for position in range(len(files))]


def labels_by_table(files: list[Path], argument: str) -> list[int]:
    """A CSV file with a header: image name, then synset or class index (further words after it are ignored)."""
    path = Path(os.path.expandvars(argument))
    if not path.is_file():
        raise MissingFileError(f"class_rule is 'csv:{argument}'; there is no such file.")
    table = [(line, row) for line, row in list(read_rows(path))[1:] if len(row) > 1]
    rows = {Path(row[0]).stem: (f"{path}, line {line}", (row[1].split() or [""])[0]) for line, row in table}
    if missing := [image for image in files if image.stem not in rows]:
        raise InputError(f"Image {missing[0]} has no row in {path} ({len(missing)} such images).")
    return [class_index(word, where) for where, word in (rows[image.stem] for image in files)]


CLASS_RULES: dict[str, Callable[[list[Path], str], list[int]]] = {
    "synset": labels_by_synset,
    "every": labels_by_position,
    "csv": labels_by_table,
}


class ImageNet(ImageDataModule):
    """ImageNet's validation images, as the split of both `validate` and `test`; there is no training split.

    Reads `val/<synset>/*`, else the images of the flat folder `val`, else those of `images`, else the same two layouts
    in `root` itself. FastCopy as classifiers are tested: the shorter side resized, the central square taken.

    Args:
        root: the folder; None for `$LABN_DATA/imagenet`; `$VARIABLES` are expanded.
        class_rule: "synset", the synset in the name of the file or its folder; "every:<k>", number i of the sorted
            images has class k*i; "csv:<file>", a table (with a header) of image name and synset or class index, as
            ImageNet's own LOC_val_solution.csv is one.
        image_size: side of the central square in pixels.
        shorter: what the shorter side is resized to, in pixels.
        mean: per channel, of values in [0,1]; ImageNet's.
        std: likewise.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        on_bad_image: "stop" or "skip".
        cache_images: keep decoded images in memory.

    Raises:
        FileNotFoundError: `root` or the table of classes is missing (when the data is first needed, as for all below).
        ValueError: no image, an image without class, an unknown rule, a bad image file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        class_rule: str = "synset",
        image_size: int = 224,
        shorter: int = 256,
        mean: list[float] | None = [0.485, 0.456, 0.406],  # noqa: B006 (read only)
        std: list[float] | None = [0.229, 0.224, 0.225],  # noqa: B006 (read only)
        batch_size: int = 32,
        num_workers: int = 0,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
    ) -> None:
        super().__init__(
            image_size, mean, std, batch_size, num_workers, on_bad_image=on_bad_image, cache_images=cache_images
        )
        if shorter < image_size:
            raise InputError(f"shorter is {shorter}; it must be at least image_size, {image_size}.")
        rule, _, self._argument = class_rule.partition(":")
        if rule not in CLASS_RULES:
            raise InputError(f"class_rule is {class_rule!r}; it must be synset, every:<k> or csv:<file>.")
        self.root, self.class_rule, self.shorter, self._rule = root, class_rule, shorter, CLASS_RULES[rule]
        self.class_names = list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
        self.positive_classes = tuple(range(len(self.class_names)))

    def _build(self) -> dict[Split, Source]:
        root = data_root("imagenet", self.root)
        folder = next(path for path in (root / "val", root / "images", root) if path.is_dir())
        files = image_files(folder) or [f for sub in sorted(folder.iterdir()) if sub.is_dir() for f in image_files(sub)]
        if not files:
            raise InputError(f"{folder} holds neither images nor folders of images.")
        labels = self._rule(files, self._argument)
        records = [Record(str(f.relative_to(folder)), label, f) for f, label in zip(files, labels)]
        records, self._notes = readable_records(records, self.on_bad_image, [root])
        source = FileSource(records, self.image_size, shorter=self.shorter)
        return {"val": source, "test": source}
