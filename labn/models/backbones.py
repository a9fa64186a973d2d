"""Networks by name, and the division of any ResNet into stem, residual blocks and head."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from labn.errors import InputError
from labn.inference.modes import evaluating, logits_of
from labn.models.cbam import with_cbam
from labn.models.checkpoints import load_backbone
from labn.models.lambda_networks.resnet import (
    LambdaResNet,
    lambda_resnet26,
    lambda_resnet38,
    lambda_resnet50,
    magnetogram_net,
)

OWN_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lambda_resnet26": lambda_resnet26,
    "lambda_resnet38": lambda_resnet38,
    "lambda_resnet50": lambda_resnet50,
    "lambda_resnet": LambdaResNet,
    "magnetogram_net": magnetogram_net,
}
CBAM_PREFIX = "cbam/"
"""Beginning of the name of a network with a CBAM block; it may stand there more than once."""
# Attributes of torchvision's auxiliary classifiers (GoogLeNet, Inception v3) -> their value in a network without them.
AUXILIARY_HEADS = {"aux1": None, "aux2": None, "AuxLogits": None, "aux_logits": False}


def build_network(
    backbone: str | nn.Module,
    num_classes: int = 2,
    in_channels: int = 3,
    weights: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a classifier by name; no weights are ever downloaded.

    GoogLeNet and Inception v3 are built without their auxiliary classifiers.

    Args:
        backbone: a name of `OWN_NETWORKS` (`lambda_resnet50`), a torchvision name (`resnet50`), a timm name after
            `timm/` (`timm/resnet50d`), any of these after `cbam/` (`cbam/resnet50`, with a CBAM block behind the last
            feature maps, see `labn.models.cbam.with_cbam`), the import path of a class or function of your own
            (`my_net.SmallNet`), or a module, which is returned unchanged.
        num_classes: number of classes; a module must have the same number. A class or function of your own gets it
            where it has an argument of this name, as it gets `in_channels`.
        in_channels: channels of the images; a torchvision network gets a new first convolution where this is not 3.
        weights: local file of weights, see `labn.models.checkpoints.load_backbone`.
        options: further arguments of the network's constructor.

    Returns:
        A network (B, in_channels, H, W) -> logits (B, num_classes).

    Raises:
        InputError: the name is unknown, an import path leads to no network, or a module has other classes or is given
            options.

    Example:
        >>> import torch
        >>> network = build_network("resnet18", num_classes=5, in_channels=1)
        >>> network(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 5])
    """
    if isinstance(backbone, nn.Module):
        network = _check_ready(backbone, num_classes, options)
    elif backbone in OWN_NETWORKS:
        network = OWN_NETWORKS[backbone](num_classes=num_classes, in_channels=in_channels, **options)
    elif backbone.startswith(CBAM_PREFIX):
        network = with_cbam(build_network(backbone.removeprefix(CBAM_PREFIX), num_classes, in_channels, **options))
    elif backbone.startswith("timm/"):
        network = _from_timm(backbone.removeprefix("timm/"), num_classes, in_channels, options)
    elif is_import_path(backbone):
        network = _imported(backbone, {"num_classes": num_classes, "in_channels": in_channels}, options)
    else:
        network = _from_torchvision(backbone, num_classes, in_channels, options)
    if weights is not None:
        load_backbone(network, weights)
    return network


def is_import_path(name: str) -> bool:
    """Whether a backbone's name is the import path of a class or function.

    Example:
        >>> is_import_path("my_net.SmallNet"), is_import_path("timm/resnet50d"), is_import_path("resnet50")
        (True, False, False)
    """
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) is not None


def import_path_of(backbone: str) -> str | None:
    """The import path that `build_network` would import for a backbone's name; None where it imports nothing.

    Example:
        >>> import_path_of("cbam/cbam/my_net.SmallNet"), import_path_of("cbam/resnet50")
        ('my_net.SmallNet', None)
    """
    while backbone.startswith(CBAM_PREFIX):
        backbone = backbone.removeprefix(CBAM_PREFIX)
    return backbone if is_import_path(backbone) else None


