"""Networks by name, and one way to see any ResNet as stem, residual blocks and head."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
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

OWN: dict[str, Callable[..., nn.Module]] = {
    "lambda_resnet26": lambda_resnet26,
    "lambda_resnet38": lambda_resnet38,
    "lambda_resnet50": lambda_resnet50,
    "lambda_resnet": LambdaResNet,
    "magnetogram_net": magnetogram_net,
}
WITHOUT_AUXILIARY = {"aux1": None, "aux2": None, "AuxLogits": None, "aux_logits": False}


def build_network(
    backbone: str | nn.Module,
    num_classes: int = 2,
    in_channels: int = 3,
    weights: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a whole classifier; nothing is ever downloaded.

    Args:
        backbone: an own name (`OWN`), a torchvision name (`resnet18`, `resnet50`), a timm name after `timm/`
            (`timm/resnet50d`), any of these after `cbam/` (`cbam/resnet50`: with a CBAM block behind its last feature
            maps, `labn.models.cbam.with_cbam`), or a ready module, returned as it is.
        num_classes: number of classes; a ready module must have as many.
        in_channels: channels of the images; where torchvision fixes 3, the first convolution is made anew. GoogLeNet
            and Inception v3 come without their auxiliary classifiers, whose weights in a file go unused.
        weights: local file to start from, taken as `labn.models.checkpoints.load_backbone` does.
        options: further arguments of the network's own constructor.

    Returns:
        A network (B, in_channels, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: unknown name, or a ready module with other classes or with options.
    """
    if isinstance(backbone, nn.Module):
        network = _ready(backbone, num_classes, options)
    elif backbone in OWN:
        network = OWN[backbone](num_classes=num_classes, in_channels=in_channels, **options)
    elif backbone.startswith("cbam/"):
        network = with_cbam(build_network(backbone.removeprefix("cbam/"), num_classes, in_channels, **options))
    elif backbone.startswith("timm/"):
        network = _from_timm(backbone.removeprefix("timm/"), num_classes, in_channels, options)
    else:
        network = _from_torchvision(backbone, num_classes, in_channels, options)
    if weights is not None:
        load_backbone(network, weights)
    return network


@dataclass(frozen=True)
class Backbone:
    """A network as a chain: `stem`, then `blocks`, then `head`; its modules are the network's own, not copies.

    Attributes:
        stem: named modules before the first residual block.
        blocks: (stage, name inside the stage, block) for every residual block, in order.
        head: named modules after the last block, the classifier last.
    """

    stem: dict[str, nn.Module]
    blocks: tuple[tuple[str, str, nn.Module], ...]
    head: dict[str, nn.Module]

    def split(self, after: int) -> tuple[nn.Sequential, nn.Sequential]:
        """Cut after `after` blocks (B of JSAI 2022, section 3.1): (feature extractor, perception branch).

        Both keep the names of the network that they come from (`layer2.3.conv1.weight`), also where the cut falls
        inside a stage. 0 cuts after the stem; the number of blocks leaves only the head behind the cut.

        Raises:
            ValueError: `after` is outside of the valid range, which is named.
        """
        if not 0 <= after <= len(self.blocks):
            raise InputError(f"split is {after}; this backbone has {len(self.blocks)} blocks: 0 to {len(self.blocks)}.")
        front = OrderedDict([*self.stem.items(), *_stages(self.blocks[:after]).items()])
        back = OrderedDict([*_stages(self.blocks[after:]).items(), *self.head.items()])
        return nn.Sequential(front), nn.Sequential(back)

    @property
    def last_stage_depth(self) -> int:
        """Number of blocks in the last stage."""
        return sum(stage == self.blocks[-1][0] for stage, _, _ in self.blocks)


def backbone_of(network: nn.Module) -> Backbone:
    """See a ResNet (own, torchvision, timm, or one built alike) as stem, blocks and head.

    Args:
        network: its children, in order: stem modules, `layer1`, `layer2`, ... (Sequential), then head modules.

    Raises:
        ValueError: the children are named otherwise, or running them in order is not what the network does.
    """
    children = dict(network.named_children())
    stages = [name for name in children if re.fullmatch(r"layer\d+", name)]
    linear = [module for module in children.values() if isinstance(module, nn.Linear)]
    if not stages or not linear:
        raise InputError(
            f"{type(network).__name__} cannot carry an attention branch: its children must be a stem, layer1, layer2, "
            "... and a head with a final linear layer, as in a ResNet."
        )
    names = list(children)
    first, last = names.index(stages[0]), names.index(stages[-1])
    blocks = tuple((stage, name, block) for stage in stages for name, block in children[stage].named_children())
    stem = {name: children[name] for name in names[:first]}
    head = _head({name: children[name] for name in names[last + 1 :]}, float(getattr(network, "drop_rate", 0.0)))
    backbone = Backbone(stem, blocks, head)
    _check_chain(network, backbone)
    return backbone


def input_channels(part: nn.Module) -> int:
    """Channels that a part of a network expects: those of its first convolution or linear layer."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, nn.Linear):
            return module.in_features
    raise InputError(f"{type(part).__name__} has neither a convolution nor a linear layer.")


def final_linear(network: nn.Module) -> nn.Linear:
    """The last linear layer of a network.

    Raises:
        ValueError: there is none.
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
    """Name the flattening (and dropout) that torchvision and timm do in `forward`."""
    *body, (name, linear) = modules.items()
    extra: dict[str, nn.Module] = {} if "flatten" in modules else {"flatten": nn.Flatten()}
    if drop_rate:
        extra["dropout"] = nn.Dropout(drop_rate)
    return {**dict(body), **extra, name: linear}


@torch.no_grad()
def _check_chain(network: nn.Module, backbone: Backbone) -> None:
    """Compare the chain with the network on one random image: a foreign `forward` may do more than its children."""
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


def _ready(network: nn.Module, num_classes: int, options: dict[str, Any]) -> nn.Module:
    classes = final_linear(network).out_features
    if classes != num_classes or options:
        raise InputError(
            f"backbone is a ready network with {classes} classes; give num_classes={classes} and no further options "
            f"(got num_classes={num_classes}, options {sorted(options)})."
        )
    return network


def _from_timm(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    if name not in timm.list_models():
        raise InputError(f"backbone is 'timm/{name}', which this timm ({timm.__version__}) does not know.")
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)


def _from_torchvision(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    if name not in torchvision.models.list_models(module=torchvision.models):
        own = ", ".join(OWN)
        raise InputError(
            f"backbone is {name!r}; known are {own}, torchvision's classifiers, timm's after 'timm/', and any of them "
            "with a CBAM block after 'cbam/'."
        )
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    _drop_auxiliary_heads(network)
    if in_channels != 3:
        _change_input(network, in_channels)
    return network


def _drop_auxiliary_heads(network: nn.Module) -> None:
    """Take away the classifiers halfway up GoogLeNet and Inception v3, as torchvision does for its trained ones.

    Nothing here computes their losses: they would stay random, and DDP stops at parameters without a gradient.
    """
    for name, value in WITHOUT_AUXILIARY.items():
        if hasattr(network, name):
            setattr(network, name, value)


def _change_input(network: nn.Module, in_channels: int) -> None:
    """Replace the first convolution in place by a fresh one of the same geometry with other input channels."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = in_channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_channels, *first.kernel_size))
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
