"""A small network for every registered explainer, and the explainer with few forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from small_detectors import tiny
from small_networks import GapLinear
from torch import Tensor, nn

from labn.explainers import EXPLAINERS, Explainer, explainer_by_name
from labn.models import AttentionBranchNetwork, magnetogram_net

SIZE = 32
SHORT: dict[str, dict[str, Any]] = {  # fewer forwards than by default
    "rise": {"n_masks": 40},
    "rise_released": {"n_masks": 40},
    "smoothgradcam++": {"n_samples": 2},
    "smoothgrad": {"n_samples": 3},
    "integrated_gradients": {"n_steps": 3},
    "integrated_gradients_blur": {"n_steps": 2},
    "integrated_gradients_bw": {"n_steps": 2},
    "expected_gradients": {"n_samples": 3},
    "occlusion": {"window": 12, "stride": 10},
    "sobol": {"grid": 3, "n_masks": 4},
    "kernelshap": {"grid": 3, "coalitions": 30},
}
METHODS = sorted(EXPLAINERS)


def branch_network() -> nn.Module:
    return AttentionBranchNetwork("resnet18", num_classes=4, split=2)


def vision_transformer() -> nn.Module:
    return timm.models.VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=4)


FITTING: dict[str, Callable[[], nn.Module]] = {
    "labn": branch_network,
    "abn": branch_network,
    "lambda": lambda: magnetogram_net(num_classes=4, in_channels=3),
    "rollout": vision_transformer,
    "legrad": vision_transformer,
    "crp": lambda: tiny(num_classes=4, dtype=torch.float32),
}


def network(name: str) -> nn.Module:
    """A float32 network that fits the method, with running statistics that are not the default ones."""
    torch.manual_seed(0)
    model = FITTING.get(name, GapLinear)()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def explainer(name: str) -> Explainer:
    return explainer_by_name(name, **SHORT.get(name, {}))


def pictures(count: int = 3, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)


TARGETS, INDICES = torch.tensor([2, 0, 3]), torch.tensor([11, 5, 8])