def _imported(path: str, arguments: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """The network of an import path; `arguments` that its constructor does not have are left out."""
    module, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"backbone is {path!r}, which cannot be imported ({error}); the file must lie beside cli.py or on "
            "PYTHONPATH."
        ) from error
    if not callable(make) or (isinstance(make, type) and not issubclass(make, nn.Module)):
        raise InputError(f"backbone is {path!r}; it must be a subclass of nn.Module, or a function that makes one.")
    known = inspect.signature(make).parameters
    given = {key: value for key, value in arguments.items() if key in known}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if not takes_any and (unknown := set(options) - set(known)):
        raise InputError(f"{path} has no argument {', '.join(sorted(unknown))}; it has {', '.join(known)}.")
    network = make(**{**given, **options})
    if not isinstance(network, nn.Module):
        raise InputError(f"backbone is {path!r}, which made a {type(network).__name__}; it must make an nn.Module.")
    return network


@dataclass(frozen=True)
class Backbone:
    """A network as a chain of stem, residual blocks and head. The modules are the network's own and not copies.

    Attributes:
        stem: name -> module, for the modules before the first residual block.
        blocks: (stage, name in the stage, block) for every residual block, in order.
        head: name -> module, for the modules after the last block; the last one is the classifier.

    Example:
        >>> chain = backbone_of(build_network("resnet18"))
        >>> list(chain.stem), len(chain.blocks), list(chain.head)
        (['conv1', 'bn1', 'relu', 'maxpool'], 8, ['avgpool', 'flatten', 'fc'])
    """

    stem: dict[str, nn.Module]
    blocks: tuple[tuple[str, str, nn.Module], ...]
    head: dict[str, nn.Module]

    def split(self, after: int) -> tuple[nn.Sequential, nn.Sequential]:
        """Split after `after` blocks (B of JSAI 2022, section 3.1) into feature extractor and perception branch.

        Tensors keep their names in the network (`layer2.3.conv1.weight`), also for a split inside a stage. 0 splits
        after the stem, and the number of blocks splits before the head.

        Raises:
            InputError: `after` is negative or above the number of blocks.
        """
        if not 0 <= after <= len(self.blocks):
            raise InputError(f"split is {after}; this backbone has {len(self.blocks)} blocks: 0 to {len(self.blocks)}.")
        front = OrderedDict([*self.stem.items(), *_stages(self.blocks[:after]).items()])
        back = OrderedDict([*_stages(self.blocks[after:]).items(), *self.head.items()])
        return nn.Sequential(front), nn.Sequential(back)

    def name_of(self, after: int) -> str:
        """Name of the module behind which `split(after)` divides the network."""
        if after:
            return ".".join(self.blocks[after - 1][:2])
        return list(self.stem)[-1]

    @property
    def last_stage_depth(self) -> int:
        """Number of blocks in the last stage."""
        return sum(stage == self.blocks[-1][0] for stage, _, _ in self.blocks)


def backbone_of(network: nn.Module) -> Backbone:
    """Divide a ResNet (of this project, torchvision, timm, or one built alike) into stem, blocks and head.

    Args:
        network: a network whose children are, in order, the stem's modules, `layer1`, `layer2`, ... (Sequential), and
            the head's modules.

    Raises:
        InputError: the children have other names, or the network does more than run its children in order.

    Example:
        >>> backbone_of(build_network("resnet50")).last_stage_depth
        3
    """
    children = dict(network.named_children())
    stages = [name for name in children if re.fullmatch(r"layer\d+", name)]
    linear = [module for module in children.values() if isinstance(module, nn.Linear)]
    if not stages or not linear:
        raise InputError(
            f"{type(network).__name__} has no blocks that can be counted, as those of a ResNet (stem, layer1, "
            "layer2, ..., and a head with a final linear layer) or of a network of timm with feature stages: let split "
            "be the name of a module, such as features.8."
        )
    names = list(children)
    first, last = names.index(stages[0]), names.index(stages[-1])
    blocks = tuple((stage, name, block) for stage in stages for name, block in children[stage].named_children())
    stem = {name: children[name] for name in names[:first]}
    head = _head({name: children[name] for name in names[last + 1 :]}, float(getattr(network, "drop_rate", 0.0)))
    backbone = Backbone(stem, blocks, head)
    _check_chain(network, backbone)
    return backbone


