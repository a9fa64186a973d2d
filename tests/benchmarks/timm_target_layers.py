"""The target layer of the smallest model of every timm family: found, refused with a sentence, or skipped for its size.

Run by hand: `python tests/benchmarks/timm_target_layers.py [family ...]` (some minutes on one core). One line per
family, then a summary; nothing is downloaded.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import warnings
from collections import Counter

import timm
import torch
from torch import Tensor, nn

from labn.explainers import GradCAM
from labn.explainers.cam.target_layer import named_layer, search_target_layer

SIZES = ("test", "atto", "femto", "pico", "zepto", "xxs", "nano", "xxtiny", "xtiny", "xs", "tiny", "mini", "small")
CANDIDATES = 3
LARGEST = 200_000_000  # parameters; a larger model is named and not built


def by_name(name: str) -> tuple[int, float, int]:
    """Sorts a family's names from small to large: a word for the size, then the first number, then the length."""
    words = re.split(r"[_\W]", name)
    word = next((place for place, size in enumerate(SIZES) if size in words), len(SIZES))
    number = re.search(r"\d+", name.partition("_")[2] or name)
    return word, float(number[0]) if number else 1e9, len(name)


def parameters(name: str) -> int:
    """Number of parameters of a model, counted without allocating any; 0 where it cannot be built like that."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError, ValueError):
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


def smallest(family: str) -> str:
    """Name of the family's model with the fewest parameters, counted without allocating any, among the likely ones."""
    names = sorted(timm.list_models(module=family), key=by_name)[:CANDIDATES]
    sizes = {name: size for name in names if (size := parameters(name))}  # another one of the family can be built
    return min(sizes, key=lambda name: sizes[name]) if sizes else min(timm.list_models(module=family), key=by_name)


def picture(model: nn.Module) -> Tensor:
    """One random image of the size that the model was made for."""
    size = model.default_cfg.get("test_input_size") or model.default_cfg["input_size"]
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def look(name: str) -> tuple[str, str]:
    """("found", layer and shape), ("refused", sentence), ("skipped", size) or ("failed", error)."""
    if (size := parameters(name)) > LARGEST:
        return "skipped", f"{size:,} parameters"
    model = timm.create_model(name, pretrained=False).eval()
    image = picture(model)
    try:
        layer = search_target_layer(model, image)
        shapes: list[torch.Size] = []
        handle = named_layer(model, layer).register_forward_hook(lambda _m, _a, out: shapes.append(out.shape))
        maps = GradCAM(relu=False)(model, image, torch.tensor([0]))
        handle.remove()
    except ValueError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    if not maps.isfinite().all():
        return "failed", f"{layer}: the map is not finite"
    return "found", f"{layer} {tuple(shapes[0][1:])}"


def examine(family: str) -> tuple[str, str, str]:
    """Name of the family's smallest model and what `look` says of it."""
    torch.manual_seed(0)
    name = smallest(family)
    return name, *look(name)


def main() -> None:
    """Print what is found for every family, each in a process of its own, whose memory goes with it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families = [family for family in sys.argv[1:] or timm.list_modules() if timm.list_models(module=family)]
    outcomes: Counter[str] = Counter()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for family, (name, outcome, detail) in zip(families, pool.imap(examine, families)):
            outcomes[outcome] += 1
            print(f"{outcome:8} {family:22} {name:36} {detail}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))


if __name__ == "__main__":
    main()
