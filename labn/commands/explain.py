"""`python cli.py explain --image a.jpg ...`: predicted class, confidence, overlays and raw maps of single pictures."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from labn.api import explain
from labn.errors import InputError, MissingFileError, UserError, printable
from labn.explainers import EXPLAINERS, Explainer, explainer_by_name
from labn.inference.modes import evaluating, run_model
from labn.io.atomic import write_atomically
from labn.io.images import image_files
from labn.io.preprocessing import Preprocessing
from labn.io.readers import non_utf8_name, read_text, whole_number
from labn.io.table_cells import csv_bytes
from labn.models.backbones import import_path_of
from labn.models.pretrained import load_pretrained
from labn.postprocess.overlay import displayable, overlay_figure, png_bytes
from labn.results.shard_index import readable_name

METHODS = tuple(name for name in EXPLAINERS if name != "crp")
"""Methods for classifiers."""
DETAILS = f"""\
Prints the predicted class and confidence of every picture and writes to --out: overlays/<picture>.png (the picture
and the map of every method, with colour bars), maps/<picture>.safetensors (raw maps by method, not normalised),
predictions.csv and, with --metric, scores.csv.

The network is a checkpoint of this command line (--ckpt), which contains its preprocessing and class names, or a
torchvision or timm model, or a class of your own, with a file of weights (--model, --weights). Nothing is downloaded.

{textwrap.fill(f"methods: {', '.join(METHODS)}; -NAME negates (write --method=-labn)", 110)}

examples:
  python cli.py explain --image a.jpg --ckpt runs/quickstart/checkpoints/best.ckpt --method labn gradcam
  python cli.py explain --image my/pictures --model resnet50d --weights resnet50d.safetensors --method lrp c3lrp
  python cli.py explain --image my/pictures --ckpt best.ckpt --method gradcam --metric pid16 average_drop
  python cli.py explain --image my/pictures --ckpt best.ckpt --method rise --option rise.n_masks=1000
"""
OVERLAYS = "overlays"
PREDICTIONS = ("file", "class", "class_name", "confidence", "explained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--image", nargs="+", type=Path, required=True, help="picture files, or folders of pictures without subfolders"
    )
    add_network_arguments(parser)
    parser.add_argument(
        "--method", nargs="+", action="extend", required=True, metavar="NAME", help="methods, listed below"
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="metrics that need no masks, such as pid16, which score the maps beside `random` and `constant`",
    )
    parser.add_argument(
        "--option",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="arguments of the methods, such as rise.n_masks=500 or lrp.dead=uniform",
    )
    parser.add_argument("--target", help="name or number of the class to explain (default: the predicted one)")
    parser.add_argument("--out", type=Path, default=Path("explained"), help="folder to write to (default: explained)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `load_network`: the network and its preprocessing."""
    parser.add_argument("--ckpt", type=Path, help="checkpoint of a run")
    parser.add_argument(
        "--model",
        help="name of a torchvision or timm model, or import path of your own class (my_net.SmallNet); beside --ckpt, "
        "the class that the checkpoint's network may be built with",
    )
    parser.add_argument("--weights", type=Path, help="file of the model's weights (.safetensors, .pt, .pth)")
    parser.add_argument("--class_names", type=Path, help="text file with one class name per line")
    parser.add_argument("--image_size", type=int, help="side of the network's input in pixels (default: its own)")
    for name in ("--mean", "--std"):
        parser.add_argument(
            name,
            nargs="+",
            type=float,
            help="of the normalisation, per channel (default: the model's or ImageNet's)",
        )


class FailedMethodsError(UserError):
    """Some methods gave no map; the results of the others are written."""

    exit_status = 1


def run(options: argparse.Namespace) -> None:
    """Explain every picture.

    Raises:
        MissingFileError: a picture, folder or file of weights does not exist.
        InputError: a method, class, model or device is unknown, no picture is readable, or an output would replace a
            picture of `--image`.
    """
    arguments = method_arguments(options.option, options.method)
    explainers = {method: explainer_by_name(method, **arguments.get(method, {})) for method in options.method}
    for method in explainers:
        if method.lstrip("-") not in METHODS:
            raise InputError(f"{method} explains detectors; use `cli.py test` with callbacks.DetectionCallback.")
    scores = None
    if options.metric:
        # torchmetrics and scipy, whose import takes a second, are needed for scores alone.
        scores = importlib.import_module("labn.commands.picture_scores").PictureScores(explainers, options.metric)
    check_device(options.device)
    files = _files(options.image)
    # Running the command on the folder of its own overlays would replace the pictures that it reads.
    if any(path.resolve().parent == (options.out / OVERLAYS).resolve() for path in files):
        raise InputError(f"--out is {options.out}, where overlays would replace pictures that --image names.")
    network, preprocessing = load_network(options)
    network = network.to(options.device)
    target = None if options.target is None else class_number(options.target, preprocessing)
    rows = []
    failed: dict[str, str] = {}
    taken: dict[str, float] = {}
    for number, (path, name, image) in enumerate(_readable(files, preprocessing)):
        row, maps, chosen = _explain(
            network, image.to(options.device), preprocessing, options, explainers, target, number, name, failed, taken
        )
        explained = f", explained {row[3]}" if row[3] != row[1] else ""
        print(printable(f"{path}: {row[1]} ({row[2]:.3f}){explained}"), flush=True)
        if number == 0:
            say_time(taken, len(files) - 1)
        rows.append((str(path), *row))
        if scores is not None:
            index, shown = torch.tensor([number]), (str(path), row[3])
            scores.add(network, image[None].to(options.device), maps, chosen, index, preprocessing, shown)
    if not rows:
        raise InputError("None of the pictures of --image is readable; the warnings above say why.")
    write_atomically(options.out / "predictions.csv", csv_bytes(PREDICTIONS, rows))
    if scores is not None:
        print(f"\n{len(rows)} pictures, mean [95 % interval]\n{scores.write(options.out)}")
    also = " and predictions.csv" if scores is None else ", predictions.csv and scores.csv"
    print(f"{options.out}: overlays/, maps/{also} of {len(rows)} pictures")
    if failed:
        reasons = "; ".join(f"{method}: {reason}" for method, reason in failed.items())
        raise FailedMethodsError(f"{len(failed)} of {len(options.method)} methods gave no map. {reasons}")


