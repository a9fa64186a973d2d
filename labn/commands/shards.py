"""`python cli.py shards --config ... --out ...`: write a data set into tar files with an index."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from labn.errors import InputError
from labn.io.readers import read_yaml
from labn.launch.config_include import with_includes
from labn.launch.error_messages import config_sentence

DETAILS = """\
Images are stored losslessly as the data module prepares them (cropped and resized, not augmented), with labels,
masks, groups and names, and an index of the position of every sample. Data sets for detectors, whose samples have
lists of boxes, are rejected.

example:
  python cli.py shards --config configs/quickstart.yaml --out runs/shards/quickstart
  python cli.py fit --config configs/synthetic/quickstart_shards.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--config", nargs="+", action="extend", type=Path, required=True, help="configurations; later ones win"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--samples_per_shard", type=int, default=1000, help="samples of one tar file (default: 1000)")


def run(options: argparse.Namespace) -> None:
    """Write the shards and print how many samples and shards each split has.

    Raises:
        MissingFileError: a configuration or the data is missing.
        InputError: no configuration has a data module, or the data is damaged or of a kind that shards cannot hold.
    """
    manifest = data_module_of(options.config).write_shards(options.out, options.samples_per_shard)
    for split, facts in manifest["splits"].items():
        print(f"{options.out}: {split}, {facts['samples']} samples in {facts['shards']} shards")


def data_module_of(paths: Sequence[Path]) -> Any:
    """The data module that configurations describe under `data:`; later files override earlier ones, as in `fit`.

    Raises:
        InputError: no file has a section `data`, or a section has arguments that the data module does not take.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = None
    for file in (included for path in paths for included in with_includes(path)):
        content = read_yaml(file)
        if isinstance(content, dict) and "data" in content:
            try:
                # The configuration so far is the base, so that a later file may override single arguments.
                config = parser.parse_object({"data": content["data"]}, config)
            except argparse.ArgumentError as error:
                raise InputError(f"{file}: {config_sentence(str(error))}") from error
    if config is None:
        raise InputError(f"--config {' '.join(map(str, paths))} names no data module under `data:`.")
    return parser.instantiate_classes(config).data
