"""Networks as plain `nn.Module`s, and files of their weights; no module of this package imports Lightning."""

from labn.models.attention_branch import (
    AttentionBranchNetwork,
    BranchOutput,
    gate_attention,
    gate_health,
    share_threshold,
)
from labn.models.backbones import Backbone, backbone_of, build_network
from labn.models.checkpoints import LoadReport, load_backbone, load_classifier
from labn.models.lambda_networks.layer import LambdaLayer
from labn.models.lambda_networks.resnet import (
    LambdaBottleneck,
    LambdaResNet,
    lambda_resnet26,
    lambda_resnet38,
    lambda_resnet50,
    magnetogram_net,
)
from labn.models.profile import Profile, count_flops, latency, profile

__all__ = [
    "AttentionBranchNetwork",
    "Backbone",
    "BranchOutput",
    "LambdaBottleneck",
    "LambdaLayer",
    "LambdaResNet",
    "LoadReport",
    "Profile",
    "backbone_of",
    "build_network",
    "count_flops",
    "gate_attention",
    "gate_health",
    "lambda_resnet26",
    "lambda_resnet38",
    "lambda_resnet50",
    "latency",
    "load_backbone",
    "load_classifier",
    "magnetogram_net",
    "profile",
    "share_threshold",
]
