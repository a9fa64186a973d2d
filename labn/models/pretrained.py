"""Torchvision and timm classifiers with weights from a file, and their preprocessing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from labn.errors import InputError
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from labn.models.backbones import OWN_NETWORKS, build_network, import_path_of, is_import_path
from labn.models.checkpoints import canonical, load_backbone, tensors_for

IMAGENET = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, shorter=256)


def load_pretrained(name: str, weights: str | Path) -> tuple[nn.Module, Preprocessing]:
    """Build a classifier and load all its weights from a file; nothing is downloaded.

    Args:
        name: a torchvision name, a timm name with or without the prefix `timm/`, or the import path of a class.
        weights: file of the weights; its classifier determines the number of classes.

    Returns:
        The network in eval mode, and its preprocessing: timm's for a timm model, else ImageNet's. A torchvision or timm
        network of 1000 classes has the names of ImageNet's.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the name is unknown, or the file lacks tensors of the network.
    """
    full_name = backbone_name(name)
    network = build_network(full_name, num_classes=1000)
    classes = _classes(network, tensors_for(network, weights))
    if classes != 1000:
        network = build_network(full_name, num_classes=classes)
    report = load_backbone(network, weights)
    fresh = [n for n in report.fresh if not n.endswith("num_batches_tracked")]
    if report.renamed and not fresh:
        warnings.warn(
            f"The {len(report.taken)} tensors of {weights} have other names than those of {name} and were read in "
            "order, because all shapes agree. They also fit any twin of the same shapes, such as timm's tf_ variants: "
            "if the probabilities look low, check the name of the model.",
            stacklevel=2,
        )
    if fresh:
        raise InputError(
            f"{weights} does not fill {name}: {len(fresh)} of its tensors are missing (first: {fresh[0]}); "
            "give weights of this model."
        )
    preprocessing = preprocessing_of(network)
    if classes == 1000 and full_name not in OWN_NETWORKS and import_path_of(full_name) is None:
        preprocessing = replace(preprocessing, class_names=imagenet_names())
    return network.eval(), preprocessing


def imagenet_names() -> list[str]:
    """The names of ImageNet's 1000 classes, in the usual order of classifiers."""
    from torchvision.models import ResNet50_Weights  # a second, which `import labn` need not cost

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def backbone_name(name: str) -> str:
    """The name for `build_network`: `timm/` is put before names that only timm has."""
    if "/" in name or name in OWN_NETWORKS or is_import_path(name):
        return name
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        return name
    import timm  # after torchvision, because it takes three times as long

    return f"timm/{name}" if name in timm.list_models() else name


def preprocessing_of(network: nn.Module) -> Preprocessing:
    """The preprocessing in a timm model's configuration; ImageNet's for other networks."""
    config = getattr(network, "pretrained_cfg", None)
    if not config:
        return IMAGENET
    size = config["input_size"][-1]
    return Preprocessing(size, config["mean"], config["std"], shorter=round(size / config.get("crop_pct", 1.0)))


def _classes(network: nn.Module, tensors: dict[str, Tensor]) -> int:
    """Number of classes of the classifier among `tensors`; 1000 where there is none.

    A file of other names, which is read in order, has the classifier in its last matrix.
    """
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        return 1000
    name, layer = layers[-1]
    by_name = {canonical(key): tensor for key, tensor in tensors.items()}
    if f"{name}.weight" in by_name:
        return len(by_name[f"{name}.weight"])
    known = by_name.keys() & {canonical(key) for key in network.state_dict()}
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2 and tensor.shape[1] == layer.in_features]
    return len(matrices[-1]) if matrices and not known else 1000
