"""What `explain` returns: maps that show, save and describe themselves."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from labn.errors import InputError, InputTypeError, MissingFileError
from labn.io.atomic import write_atomically, write_error
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from labn.io.readers import read_json
from labn.models.checkpoints import read_checkpoint
from labn.postprocess.overlay import displayable, overlay, png_bytes, sheet_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANIFEST = "explanation.json"
MAPS = "maps.safetensors"
PER_SHEET = 8
"""Number of images in one figure."""


class Shown(ABC):
    """Maps by method that plot, save and show themselves: one `Explanation`, or `Explanations` of several methods."""

    @abstractmethod
    def _by_method(self) -> Mapping[str, Explanation]:
        """The explanations of the same images by name of their method."""

    def plot(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_images: int = PER_SHEET,
        first: int = 0,
    ) -> Figure:
        """A matplotlib figure with one row per image: the picture, and the map of every method with a colour bar.

        Args:
            mean: per-channel mean of the images' normalisation.
            std: per-channel standard deviation of the normalisation.
            max_images: maximum number of images to show.
            first: position of the first image to show.

        Raises:
            InputError: there is no explanation, or no image at `first`.
        """
        explanations, leading = self._by_method(), self._leading()
        if not 0 <= first < len(leading):
            raise InputError(f"first is {first}; there are {len(leading)} images.")
        shown = range(first, min(len(leading), first + max_images))
        pictures = leading._pictures(len(shown), first, mean, std)
        maps = {name: explanation.numpy() for name, explanation in explanations.items()}
        titles = [f"image {row}, class {int(leading.targets[row])}" for row in shown]
        return sheet_figure(
            [
                (title, picture, {name: m[row] for name, m in maps.items()}, None)
                for title, picture, row in zip(titles, pictures, shown)
            ]
        )

    def save(
        self,
        folder: str | os.PathLike[str],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> Path:
        """Save to a new folder, which exists under its name only when it is complete.

        Written are `maps.safetensors` (raw maps (B, H, W) by method), `overlays/<method>/<position>.png`, sheets of
        8 images each (the figure of `plot`: `sheet.png`, `sheet-2.png`, ...), and `explanation.json` with methods,
        classes, shapes and ranges, and the positions of the images on every sheet.

        Args:
            folder: the folder; it must not exist, or be empty.
            mean: per-channel mean of the images' normalisation.
            std: per-channel standard deviation of the normalisation.

        Returns:
            The folder.

        Raises:
            InputError: the folder exists and is not empty, or there is no explanation.
            FileError: the folder cannot be written.
        """
        folder = Path(folder).absolute()  # the name of `.` is empty
        if unfit := [name for name in self._by_method() if Path(name).name != name]:
            raise InputError(f"{unfit[0]!r} cannot be the name of a folder; choose another name of the method.")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder; give a new one.")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self._write(temporary, mean, std)
            # A rename takes the place of an empty folder.
            temporary.replace(folder)
        except OSError as error:
            raise write_error(folder, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _leading(self) -> Explanation:
        """The explanation of the first method; raises InputError if there is none."""
        for explanation in self._by_method().values():
            return explanation
        raise InputError("There is no explanation to show.")

    def _repr_png_(self) -> bytes:
        """The figure as a notebook shows it."""
        return png_bytes(self.plot())

    def _write(self, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
        explanations = self._by_method()
        maps = {
            name: explanation.maps.detach().float().cpu().contiguous() for name, explanation in explanations.items()
        }
        sheets = _sheets(len(self._leading()))
        for name, positions in sheets.items():
            write_atomically(folder / name, png_bytes(self.plot(mean, std, first=positions[0])))
        write_atomically(folder / MAPS, safetensors.torch.save(maps))
        for name, explanation in explanations.items():
            pictures = explanation._pictures(len(explanation), 0, mean, std)
            for position, (picture, heat) in enumerate(zip(pictures, maps[name].numpy())):
                path = folder / "overlays" / name / f"{position:05d}.png"
                write_atomically(path, _png_of_pixels(overlay(picture, heat)))
        described = {
            "labn": version("labn"),
            "methods": {name: _description(explanation) for name, explanation in explanations.items()},
            "sheets": sheets,
        }
        write_atomically(folder / MANIFEST, json.dumps(described, indent=1).encode())


@dataclass(frozen=True, repr=False, eq=False)
class Explanation(Shown):
    """Result of `explain`.

    Attributes:
        maps: (B, H, W) float32, not normalised; negative values only for signed methods.
        targets: (B,) int64, the explained classes.
        method: name of the method, or of the class for a ready explainer.
        images: (B, C, H, W), the explained images themselves, which `plot` and `save` show; None: maps alone.

    Example:
        >>> explanation = Explanation(torch.eye(8)[None], torch.tensor([3]), "gradcam")
        >>> explanation
        Explanation(method='gradcam', maps=(1, 8, 8) in [0, 1], targets=[3])
        >>> explanation.overlay(np.zeros((8, 8, 3), dtype=np.uint8)).shape
        (8, 8, 3)
    """

    maps: Tensor
    targets: Tensor
    method: str
    images: Tensor | None = None

    def __repr__(self) -> str:
        low, high = (f"{float(value):.3g}" for value in (self.maps.min(), self.maps.max()))
        classes = ", ".join(map(str, self.targets[:8].tolist())) + (", ..." if len(self.targets) > 8 else "")
        shape = tuple(self.maps.shape)
        return f"Explanation(method={self.method!r}, maps={shape} in [{low}, {high}], targets=[{classes}])"

    def __len__(self) -> int:
        """Number of maps."""
        return len(self.maps)

    def numpy(self) -> np.ndarray:
        """The maps (B, H, W) as a float32 array."""
        return self.maps.detach().float().cpu().numpy()

    def overlay(self, image: Any = None, index: int = 0, alpha: float = 0.6) -> np.ndarray:
        """A map in colours over the grey picture.

        Args:
            image: the picture of map `index`: an array or PIL image (H, W, 3) or (H, W), uint8 or floats in [0, 1], of
                the map's size; None takes the explained image, which must be normalised with ImageNet's figures, and
                white where the images are not known.
            index: position of the map in the batch; negative ones count from its end.
            alpha: opacity of the map, in [0, 1].

        Returns:
            (H, W, 3) uint8.

        Raises:
            InputError: the picture has another size than the map, or the batch has no such position.
            InputTypeError: the picture's values are neither uint8 nor floating point.
        """
        if not -len(self) <= index < len(self):
            raise InputError(f"index is {index}; there are {len(self)} maps.")
        index %= len(self)
        heat = self.numpy()[index]
        return overlay(_pixels(image, heat.shape) if image is not None else self._pictures(1, index)[0], heat, alpha)

    def _pictures(
        self,
        count: int,
        first: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> list[np.ndarray]:
        """`count` explained images in [0, 1], from `first`; white ones where the images are not known."""
        if self.images is None:
            return [np.ones(tuple(self.maps.shape[1:])) for _ in range(count)]
        images = self.images.detach()
        if images.shape[1] != len(mean) or len(mean) not in (1, 3):
            # Other channels than those of the normalisation, or than a picture has: grey, in the images' own range.
            images = images.float().mean(1, keepdim=True)
            mean, std = _own_range(images)
        return [displayable(image, mean, std) for image in images[first : first + count]]

    def _by_method(self) -> Mapping[str, Explanation]:
        return {self.method: self}


class Explanations(dict[str, Explanation], Shown):
    """Explanations of the same images by several methods: name of the method -> `Explanation`.

    Example:
        >>> maps = {"gradcam": torch.eye(8)[None], "random": torch.rand(1, 8, 8)}
        >>> both = Explanations({name: Explanation(m, torch.tensor([3]), name) for name, m in maps.items()})
        >>> list(both), [axes.get_title() for axes in both.plot().axes if axes.get_title()]
        (['gradcam', 'random'], ['image', 'gradcam', 'random'])
    """

    def __repr__(self) -> str:
        return "Explanations(\n" + "".join(f"  {explanation!r},\n" for explanation in self.values()) + ")"

    def _by_method(self) -> Mapping[str, Explanation]:
        return self


def load_explanations(folder: str | os.PathLike[str]) -> Explanations:
    """Read what `save` has written; the images are not part of it.

    Raises:
        MissingFileError: the folder holds no explanation.
        InputError: its files do not fit each other.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Explanation(torch.eye(8)[None], torch.tensor([3]), "gradcam").save(Path(folder) / "saved")
        ...     load_explanations(path)["gradcam"]
        Explanation(method='gradcam', maps=(1, 8, 8) in [0, 1], targets=[3])
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(f"{folder} holds no {MANIFEST}; give a folder that Explanation.save has written.")
    methods = read_json(folder / MANIFEST, dict).get("methods")
    if not isinstance(methods, dict):
        raise InputError(f"{folder / MANIFEST} lists no methods; it is not what Explanation.save writes.")
    maps = read_checkpoint(folder / MAPS)
    if set(maps) != set(methods):
        raise InputError(f"{folder / MAPS} has maps of {sorted(maps)}, but {MANIFEST} lists {sorted(methods)}.")
    targets = {name: _targets(folder / MANIFEST, name, methods[name], len(maps[name])) for name in methods}
    return Explanations({name: Explanation(maps[name], classes, name) for name, classes in targets.items()})


