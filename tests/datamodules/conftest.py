from pathlib import Path

import cv2
import numpy as np
import pytest

from datamodules.files import data_root


@pytest.fixture
def idrid_root() -> Path:
    try:
        return data_root("idrid")
    except FileNotFoundError as error:
        pytest.skip(f"the real IDRiD images are not here: {error}")


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


@pytest.fixture
def small_idrid(tmp_path: Path) -> Path:
    """A data set of 10 + 4 images in IDRiD's layout, with its flawed CSV headers."""
    root = tmp_path / "idrid"
    for offset, (split, grades) in enumerate(GRADES.items()):
        rows = ["Image name,Retinopathy grade,Risk of macular edema ,,,"]
        for number, grade in enumerate(grades, start=1):
            write_image(grading_image(root, split, number), seed=100 * offset + number)
            rows.append(f"IDRiD_{number:03d},{grade},0,,,")
        table = grading_csv(root, split)
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\r\n".join([*rows, "", ",,,"]) + "\r\n")
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Flat folder of two classes with 15 pictures each."""
    root = tmp_path / "pictures"
    for c, name in enumerate(("cat", "dog")):
        for i in range(15):
            write_image(root / name / f"{i:02d}.png", seed=100 * c + i, shape=(30 + i, 50, 3))
    return root
