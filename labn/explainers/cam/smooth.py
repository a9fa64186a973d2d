"""Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noisy copies of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.cam.features import DividedBatchError, gradient_features, layer_features
from labn.explainers.cam.gradcam import ActivationMap, plus_plus_factor
from labn.explainers.gradient import check_noise, gaussian_noise, noise_scale, over_variants

NUMERATORS = ("D1", "D2")


class SmoothGradCAMPlusPlus(ActivationMap):
    """Smooth Grad-CAM++ (Omeiza et al. 2019, eq. 9-11).

        D_p = mean over n of g^p at x + N(0, std^2),   a = D2 / (2 D2 + (sum_ab A^k_ab) D3)
        w_k = sum_ij a^k_ij ReLU(D1^k_ij),             A of the image without noise

    Args:
        target_layer: name of the layer; None: the last one with spatial feature maps.
        relu: apply the ReLU to the map; without it the map is signed.
        n_samples: n, number of noisy copies.
        std: standard deviation of the noise, in units of the normalised image, or of its value range.
        relative: whether `std` is a fraction of each image's max - min.
        numerator: "D2" makes a the factor of Grad-CAM++, "D1" is the paper's own eq. 9.
        seed: seed of the noise, which depends on (seed, sample index).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import SmoothGradCAMPlusPlus
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> explainer = SmoothGradCAMPlusPlus(n_samples=2)
        >>> explainer(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        target_layer: str | None = None,
        relu: bool = True,
        n_samples: int = 8,
        std: float = 0.3,
        relative: bool = False,
        numerator: str = "D2",
        seed: int = 0,
    ) -> None:
        super().__init__(target_layer, relu)
        check_noise(n_samples, std)
        if numerator not in NUMERATORS:
            raise InputError(f"numerator must be one of {', '.join(NUMERATORS)}, got {numerator!r}.")
        self.n_samples, self.std, self.relative = n_samples, std, relative
        self.numerator, self.seed = numerator, seed

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) from A (B, K, h, w) and the stacked D1, D2, D3 (3, B, K, h, w)."""
        first, second, third = gradients
        # Averaged derivatives are no powers of one gradient any more, so their ratio is formed explicitly.
        factor = plus_plus_factor(torch.where(second != 0, third / second, 0), activations.sum((2, 3), keepdim=True))
        if self.numerator == "D1":
            factor = factor * torch.where(second != 0, first / second, 0)
        return (factor * first.relu()).sum(dim=(2, 3), keepdim=True)

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w): weighted sums of the feature maps of the image without noise."""
        layer = self.layer(model, images)
        scale = noise_scale(images, self.std, self.relative)
        activations = layer_features(model, layer, images).activations

        def noisy(some: range) -> Tensor:
            return images + scale * gaussian_noise(images, indices, self.seed, some)

        def run(batch: Tensor, classes: Tensor) -> Tensor:
            return gradient_features(model, layer, batch, classes).slopes

        def average(most: int | None) -> Tensor:
            # Third powers underflow in float32.
            powers = activations.new_zeros(3, *activations.shape, dtype=torch.float64)
            for slopes in over_variants(run, noisy, self.n_samples, images, targets, most):
                for power, sums in enumerate(powers, start=1):
                    sums += slopes.double() ** power
            return powers / self.n_samples

        try:
            means = average(None)
        except DividedBatchError:
            if len(images) > 1:
                raise
            means = average(1)  # a model that takes images one by one also gets the noisy ones so
        weights = self.weights(activations, means)
        return self.weigh(weights.to(activations), activations)

    @property
    def revision(self) -> int:
        """1: the noise no longer comes from PyTorch's generator."""
        return 1