def chain_of(network: nn.Module) -> Backbone | None:
    """`backbone_of` a ResNet; None for another network whose feature stages timm knows.

    Raises:
        InputError: the network is neither.
    """
    try:
        return backbone_of(network)
    except InputError:
        if getattr(network, "feature_info", None):
            return None
        raise


def input_channels(network: nn.Module) -> int:
    """Number of input channels of a network's first convolution or linear layer."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, nn.Linear):
            return module.in_features
    raise InputError(f"{type(network).__name__} has neither a convolution nor a linear layer.")


def final_linear(network: nn.Module) -> nn.Linear:
    """The last linear layer of a network.

    Raises:
        InputError: the network has no linear layer.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(f"{type(network).__name__} has no linear layer to classify with.")
    return layers[-1]


def _stages(blocks: tuple[tuple[str, str, nn.Module], ...]) -> dict[str, nn.Sequential]:
    stages: dict[str, OrderedDict[str, nn.Module]] = {}
    for stage, name, block in blocks:
        stages.setdefault(stage, OrderedDict())[name] = block
    return {stage: nn.Sequential(members) for stage, members in stages.items()}


def _head(modules: dict[str, nn.Module], drop_rate: float) -> dict[str, nn.Module]:
    """Add modules for the flattening and dropout that torchvision and timm do in `forward`."""
    *body, (name, linear) = modules.items()
    extra: dict[str, nn.Module] = {} if "flatten" in modules else {"flatten": nn.Flatten()}
    if drop_rate:
        extra["dropout"] = nn.Dropout(drop_rate)
    return {**dict(body), **extra, name: linear}


@torch.no_grad()
def _check_chain(network: nn.Module, backbone: Backbone) -> None:
    """Compare the chain's logits with the network's for one random image.

    The `forward` of a network from elsewhere may do more than run its children in order.
    """
    parameter = next(network.parameters())
    noise = torch.randn(1, input_channels(network), 64, 64, generator=torch.Generator().manual_seed(0))
    image = noise.to(parameter)
    front, back = backbone.split(0)
    with evaluating(nn.ModuleList([network, front, back]), image.device.type):
        same = torch.allclose(back(front(image)), logits_of(network(image)), rtol=1e-3, atol=1e-4)
    if not same:
        raise InputError(
            f"{type(network).__name__}.forward does more than run its children in order; it cannot be split."
        )


def _check_ready(network: nn.Module, num_classes: int, options: dict[str, Any]) -> nn.Module:
    classes = final_linear(network).out_features
    if classes != num_classes or options:
        raise InputError(
            f"backbone is a network with {classes} classes; give num_classes={classes} and no further options "
            f"(got num_classes={num_classes}, options {sorted(options)})."
        )
    return network


def _near(name: str, known: Sequence[str]) -> str:
    """The known names that are nearly `name`, as the end of a sentence; empty where there is none."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    return f"; did you mean {', '.join(near)}" if near else ""


def _from_timm(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    import timm  # three seconds, which `import labn` need not cost

    if name not in (known := timm.list_models()):
        raise InputError(
            f"backbone is 'timm/{name}', which this timm ({timm.__version__}) does not know{_near(name, known)}."
        )
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)


def _from_torchvision(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    import torchvision  # a second, which `import labn` need not cost

    if name not in (known := torchvision.models.list_models(module=torchvision.models)):
        own = ", ".join(OWN_NETWORKS)
        raise InputError(
            f"backbone is {name!r}{_near(name, [*OWN_NETWORKS, *known])}; known are {own}, torchvision's classifiers, "
            "timm's after 'timm/', any of them with a CBAM block after 'cbam/', and import paths of your "
            "own, such as my_net.SmallNet."
        )
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    _drop_auxiliary_heads(network)
    if in_channels != 3:
        _change_input(network, in_channels)
    return network


def _drop_auxiliary_heads(network: nn.Module) -> None:
    """Remove the auxiliary classifiers of GoogLeNet and Inception v3, as torchvision does for its trained weights."""
    # Their losses are not computed: they would stay random, and DDP raises for parameters without a gradient.
    for name, value in AUXILIARY_HEADS.items():
        if hasattr(network, name):
            setattr(network, name, value)


def _change_input(network: nn.Module, in_channels: int) -> None:
    """Give the first convolution, in place, new random weights for another number of input channels."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = in_channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_channels, *first.kernel_size))
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
