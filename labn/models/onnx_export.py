"""A classifier as an ONNX file: logits and attention map as named outputs, preprocessing and class names in it."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labn.errors import InputError, MissingFileError
from labn.inference.modes import evaluating, logits_of
from labn.io.preprocessing import Preprocessing
from labn.io.readers import first_line

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference between an output of the network and of its file, relative to max(1, largest absolute output)."""
MOST_BYTES = 2_000_000_000
"""Size that a file of one piece may have: protocol buffers end at 2 GiB."""
METADATA = "labn"
"""Prefix of the keys in the file's metadata."""


class TensorOutputs(nn.Module):
    """A classifier whose output is a tuple of tensors: logits and, from a network with an attention branch, its map.

    Args:
        network: returns logits (B, K), or an object with `.logits` and maybe `.attention` (B, 1, h, w).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, C, H, W) to logits (B, K) and, where there is one, attention (B, 1, h, w) in (0, 1)."""
        output = self.network(images)
        attention = getattr(output, "attention", None)
        return (logits_of(output),) if attention is None else (logits_of(output), attention)


def check_packages() -> None:
    """Raise MissingFileError, with the command that installs it, if a package of the export is missing."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingFileError(
                f"The export needs the package {package}, an optional one; in the project folder: "
                'pip install -e ".[export]".'
            )


def onnx_bytes(network: nn.Module, preprocessing: Preprocessing, images: Tensor) -> tuple[bytes, dict[str, float]]:
    """A classifier as the bytes of an ONNX file, compared with the network by onnxruntime.

    The input is `images` (batch, C, S, S) float32, prepared as the metadata say; the outputs are `logits` (batch, K)
    and, of a network with an attention branch, `attention` (batch, 1, h, w), the map before its threshold. The metadata
    are `labn.preprocessing` and `labn.class_names`, as JSON.

    Args:
        network: the classifier, on the CPU; its mode is restored.
        preprocessing: of its input.
        images: (B, C, S, S) with B >= 2, on which network and file are compared, all at once and the first one alone.

    Returns:
        The bytes, and for every output its largest difference over the images.

    Raises:
        MissingFileError: a package of the extra `export` is not installed.
        InputError: the network cannot be exported, takes too many bytes, or the file computes something else.
    """
    check_packages()
    size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    if size > MOST_BYTES:
        raise InputError(f"The network has {size / 1e9:.1f} GB of weights; an ONNX file of one piece holds 2 GB.")
    with torch.no_grad(), evaluating(network):
        expected = TensorOutputs(network)(images)
        data = _exported(network, preprocessing, images[:2], ["logits", "attention"][: len(expected)])
        alone = TensorOutputs(network)(images[:1])
    differences = _differences(data, images, expected)
    for name, difference in _differences(data, images[:1], alone).items():
        differences[name] = max(differences[name], difference)
    bounds = {name: TOLERANCE * max(1.0, float(value.abs().max())) for name, value in zip(differences, expected)}
    for name, difference in differences.items():
        if not difference <= bounds[name]:  # also for NaN
            raise InputError(
                f"The {name} of the exported file differ from the network's by {difference:.3g}, above "
                f"{bounds[name]:.3g}; the file would compute something else."
            )
    return data, differences


def _exported(network: nn.Module, preprocessing: Preprocessing, images: Tensor, outputs: list[str]) -> bytes:
    try:
        with _quiet():
            program = torch.onnx.export(
                TensorOutputs(network),
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                verbose=False,
            )
    # Any error: the exporter fails in many ways on operations that it does not know.
    except Exception as error:
        raise InputError(f"{type(network).__name__} cannot be exported to ONNX: {first_line(_root(error))}") from error
    assert program is not None
    model: Any = program.model_proto
    plain = preprocessing.plain()
    for key, value in {"class_names": plain.pop("class_names"), "preprocessing": plain}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"{METADATA}.{key}", json.dumps(value)
    data: bytes = model.SerializeToString()
    return data


def _root(error: Exception) -> Exception:
    """The first error of a chain, which names the operation; the others tell the steps of the exporter."""
    return _root(error.__cause__) if isinstance(error.__cause__, Exception) else error


def _differences(data: bytes, images: Tensor, expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Output -> its largest absolute difference from the expected one, computed by onnxruntime on the CPU."""
    import onnxruntime  # an optional package

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": images.numpy()})
    pairs = zip(names, found, expected)
    return {name: float(np.abs(value - wanted.numpy()).max()) for name, value, wanted in pairs}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notes and warnings about its own packages; its errors are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
