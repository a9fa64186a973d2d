"""Small data sets on disk for these tests."""

from pathlib import Path

import cv2
import numpy as np


def write_image(path: Path, seed: int, shape: tuple[int, ...] = (40, 60, 3), dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    assert cv2.imwrite(str(path), image)


GRADES = {"train": [0, 1, 2, 3, 4, 0, 1, 0, 2, 0], "test": [0, 4, 0, 2]}
FOLDERS = {"train": "a. Training Set", "test": "b. Testing Set"}
CSVS = {
    "train": "a. IDRiD_Disease Grading_Training Labels.csv",
    "test": "b. IDRiD_Disease Grading_Testing Labels.csv",
}


def grading_image(root: Path, split: str, number: int) -> Path:
    return root / "B. Disease Grading" / "1. Original Images" / FOLDERS[split] / f"IDRiD_{number:03d}.jpg"


def grading_csv(root: Path, split: str) -> Path:
    return root / "B. Disease Grading" / "2. Groundtruths" / CSVS[split]
