"""Class activation maps from gradients: weighted sums of one layer's feature maps."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, class_scores
from labn.explainers.cam.features import Features, gradient_features
from labn.explainers.cam.target_layer import TargetLayer, name_of, target_layer_of


class ActivationMap(Explainer):
    """A class activation map L = ReLU(sum_k w_k A^k) at a target layer; subclasses define the weights w.

    Args:
        target_layer: name of the layer, or the layer itself; None: the last one with spatial feature maps.
        relu: apply the ReLU to the map; without it the map is signed.
    """

    def __init__(self, target_layer: str | nn.Module | None = None, relu: bool = True) -> None:
        self.target_layer = target_layer
        self.relu = relu

    def fitted_to(self, model: nn.Module) -> Explainer:
        """This method with the name of its target layer in place of the layer itself, which only `model` has."""
        if not isinstance(self.target_layer, nn.Module):
            return self
        named = copy.copy(self)
        named.target_layer = name_of(model, self.target_layer)
        return named

    @abstractmethod
    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) or (B, K, h, w) from A and dy_c/dA, both (B, K, h, w)."""

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w): weighted sums at the layer's resolution."""
        features = self.features(model, images, targets)
        return self.weigh(self.weights(features.activations, features.slopes), features.activations)

    def weigh(self, weights: Tensor, activations: Tensor) -> Tensor:
        """sum_k w_k A^k (B, h, w), after the ReLU if `relu`."""
        maps = (weights * activations).sum(dim=1)
        return maps.relu() if self.relu else maps

    def layer(self, model: nn.Module, images: Tensor) -> TargetLayer:
        """The call of the target layer of `model`."""
        return target_layer_of(model, images, self.target_layer)

    def features(self, model: nn.Module, images: Tensor, targets: Tensor) -> Features:
        """A and dy_c/dA of the target layer; y_c is the logit."""
        return gradient_features(model, self.layer(model, images), images, targets)


class GradCAM(ActivationMap):
    """Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1): w_k = (1/Z) sum_ij g^k_ij with g = dy_c/dA and Z = h w.

    Arguments as for every class activation map: `target_layer` and `relu`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import GradCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> GradCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Spatial mean of the gradients."""
        return gradients.mean(dim=(2, 3), keepdim=True)


def plus_plus_factor(ratio: Tensor, total: Tensor) -> Tensor:
    """a = D2 / (2 D2 + total * D3) = 1 / (2 + total * D3 / D2), 0 where D3 is 0 or the denominator vanishes.

    The ratio keeps float32 exact: gradients are far below 1, so that their third powers underflow and any fixed epsilon
    would outweigh their squares.

    Args:
        ratio: D3 / D2 (B, K, h, w); for the score exp(y_c) of Grad-CAM++ it is the gradient itself.
        total: (B, K, 1, 1), sum_ab A^k_ab.
    """
    # Activations of both signs can make the denominator vanish, which has no meaning as a weight.
    denominator = 2 + total * ratio
    usable = (ratio != 0) & (denominator.abs() > torch.finfo(denominator.dtype).eps)
    return torch.where(usable, 1 / denominator, 0)


class GradCAMPlusPlus(ActivationMap):
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, eq. 19): w_k = sum_ij a^k_ij ReLU(g^k_ij).

    a = g^2 / (2 g^2 + (sum_ab A^k_ab) g^3), and 0 where g is 0. The score is exp(y_c), whose higher derivatives are
    powers of g for a piecewise linear network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import GradCAMPlusPlus
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> GradCAMPlusPlus()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Sum over the positions of a ReLU(g)."""
        # For the score exp(y_c) the ratio D3 / D2 of derivatives is the gradient g itself: g^3 / g^2.
        factor = plus_plus_factor(gradients, activations.sum(dim=(2, 3), keepdim=True))
        return (factor * gradients.relu()).sum(dim=(2, 3), keepdim=True)


class LayerCAM(ActivationMap):
    """LayerCAM (Jiang et al., TIP 2021, eq. 5): w^k_ij = ReLU(g^k_ij), one weight per position.

    Arguments as for every class activation map: `target_layer` and `relu`. Early layers give fine maps.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import LayerCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> LayerCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Positive gradients."""
        return gradients.relu()


class HiResCAM(ActivationMap):
    """HiResCAM (Draelos and Carin 2020, eq. 6): w^k_ij = g^k_ij, one weight per position.

    For a network that is linear behind the target layer the map, without ReLU, sums to the logit without its bias.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import HiResCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> HiResCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The gradients."""
        return gradients


class FinerCAM(GradCAM):
    """Finer-CAM (Zhang et al., CVPR 2025): Grad-CAM of the difference between the class and those most like it.

    The score is y_c - alpha * sum_d w_d y_d over the `n_similar` classes d whose logits are nearest to y_c, with the
    softmax of their logits as w. It shows what tells the class from its neighbours.

    Args:
        target_layer: name of the layer, or the layer itself; None: the last one with spatial feature maps.
        relu: apply the ReLU to the map; without it the map is signed.
        alpha: weight of the other classes; 0 is Grad-CAM.
        n_similar: number of other classes; all where the network has fewer.

    Raises:
        InputError: `n_similar` is below 1; on call, a model with a single logit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import FinerCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> FinerCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        target_layer: str | nn.Module | None = None,
        relu: bool = True,
        alpha: float = 1.0,
        n_similar: int = 3,
    ) -> None:
        super().__init__(target_layer, relu)
        if n_similar < 1:
            raise InputError(f"n_similar must be at least 1, got {n_similar}.")
        self.alpha, self.n_similar = alpha, n_similar

    def features(self, model: nn.Module, images: Tensor, targets: Tensor) -> Features:
        """A and the gradient of the difference of logits at the target layer."""
        return gradient_features(model, self.layer(model, images), images, targets, score=self.difference)

    def difference(self, logits: Tensor, targets: Tensor) -> Tensor:
        """y_c - alpha * sum_d w_d y_d (B,) from logits (B, num_classes)."""
        own = class_scores(logits, targets)
        if logits.shape[1] < 2:
            raise InputError("FinerCAM compares classes; the model has a single logit.")
        distance = (logits - own[:, None]).detach().abs()
        distance.scatter_(1, targets[:, None], torch.inf)
        similar = distance.topk(min(self.n_similar, logits.shape[1] - 1), dim=1, largest=False).indices
        others = logits.gather(1, similar)
        # Constants: the weights choose classes, and are no part of the difference.
        return own - self.alpha * (others.detach().softmax(1) * others).sum(1)


class XGradCAM(ActivationMap):
    """XGrad-CAM (Fu et al., BMVC 2020, eq. 5): w_k = sum_ij A^k_ij g^k_ij / sum_ab A^k_ab, 0 where that sum is 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import XGradCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> XGradCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Mean of the gradients weighted by the activations."""
        total = activations.sum(dim=(2, 3), keepdim=True)
        weighted = (activations * gradients).sum(dim=(2, 3), keepdim=True)
        return torch.where(total != 0, weighted / total, 0)
