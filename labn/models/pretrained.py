"""A torchvision or timm classifier with given weights, and the pictures that it expects."""

from __future__ import annotations

from pathlib import Path

import timm
import torchvision
from torch import Tensor, nn

from labn.errors import InputError
from labn.io.preprocessing import Preprocessing
from labn.models.backbones import OWN, build_network, final_linear
from labn.models.checkpoints import canonical, load_backbone, read_tensors

IMAGENET = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), shorter=256)


def load_pretrained(name: str, weights: str | Path) -> tuple[nn.Module, Preprocessing]:
    """Build a whole classifier and fill all of it from a file; nothing is downloaded.

    Args:
        name: a torchvision name, or a timm name with or without `timm/` in front.
        weights: file of its weights; the number of classes is that of its classifier.

    Returns:
        The network in eval mode, and its size, mean and std: timm's own for a timm model, else ImageNet's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name, or a file that does not fill the network.
    """
    known = full_name(name)
    network = build_network(known, num_classes=1000)
    classes = _classes(network, read_tensors(weights))
    if classes not in (None, 1000):
        network = build_network(known, num_classes=classes)
    fresh = [n for n in load_backbone(network, weights).fresh if not n.endswith("num_batches_tracked")]
    if fresh:
        raise InputError(
            f"{weights} does not fill {name}: {len(fresh)} of its tensors are missing (first: {fresh[0]}); "
            "give the weights of this very model."
        )
    return network.eval(), expected_pictures(network)


def full_name(name: str) -> str:
    """The name that `build_network` takes: timm models get their `timm/` where torchvision has none of that name."""
    if "/" in name or name in OWN or name in torchvision.models.list_models(module=torchvision.models):
        return name
    return f"timm/{name}" if name in timm.list_models() else name


def expected_pictures(network: nn.Module) -> Preprocessing:
    """Size, mean and std of timm's configuration of a model; ImageNet's for all others."""
    config = getattr(network, "pretrained_cfg", None)
    if not config:
        return IMAGENET
    size = config["input_size"][-1]
    return Preprocessing(size, config["mean"], config["std"], shorter=round(size / config.get("crop_pct", 1.0)))


def _classes(network: nn.Module, tensors: dict[str, Tensor]) -> int | None:
    """Rows of the file's classifier; None where it has none under the network's name."""
    last = final_linear(network)
    name = next(n for n, module in network.named_modules() if module is last)
    found = {canonical(key): tensor for key, tensor in tensors.items()}.get(f"{name}.weight")
    return None if found is None else len(found)
