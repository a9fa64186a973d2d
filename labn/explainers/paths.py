"""Integrated gradients from other baselines than one colour: blurred, black and white, and drawn at random."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.explainers.gradient import (
    GradientAttribution,
    channel_values,
    gaussian_noise,
    input_gradient,
    over_variants,
    path_integral,
)
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from labn.perturbation.fills import make_fill
from labn.perturbation.stateless_random import sample_uniform


class _PathAttribution(GradientAttribution):
    """The mean of integrated gradients from several baselines."""

    def __init__(self, n_steps: int, channels: str) -> None:
        super().__init__(channels)
        if n_steps < 1:
            raise InputError(f"n_steps must be at least 1, got {n_steps}.")
        self.n_steps = n_steps

    @abstractmethod
    def starts(self, images: Tensor) -> list[Tensor]:
        """Baselines x', each broadcastable to the images."""

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """The mean of the integrals (B, C, H, W)."""
        starts = self.starts(images)
        return torch.stack([path_integral(model, images, targets, start, self.n_steps) for start in starts]).mean(0)


class BlurredIntegratedGradients(_PathAttribution):
    """Integrated gradients from the blurred image (Sturmfels et al., Distill 2020), which sum to y_c(x) - y_c(blurred).

    Args:
        n_steps: number of nodes of the quadrature, one gradient each.
        kernel_size: side of the Gaussian kernel in pixels.
        sigma: standard deviation of the Gaussian in pixels.
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import BlurredIntegratedGradients
        >>> model, targets = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.tensor([0])
        >>> bool((BlurredIntegratedGradients(n_steps=2)(model, torch.ones(1, 1, 4, 4), targets).abs() < 1e-6).all())
        True
    """

    def __init__(self, n_steps: int = 50, kernel_size: int = 11, sigma: float = 5.0, channels: str = "sum") -> None:
        super().__init__(n_steps, channels)
        if kernel_size < 1 or not sigma > 0:
            raise InputError(f"kernel_size must be at least 1 and sigma above 0, got {kernel_size} and {sigma}.")
        self.kernel_size, self.sigma = kernel_size, sigma

    def starts(self, images: Tensor) -> list[Tensor]:
        """The blurred images."""
        return [make_fill("blur", images, kernel_size=self.kernel_size, sigma=self.sigma)]


class BlackWhiteIntegratedGradients(_PathAttribution):
    """The mean of integrated gradients from black and from white (Kapishnikov et al., ICCV 2019).

    A black baseline alone gives black pixels no attribution, whatever they mean. The maps sum to
    y_c(x) - (y_c(black) + y_c(white)) / 2.

    Args:
        n_steps: number of nodes of each quadrature, one gradient each.
        mean: per-channel mean of the images' normalisation, one number or one per channel. None: in a test of the
            command line and in `labn.evaluate` that of the data, else ImageNet's.
        std: per-channel standard deviation likewise.
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import BlackWhiteIntegratedGradients
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> explainer = BlackWhiteIntegratedGradients(n_steps=2, mean=0.0, std=1.0)
        >>> explainer(model, torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([0]))
        tensor([[[-0.5000,  0.5000]]])
    """

    def __init__(
        self,
        n_steps: int = 50,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        channels: str = "sum",
    ) -> None:
        super().__init__(n_steps, channels)
        self.mean, self.std = mean, std

    def for_normalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Explainer:
        """This method with the mean and the standard deviation that it was not given."""
        fitted = copy.copy(self)
        if fitted.mean is None:
            fitted.mean = 0.0 if mean is None else list(mean)
        if fitted.std is None:
            fitted.std = 1.0 if std is None else list(std)
        return fitted

    def starts(self, images: Tensor) -> list[Tensor]:
        """Black and white."""
        mean = channel_values(IMAGENET_MEAN if self.mean is None else self.mean, images, "mean")
        std = channel_values(IMAGENET_STD if self.std is None else self.std, images, "std")
        return [-mean / std, (1 - mean) / std]


class ExpectedGradients(GradientAttribution):
    """Expected gradients (Erion et al., Nature Machine Intelligence 2021, eq. 4) with one point per drawn baseline:

        E_{x', t} [(x - x') * dy_c/dx (x' + t (x - x'))],   t uniform in [0, 1]

    The expectation sums to y_c(x) - E y_c(x').

    Args:
        references: (R, C, H, W) images from which baselines x' are drawn, normalised, such as training images; None
            draws standard normal noise, which has the mean and the variance of normalised images and no structure.
        n_samples: number of drawn baselines, one gradient each; their t are spread evenly over [0, 1].
        seed: seed of the draws, which depend on (seed, sample index).
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Raises:
        InputError: no sample; on call, references of another size than the images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import ExpectedGradients
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> ExpectedGradients(torch.zeros(3, 1, 1, 2), 4)(model, torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([0]))
        tensor([[[1., 2.]]])
    """

    def __init__(
        self, references: Tensor | None = None, n_samples: int = 50, seed: int = 0, channels: str = "sum"
    ) -> None:
        super().__init__(channels)
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, got {n_samples}.")
        self.references, self.n_samples, self.seed = references, n_samples, seed

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """The mean over the draws (B, C, H, W)."""
        numbers = torch.zeros(len(images), dtype=torch.long) if indices is None else indices.cpu()
        # Two numbers per draw: which reference, and where on the path. On the CPU, equal for every device.
        draws = sample_uniform(self.seed, numbers, 2 * self.n_samples, torch.float64).unflatten(1, (-1, 2))
        drawn = partial(self._baseline, images, draws[..., 0], indices)

        def points(some: range) -> Tensor:
            steps = torch.tensor(some, dtype=torch.float64)[:, None] + draws[:, some.start : some.stop, 1].T
            t = (steps / self.n_samples).to(images)[..., None, None, None]
            starts = torch.stack([drawn(draw) for draw in some])
            return starts + t * (images - starts)

        run, total = partial(input_gradient, model), torch.zeros_like(images)
        for draw, gradient in enumerate(over_variants(run, points, self.n_samples, images, targets)):
            total += (images - drawn(draw)) * gradient
        return total / self.n_samples

    def _baseline(self, images: Tensor, uniform: Tensor, indices: Tensor | None, draw: int) -> Tensor:
        """One baseline per image (B, C, H, W), from uniform numbers (B, draws)."""
        if self.references is None:
            return gaussian_noise(images, indices, self.seed, range(draw, draw + 1))[0].expand_as(images)
        if self.references.ndim != 4 or self.references.shape[1:] != images.shape[1:] or not len(self.references):
            raise InputError(
                f"references must be (R, {', '.join(map(str, images.shape[1:]))}) like the images, R >= 1; got "
                f"{tuple(self.references.shape)}."
            )
        return self.references[(uniform[:, draw] * len(self.references)).long()].to(images)