def _targets(path: Path, name: str, described: Any, count: int) -> Tensor:
    """The explained classes (count,) int64 of a method in a description."""
    classes = described.get("targets") if isinstance(described, dict) else None
    if not isinstance(classes, list) or len(classes) != count or not all(type(each) is int for each in classes):
        raise InputError(f"{path}: the targets of {name} are not {count} classes, one per map; save them again.")
    return torch.tensor(classes, dtype=torch.int64)


def _sheets(count: int) -> dict[str, list[int]]:
    """File of every sheet -> positions of its images, of `count` images."""
    pages = [list(range(first, min(first + PER_SHEET, count))) for first in range(0, count, PER_SHEET)]
    return {f"sheet{f'-{number}' if number > 1 else ''}.png": page for number, page in enumerate(pages, 1)}


def _description(explanation: Explanation) -> dict[str, Any]:
    maps = explanation.maps
    return {
        "targets": explanation.targets.tolist(),
        "shape": list(maps.shape),
        "minimum": float(maps.min()),
        "maximum": float(maps.max()),
    }


def _pixels(image: Any, shape: Sequence[int]) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) in [0, 1], checked against the size of the map."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.shape[:2] != tuple(shape) or pixels.shape[2:] not in ((), (3,)):
        raise InputError(
            f"image is {pixels.shape}; it must be (H, W, 3) or (H, W) with the map's H, W = {tuple(shape)}; an image "
            "(C, H, W) goes in as image.permute(1, 2, 0)."
        )
    if pixels.dtype == np.uint8:
        return pixels / 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InputTypeError(f"image holds {pixels.dtype}; it must be uint8, or floats in [0, 1].")
    return pixels.clip(0, 1)


def _own_range(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that bring images of one channel from their own range to [0, 1]."""
    low, high = float(images.min()), float(images.max())
    return [-low / max(high - low, 1e-12)], [1 / max(high - low, 1e-12)]


def _png_of_pixels(pixels: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", pixels[..., ::-1])[1])
