"""`python cli.py export --ckpt best.ckpt --out model.onnx`: a trained network as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from labn.commands.explain import add_network_arguments, load_network
from labn.errors import InputError, printable
from labn.io.atomic import write_atomically
from labn.io.preprocessing import Preprocessing
from labn.models.onnx_export import check_packages, onnx_bytes

DETAILS = """\
The file has one input, `images` (batch, C, S, S) float32, and the outputs `logits` (batch, K) and, of a network with
an attention branch, `attention` (batch, 1, h, w), the map before its threshold. Its metadata hold the preprocessing
(`labn.preprocessing`) and the class names (`labn.class_names`) as JSON; the input is (pixels / 255 - mean) / std.
onnxruntime runs the file before it is written; its outputs must be the network's to 1e-4.

Needs the optional packages of `pip install -e ".[export]"` in the project folder.

examples:
  python cli.py export --ckpt runs/quickstart/checkpoints/best.ckpt --out model.onnx
  python cli.py export --model resnet50d --weights resnet50d.safetensors --out resnet50d.onnx --image a.jpg b.jpg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_network_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("model.onnx"), help="file to write (default: model.onnx)")
    parser.add_argument(
        "--image",
        nargs="+",
        type=Path,
        default=[],
        help="pictures to compare file and network on, beside noise",
    )


def run(options: argparse.Namespace) -> None:
    """Export the network, compare file and network, and write the file.

    Raises:
        MissingFileError: an optional package, the checkpoint or a picture does not exist.
        InputError: the network cannot be exported, or the file computes something else; no file is written.
    """
    check_packages()
    if options.out.is_dir():
        raise InputError(f"--out is {options.out}, a folder; name a file in it, such as {options.out / 'model.onnx'}.")
    network, preprocessing = load_network(options)
    images = comparison_images(options.image, preprocessing)
    data, differences = onnx_bytes(network, preprocessing, images)
    write_atomically(options.out, data)
    size, largest = preprocessing.image_size, max(differences.values())
    names = f", {len(preprocessing.class_names)} class names" if preprocessing.class_names else ""
    print(
        printable(
            f"{options.out}: images (batch, {preprocessing.channels}, {size}, {size}) -> {', '.join(differences)}; "
            f"{len(data) / 1e6:.1f} MB{names}"
        )
    )
    print(f"onnxruntime and the network differ by at most {largest:.1e} on {len(images)} images.")


def comparison_images(paths: list[Path], preprocessing: Preprocessing) -> Tensor:
    """The pictures and two images of seeded noise, (B, C, S, S), normalised."""
    size = (2, preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    pictures = [preprocessing.normalise(preprocessing.read(path)) for path in paths]
    return torch.stack([*pictures, *noise])
