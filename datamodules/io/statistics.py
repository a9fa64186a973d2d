"""Statistics of a split, computed image by image and cached on disk under the split's data hash."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from datamodules.io.sources import Source
from labn.io.atomic import write_atomically
from labn.io.images import centre


def default_cache_dir() -> Path:
    """The folder `$XDG_CACHE_HOME/labn`, or `~/.cache/labn` without that variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labn"


def pixel_mean(source: Source, size: int) -> Tensor:
    """Pixel-wise mean of the central squares of a split's images: the bias image b = (1/N) sum_i x_i (ACCV 2022).

    Returns:
        (C,size,size) float64 in [0,1].
    """
    # The sums are exact: float64 holds sums of uint8 values as integers below 2^53.
    total = np.zeros(centre(source.load(0)[0], size).shape, dtype=np.float64)
    for index in range(len(source)):
        total += centre(source.load(index)[0], size)
    return torch.from_numpy(total / (255.0 * len(source))).permute(2, 0, 1).contiguous()


def channel_statistics(source: Source) -> Tensor:
    """Mean and (population) standard deviation of each channel over all pixels of a split, for values in [0,1].

    Returns:
        (2,C) float64: the means, then the standard deviations, exactly 0 for a constant channel.
    """
    # Python integers of any size, so that sums do not round: n * sum(x^2) - sum(x)^2 is exactly 0 for a constant
    # channel, where floats would leave a small number, possibly below 0.
    sums = np.zeros((2, source.load(0)[0].shape[-1]), dtype=object)
    pixels = 0
    for index in range(len(source)):
        image = source.load(index)[0].astype(np.int64)
        sums += [image.sum((0, 1)), (image**2).sum((0, 1))]
        pixels += image.shape[0] * image.shape[1]
    mean = [total / (255 * pixels) for total in sums[0]]
    std = [math.sqrt(pixels * square - total**2) / (255 * pixels) for total, square in sums.T]
    return torch.tensor([mean, std], dtype=torch.float64)


def cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor stored at `path`; a missing or damaged file is computed and stored again.

    A cache folder that cannot be written gives a warning, and the tensor is returned without being stored.
    """
    if path.is_file():
        try:
            return load_file(path)["value"]
        except SafetensorError as error:
            warnings.warn(f"{path} is damaged ({error}); it is computed again.", stacklevel=2)
    value = compute()
    try:
        write_atomically(path, save({"value": value}))
    except OSError as error:
        advice = "Set data.init_args.cache_dir to another folder; the run continues."
        warnings.warn(f"{error.strerror} {advice}", stacklevel=2)
    return value
