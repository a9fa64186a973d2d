"""`python cli.py shards --config ... --out ...`: write a data set to tar files with an index."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUMMARY = "Write the data set of a configuration to tar shards, for datamodules.TarShards."
DETAILS = """\
Pixels are stored as the data module prepares them (cropped and resized, not augmented, without loss), with labels,
masks, groups and names, and an index that says where every sample lies. Data sets for detectors, whose samples carry
lists of boxes, are refused.

example:
  python cli.py shards --config configs/quickstart.yaml --out runs/shards/quickstart
  python cli.py fit --config configs/quickstart_shards.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--config", nargs="+", action="extend", type=Path, required=True, help="configurations; later ones win"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--samples_per_shard", type=int, default=1000, help="samples of one tar file (default: 1000)")


def run(
    options: argparse.Namespace, build: Callable[[list[Path]], Any], write: Callable[[Any, Path, int], dict[str, Any]]
) -> None:
    """Write the shards and say what is in them.

    Args:
        options: the parsed arguments.
        build: configurations -> their data module.
        write: data module, folder and samples per shard -> the manifest.

    Raises:
        FileNotFoundError: a configuration or the data is missing.
        ValueError: no configuration has data, the data is bad, or of a kind that shards do not keep.
    """
    manifest = write(build(options.config), options.out, options.samples_per_shard)
    for split, facts in manifest["splits"].items():
        print(f"{options.out}: {split}, {facts['samples']} samples in {facts['shards']} shards")
