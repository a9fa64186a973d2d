from pathlib import Path

import pytest
from small_data import GRADES, grading_csv, grading_image, write_image

from datamodules.base import data_root


@pytest.fixture
def idrid_root() -> Path:
    try:
        return data_root("idrid")
    except FileNotFoundError as error:
        pytest.skip(f"the real IDRiD images are not here: {error}")


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
