"""`python cli.py doctor`: check whether this machine is ready, and say what to do if it is not."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

from labn.api import evaluate, explain
from labn.errors import printable

DETAILS = """\
Every line starts with `ok`, `note` (optional) or `FAIL`, and says what to do. The exit status is 1 if a check failed.

example:
  python cli.py doctor --run_dir runs
"""

MALWARE = {"lightning": ("2.6.2", "2.6.3")}
"""Package -> releases on the package index that carried malware."""
# Both install the package cv2 over each other, so that different versions give a broken mixture of files.
SAME = ("opencv-python", "opencv-python-headless")
LITTLE_DISK = 5e9
"""Free bytes below which the disk gets a note; checkpoints and the maps of a test can take as much."""


@dataclass(frozen=True)
class Finding:
    """One line of output; `status` is `ok`, `note` or `FAIL`."""

    status: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--run_dir", type=Path, default=Path("runs"), help="folder for results (default: runs)")


def run(options: argparse.Namespace) -> None:
    """Print all findings.

    Raises:
        SystemExit: with status 1, if a check failed.
    """
    findings = [*versions(), *pairs(), *accelerators(), disk(options.run_dir), data_folder(), self_test()]
    for finding in findings:
        print(f"{finding.status:<5}{printable(finding.text)}")
    if any(finding.status == "FAIL" for finding in findings):
        raise SystemExit(1)


def versions(wanted: Sequence[str] | None = None, installed: Callable[[str], str] = version) -> Iterable[Finding]:
    """Check Python and the required packages: installed, within the required versions, no release with malware."""
    python = platform.python_version()
    yield Finding("ok" if Version(python) >= Version("3.10") else "FAIL", f"Python {python} (3.10 or newer)")
    if wanted is None:
        try:
            wanted = requires("labn") or []
        except PackageNotFoundError:
            yield Finding("note", "labn is not installed; its requirements cannot be checked: pip install -e .")
            return
    for requirement in map(Requirement, wanted):
        # Requirements of the extras, such as the tests', have a marker that is false without an extra.
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement, installed)


def package(requirement: Requirement, installed: Callable[[str], str]) -> Finding:
    """Check one required package."""
    try:
        found = installed(requirement.name)
    except PackageNotFoundError:
        return Finding(
            "FAIL", f"{requirement.name} is missing: pip install '{requirement.name}{requirement.specifier}'"
        )
    text = f"{requirement.name} {found}"
    if found in MALWARE.get(requirement.name, ()):
        return Finding("FAIL", f"{text} carried malware: remove it, pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("FAIL", f"{text} does not fit {requirement.specifier}: pip install '{requirement}'")
    return Finding("ok", text)


def pairs(installed: Callable[[str], str] = version) -> Iterable[Finding]:
    """Check packages that depend on each other's build: torchvision on torch, and the two OpenCV packages."""
    try:
        importlib.import_module("torchvision.ops").nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        yield Finding("ok", "torchvision fits torch")
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        yield Finding("FAIL", f"torchvision does not fit torch ({reason}): install both from the same place")
    try:
        found = {name: installed(name) for name in SAME}
    except PackageNotFoundError:
        return
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{name} {number}" for name, number in found.items())
        yield Finding("FAIL", f"{listed} write the same cv2: install one version of both")


def accelerators() -> Iterable[Finding]:
    """Every GPU with its memory, or a note if there is none."""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        yield Finding("note", f"no GPU: everything runs slowly on the CPU ({os.cpu_count()} cores)")


def disk(folder: Path) -> Finding:
    """Check that `folder`, or the nearest existing folder above it, is writable and has free space."""
    # The run folder is created later; permission and space are those of its nearest existing parent.
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        return Finding("FAIL", f"{existing} is not writable: choose another folder with --run_dir")
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.0f} GB free for {folder}"
    return Finding("ok", text) if free > LITTLE_DISK else Finding("note", f"{text}: checkpoints and maps need more")


def data_folder() -> Finding:
    """The data sets in LABN_DATA; the quickstart needs none of them."""
    folder = Path(os.environ.get("LABN_DATA", "../shared/data"))
    if not folder.is_dir():
        return Finding(
            "note",
            f"LABN_DATA: {folder} does not exist; only configs/quickstart.yaml and configs/synthetic run without data",
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return Finding("ok", f"LABN_DATA: {folder} holds {', '.join(names) or 'no folder'}")


def self_test() -> Finding:
    """Explain and score two random images with a small network; a constant map must score a PID of 0."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    try:
        targets = torch.tensor([0, 2])
        # Any error is a finding: the command reports a broken installation instead of ending with a traceback.
        maps = explain(model, images, method="gradcam", targets=targets).maps
        for scored in (maps, torch.ones(2, 32, 32)):
            constant = evaluate(model, images, scored, targets, ["pid16"], mean=None, std=None)["pid16"]
    except Exception as error:
        return Finding("FAIL", f"self-test: {type(error).__name__}: {error}")
    if maps.shape != (2, 32, 32) or constant.abs().max() > 1e-6:
        return Finding("FAIL", f"self-test: a constant map scores {constant.tolist()} instead of 0")
    return Finding("ok", f"self-test: explained and scored two images in {time.perf_counter() - start:.1f} s")