def method_arguments(words: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments by method, from words METHOD.NAME=VALUE whose values are read as YAML.

    Raises:
        InputError: a word has another form, or names no method of `--method`.

    Example:
        >>> method_arguments(["rise.n_masks=500", "lrp.dead=uniform"], ["lrp", "rise"])
        {'rise': {'n_masks': 500}, 'lrp': {'dead': 'uniform'}}
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        method, _, name = key.rpartition(".")
        if not equals or method not in methods or not name.isidentifier():
            raise InputError(
                f"--option is {word[:100]!r}; it must be METHOD.NAME=VALUE with a method of --method "
                f"({', '.join(methods)}), such as {methods[0]}.NAME=VALUE."
            )
        try:
            found.setdefault(method, {})[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {word[:100]!r}: the value cannot be read as YAML; quote it.") from error
    return found


def say_time(taken: dict[str, float], left: int) -> None:
    """Print how long the pictures that are left take, unless that is less than a minute.

    Args:
        taken: seconds of the first picture by method.
        left: number of pictures after it.
    """
    rest = sum(taken.values()) * left
    if rest < 60:
        return
    slowest = max(taken, key=taken.__getitem__)
    share = taken[slowest] / sum(taken.values())
    print(
        f"{left} pictures are left, about {math.ceil(rest / 60)} minutes, of which {slowest} takes {share:.0%}; "
        f"--option {slowest}.NAME=VALUE sets its arguments.",
        flush=True,
    )


def check_device(name: str) -> None:
    """Raise InputError unless a tensor can be created on the device and copied back."""
    try:
        torch.zeros(1, device=name).cpu()
    # Any error: torch raises different ones for a missing driver, package, device, or kind of device.
    except Exception as error:
        raise InputError(
            f"--device is {name!r}, which cannot be used here; it must be cpu, or what torch finds, such as cuda."
        ) from error


def load_network(options: argparse.Namespace) -> tuple[nn.Module, Preprocessing]:
    """The network that the arguments name and its preprocessing, with `--image_size` and `--class_names` applied.

    Raises:
        InputError: the network is named in neither or both ways, the image size is below 1, `--mean` or `--std` does
            not have one value per channel, or the checkpoint has no preprocessing.
    """
    own = [options.model] if import_path_of(options.model or "") else []
    if options.ckpt is None:
        complete = options.model is not None and options.weights is not None
    else:
        complete = options.weights is None and (options.model is None or own != [])
    if not complete:
        raise InputError(
            "Name the network by --ckpt, or by --model and --weights together; beside --ckpt, --model may only name "
            "a class of your own."
        )
    if options.ckpt is not None:
        # Lightning, whose import takes seconds, is needed for checkpoints alone.
        network, stored = importlib.import_module("labn.modules.restore").restore(options.ckpt, own)
        if stored is None:
            raise InputError(f"{options.ckpt} has no preprocessing, because it was saved without a data module.")
        preprocessing = stored
    else:
        network, preprocessing = load_pretrained(options.model, options.weights)
        if own:
            _say_assumed(options, preprocessing)
    if options.class_names is not None:
        preprocessing = replace(preprocessing, class_names=read_text(options.class_names).splitlines())
    for name in ("mean", "std"):
        if (values := getattr(options, name)) is not None:
            if len(values) != preprocessing.channels:
                raise InputError(f"--{name} has {len(values)} values; give {preprocessing.channels}, one per channel.")
            if not all(0 <= value <= 1 for value in values):
                raise InputError(f"--{name} is {values}; pixels lie between 0 and 1 here: divide the values by 255.")
            preprocessing = replace(preprocessing, **{name: values})
    if options.image_size is not None:
        if options.image_size < 1:
            raise InputError(f"--image_size is {options.image_size}; it must be at least 1 pixel.")
        # The crop keeps its share of the picture: the shorter side is scaled by the same factor.
        scale = options.image_size / preprocessing.image_size
        shorter = None if preprocessing.shorter is None else round(preprocessing.shorter * scale)
        preprocessing = replace(preprocessing, image_size=options.image_size, shorter=shorter)
    return network, preprocessing


def _say_assumed(options: argparse.Namespace, preprocessing: Preprocessing) -> None:
    """Print what is taken for the preprocessing of a network of the user's own where the arguments do not say it."""
    facts = {
        "image_size": f"{preprocessing.image_size} pixels",
        "mean": f"mean {preprocessing.mean}",
        "std": f"std {preprocessing.std}",
    }
    if assumed := {name: fact for name, fact in facts.items() if getattr(options, name) is None}:
        arguments = ", ".join(f"--{name}" for name in assumed)
        print(f"{options.model}: pictures are prepared with {', '.join(assumed.values())}; {arguments} change that.")


def class_number(word: str, preprocessing: Preprocessing) -> int:
    """Index of the class that `--target` names.

    Raises:
        InputError: it is neither a class name nor a number.
    """
    if word in preprocessing.class_names:
        return preprocessing.class_names.index(word)
    number = whole_number(word)
    if number is None:
        names = ", ".join(preprocessing.class_names[:10]) or "none is known; see --class_names"
        raise InputError(f"--target is {word[:100]!r}; it must be a number or a class name ({names}).")
    return number


def _explain(
    network: nn.Module,
    image: Tensor,
    preprocessing: Preprocessing,
    options: argparse.Namespace,
    explainers: Mapping[str, Explainer],
    target: int | None,
    number: int,
    name: str,
    failed: dict[str, str],
    taken: dict[str, float],
) -> tuple[tuple[int, str, float, str], dict[str, Tensor], int]:
    """Write overlay and maps of one picture (C, H, W).

    Methods that do not suit the network go to `failed`, and seconds by method to `taken`.

    Returns:
        Predicted class, its name, its probability, and the name of the explained class; the maps, (H, W) by method;
        and the number of the explained class.
    """
    with torch.no_grad(), evaluating(network, image.device.type):
        probabilities = run_model(network, image[None]).softmax(1)[0]
    predicted = int(probabilities.argmax())
    chosen = predicted if target is None else target
    # Checked here, because the number of classes is known only after a forward.
    if options.class_names is not None and len(preprocessing.class_names) != len(probabilities):
        raise InputError(
            f"--class_names {options.class_names} has {len(preprocessing.class_names)} names, but the network has "
            f"{len(probabilities)} classes; give one line per class."
        )
    if chosen >= len(probabilities):
        raise InputError(f"--target is class {chosen}; the network has {len(probabilities)} classes, from 0.")
    # The position of the picture seeds random methods such as RISE.
    index = torch.tensor([number])
    maps = {}
    for method, given in explainers.items():
        start = time.perf_counter()
        try:
            explainer = given.for_normalised(preprocessing.mean, preprocessing.std)
            maps[method] = explain(network, image[None], explainer, chosen, indices=index).maps[0].cpu()
        except UserError as error:
            failed[method] = str(error)
        # Any error: a method may not suit a network in many ways, and must not take the others' maps with it.
        except Exception as error:
            failed[method] = f"{type(error).__name__}: {error}"
        taken[method] = time.perf_counter() - start
    if not maps and number == 0:
        # Without any map of the first picture the first reason is the answer.
        raise InputError(next(iter(failed.values())))
    confidence = float(probabilities[predicted])
    names = preprocessing.class_name(predicted), preprocessing.class_name(chosen)
    figure = overlay_figure(
        displayable(image, preprocessing.mean, preprocessing.std),
        {method: heat.numpy() for method, heat in maps.items()},
        title=f"{name}: {names[0]} ({confidence:.3f}), explained {names[1]}",
    )
    write_atomically(options.out / OVERLAYS / f"{name}.png", png_bytes(figure))
    write_atomically(options.out / "maps" / f"{name}.safetensors", safetensors.torch.save(maps))
    return (predicted, names[0], confidence, names[1]), maps, chosen


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        if not path.exists():
            raise MissingFileError(f"--image {path} does not exist.")
        pictures = image_files(path) if path.is_dir() else [path]
        if not pictures:
            raise MissingFileError(f"--image {path} holds no pictures of its own; its subfolders are not searched.")
        files += pictures
    return files


def _readable(files: Sequence[Path], preprocessing: Preprocessing) -> Iterator[tuple[Path, str, Tensor]]:
    """Path, unique name and normalised image of every readable picture; others are skipped with a warning."""
    taken: set[str] = set()
    for path in files:
        if shown := non_utf8_name(str(path)):
            warnings.warn(f"The name of picture {shown} is not UTF-8; rename the file. It is skipped.", stacklevel=2)
            continue
        try:
            image = preprocessing.normalise(preprocessing.read(path))
        except ValueError as error:
            warnings.warn(f"{error} It is skipped.", stacklevel=2)
            continue
        stem = readable_name(path.stem)
        # cat.jpg and cat.png would otherwise write the same overlay.
        numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        name = next(name for name in numbered if name not in taken)
        taken.add(name)
        yield path, name, image
