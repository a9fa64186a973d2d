"""An explainer of the network as the teacher of its own attention map.

    L_map = mean over images of  1 - cov(a, e) / (max(sd(a), contrast) sd(e))

a is the attention map and e a signed map of the class's evidence at the same positions, without a gradient; by default
the class activation map of y_c against the other classes (FinerCAM with alpha = 1). Above the standard deviation
`contrast`, L_map is 1 minus the correlation of both maps, which the scale of a does not change. Below, it falls with
sd(a), so that a map that starts constant gets a gradient of ordinary size. (That of the correlation alone is infinite
there, after which the second moment of Adam keeps the map flat for hundreds of steps.)
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers import EXPLAINERS, Explainer, explainer_by_name


@dataclass
class MapTeacher:
    """Options of training the attention map by an explainer's maps.

    Attributes:
        explainer: name of the method in `labn.explainers.EXPLAINERS`.
        options: arguments of the method; None: the defaults, but for signed maps from a method with the argument
            `relu`, which also show where the evidence is against the class.
        weight: weight of the loss.
        contrast: standard deviation over the positions up to which the loss asks for more contrast, above 0.
        absence_class: class that is the absence of evidence (no lesion is class 0), whose images teach nothing; None
            uses all images.

    Raises:
        InputError: an unknown method or argument, or a number out of range.

    Example:
        >>> teacher, attention = MapTeacher("gradcam", absence_class=0), torch.rand(2, 1, 2, 2)
        >>> layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 0])
        >>> teacher.loss(nn.Sequential(*layers), attention, images, labels, torch.arange(2)).item()
        0.0
    """

    explainer: str = "finercam"
    options: dict[str, Any] | None = None
    weight: float = 1.0
    contrast: float = 0.1
    absence_class: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InputError(f"map_teacher.weight is {self.weight}; it must be finite and at least 0.")
        if not 0 < self.contrast < math.inf:
            raise InputError(f"map_teacher.contrast is {self.contrast}; it must be finite and above 0.")
        if self.absence_class is not None and self.absence_class < 0:
            raise InputError(f"map_teacher.absence_class is {self.absence_class}; it must be at least 0.")
        self.method()

    def method(self) -> Explainer:
        """The explainer; it is no field, so that checkpoints hold settings and no objects."""
        build = EXPLAINERS.get(self.explainer)
        signed = {"relu": False} if build is not None and "relu" in inspect.signature(build).parameters else {}
        return explainer_by_name(self.explainer, **(signed if self.options is None else self.options))

    def loss(self, network: nn.Module, attention: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """L_map of the images that teach, with the network as it is now, in eval mode; 0 where there is none.

        Args:
            network: the network that is trained.
            attention: (B, 1, h, w), its map of the images, with a gradient.
            images: (B, C, H, W).
            labels: (B,) int64.
            indices: (B,) int64, positions in the data set.
        """
        chosen = torch.arange(len(labels), device=labels.device)
        if self.absence_class is not None:
            chosen = chosen[labels != self.absence_class]
        if not len(chosen):
            return attention.sum() * 0
        evidence = self.method()(network, images[chosen], labels[chosen], indices[chosen.to(indices.device)])
        return map_distance(attention.squeeze(1)[chosen], evidence, self.contrast)


def map_distance(maps: Tensor, evidence: Tensor, contrast: float) -> Tensor:
    """L_map of the module's docstring.

    Args:
        maps: (B, h, w) a, with a gradient.
        evidence: (B, H, W) e, averaged over the positions of the maps.
        contrast: standard deviation of a map up to which more of it lowers the loss.

    Returns:
        A scalar in [0, 2]; 1 for constant maps.

    Example:
        >>> evidence = torch.tensor([[[-1.0, 0.0], [1.0, 8.0]]])
        >>> [round(map_distance(maps, evidence, 0.1).item(), 3) for maps in (0.1 * evidence, 0 * evidence, -evidence)]
        [0.0, 1.0, 2.0]
        >>> round(map_distance(0.1 * evidence, evidence, 10 * evidence.std(correction=0).item()).item(), 3)  # flat maps
        0.99
    """
    target = F.adaptive_avg_pool2d(evidence.detach().float(), (maps.shape[-2], maps.shape[-1]))
    a, e = (values.flatten(1) - values.flatten(1).mean(dim=1, keepdim=True) for values in (maps.float(), target))
    # Clamped before the root, whose gradient is infinite at 0.
    spread, reference = a.square().mean(1).clamp_min(contrast**2).sqrt(), e.square().mean(1).sqrt()
    return (1 - (a * e).mean(1) / (spread * reference.clamp_min(torch.finfo(e.dtype).tiny))).mean()
