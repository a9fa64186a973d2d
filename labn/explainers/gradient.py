"""Attribution by the gradient of the target's logit at the image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, class_scores
from labn.inference.modes import fast_logits
from labn.perturbation.engine import ChunkSize, is_out_of_memory
from labn.perturbation.stateless_random import sample_normal


def gaussian_noise(images: Tensor, indices: Tensor | None, seed: int, draws: range) -> Tensor:
    """Standard normal noise (n, B, C, H, W) for n draws, or (n, 1, C, H, W) for all images without indices.

    It depends on (seed, index, draw) alone: every device, chunk and rank gets the same numbers.

    Args:
        images: (B, C, H, W), for shape, device and dtype.
        indices: (B,) int64 positions in the data set, or None.
        seed: any integer.
        draws: numbers of the draws for the same image, from 0.
    """
    numbers = torch.zeros(1, dtype=torch.long) if indices is None else indices
    numbers, count = numbers.to(images.device), images[0].numel()
    # Stream 0 is that of random numbers that are drawn once.
    noise = [sample_normal(seed, numbers, count, images.dtype, stream=1 + draw) for draw in draws]
    return torch.stack(noise).unflatten(2, images.shape[1:])


def noise_scale(images: Tensor, std: float, relative: bool) -> Tensor:
    """The standard deviation (B, 1, 1, 1): `std` itself, or `std` times each image's value range if `relative`."""
    # Relative to the range of each image, as in the paper.
    flat = images.flatten(1)
    span = flat.amax(1) - flat.amin(1) if relative else torch.ones_like(flat[:, 0])
    return (std * span).view(-1, 1, 1, 1)


def check_noise(n_samples: int, std: float) -> None:
    """Check the arguments of noisy methods.

    Raises:
        InputError: no sample, or a negative standard deviation.
    """
    if n_samples < 1:
        raise InputError(f"n_samples must be at least 1, got {n_samples}.")
    if not std >= 0:
        raise InputError(f"std must not be negative, got {std}.")


# Reduction of an attribution (B, C, H, W) over the channels to one map (B, H, W).
CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(dim=1),
    "mean_abs": lambda values: values.abs().mean(dim=1),
    "max_abs": lambda values: values.abs().amax(dim=1),
    "l2": lambda values: values.square().sum(dim=1).sqrt(),
}


def input_gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """dy_c/dx (B, C, H, W) of the logit y_c of each image's target.

    Raises:
        InputError: a target is not a class index, or no gradient of the logits reaches the images.
    """
    leaf = images.detach().clone().requires_grad_()
    # One backward pass for the whole batch: in eval mode each score depends on its own image only.
    scores = class_scores(fast_logits(model, leaf), targets)
    gradient = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)[0] if scores.requires_grad else None
    if gradient is None:
        raise InputError(
            f"No gradient of the logits of {type(model).__name__} reaches the images: they do not depend on them, or a "
            "layer passes no gradient (quantised, under torch.no_grad(), through NumPy); take rise or occlusion."
        )
    return gradient


def over_variants(
    run: Callable[[Tensor, Tensor], Tensor],
    variants: Callable[[range], Tensor],
    count: int,
    images: Tensor,
    targets: Tensor,
    most: int | None = None,
) -> Iterator[Tensor]:
    """What `run` returns for `count` variants of a batch, one variant (B, ...) after the other.

    Several variants go through the model at once, as many as a chunk has room for: one by one, small batches are slow,
    on a GPU most of all.

    Args:
        run: from images (k, C, H, W) and classes (k,) to a tensor (k, ...).
        variants: from numbers of variants, n of them, to images (n, B, C, H, W).
        count: number of variants.
        images: (B, C, H, W), for the size of a chunk.
        targets: (B,) classes.
        most: largest number of variants at once; None: no limit.
    """
    chunk, done = ChunkSize(None, images), 0
    most = most or count
    while done < count:
        some = range(done, min(count, done + max(1, min(most, chunk.size // len(images)))))
        batch = variants(some).flatten(0, 1)
        try:
            results = run(batch, targets.repeat(len(some)))
        except RuntimeError as error:
            if len(some) == 1 or not is_out_of_memory(error):
                raise
            chunk.failed(len(batch))
            continue
        chunk.succeeded(len(batch))
        yield from results.unflatten(0, (len(some), len(images)))
        done = some.stop


class GradientAttribution(Explainer):
    """A method that attributes one value to every channel of every pixel."""

    def __init__(self, channels: str = "sum") -> None:
        if channels not in CHANNELS:
            raise InputError(f"channels must be one of {', '.join(CHANNELS)}, got {channels!r}.")
        self.channels = channels

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        return CHANNELS[self.channels](self.per_channel(model, images, targets, indices))

    @abstractmethod
    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """The attribution (B, C, H, W) before the reduction over the channels."""


class Gradient(GradientAttribution):
    """Gradient dy_c/dx (Simonyan et al. 2014, section 3), summed over the channels and signed.

    Args:
        channels: "sum", or the unsigned "mean_abs", "max_abs" (Simonyan's saliency) or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import Gradient
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.constant_(model[1].weight, 0.5)
        >>> Gradient()(model, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0]))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """dy_c/dx (B, C, H, W)."""
        return input_gradient(model, images, targets)


class GradientTimesInput(GradientAttribution):
    """Gradient x input, x * dy_c/dx (Shrikumar et al. 2016), summed over the channels.

    The map sums to y_c for a ReLU network without biases.

    Args:
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import GradientTimesInput
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.constant_(model[1].weight, 0.5)
        >>> GradientTimesInput()(model, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0]))
        tensor([[[0.5000, 1.0000],
                 [1.5000, 2.0000]]])
    """

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """x * dy_c/dx (B, C, H, W)."""
        return images * input_gradient(model, images, targets)


class IntegratedGradients(GradientAttribution):
    """Integrated gradients (Sundararajan et al., ICML 2017, eq. 1), by Gauss-Legendre quadrature.

        (x - x') * int_0^1 dy_c/dx (x' + t (x - x')) dt,   which sums to y_c(x) - y_c(x')

    Args:
        n_steps: number of nodes of the quadrature, one gradient each.
        baseline: x', one number or one per channel, in the images' normalised units; 0 is the mean colour.
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import IntegratedGradients
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.constant_(model[1].weight, 0.5)
        >>> images, targets = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0])
        >>> IntegratedGradients(n_steps=4, baseline=1.0)(model, images, targets)
        tensor([[[0.0000, 0.5000],
                 [1.0000, 1.5000]]])
    """

    def __init__(self, n_steps: int = 50, baseline: float | Sequence[float] = 0.0, channels: str = "sum") -> None:
        super().__init__(channels)
        if n_steps < 1:
            raise InputError(f"n_steps must be at least 1, got {n_steps}.")
        self.n_steps, self.baseline = n_steps, baseline

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """The integral (B, C, H, W)."""
        return path_integral(model, images, targets, channel_values(self.baseline, images, "baseline"), self.n_steps)


def path_integral(model: nn.Module, images: Tensor, targets: Tensor, start: Tensor, n_steps: int) -> Tensor:
    """(x - x') * int_0^1 dy_c/dx (x' + t (x - x')) dt (B, C, H, W), by Gauss-Legendre quadrature.

    Args:
        model: returns logits.
        images: x (B, C, H, W).
        targets: (B,) int64 classes c.
        start: x', broadcastable to the images.
        n_steps: number of nodes.
    """
    # Gauss-Legendre nodes and weights on [-1, 1], mapped to [0, 1]: exact for polynomials up to degree 2 n - 1.
    nodes, shares = np.polynomial.legendre.leggauss(n_steps)
    places = torch.from_numpy((nodes + 1) / 2).to(images).view(-1, 1, 1, 1, 1)

    def path(some: range) -> Tensor:
        return start + places[some.start : some.stop] * (images - start)

    run, total = partial(input_gradient, model), torch.zeros_like(images)
    for share, gradient in zip(shares / 2, over_variants(run, path, n_steps, images, targets), strict=True):
        total += float(share) * gradient
    return (images - start) * total


class SmoothGrad(GradientAttribution):
    """SmoothGrad (Smilkov et al. 2017): the mean of dy_c/dx over x + N(0, std^2).

    Args:
        n_samples: number of noisy copies, one gradient each.
        std: standard deviation of the noise, as a fraction of each image's value range, or absolute.
        relative: whether `std` is a fraction of the value range.
        channels: "sum" (signed), or the unsigned "mean_abs", "max_abs" or "l2" of the mean gradient.
        seed: seed of the noise, which depends on (seed, sample index).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import SmoothGrad
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.constant_(model[1].weight, 0.5)
        >>> SmoothGrad(n_samples=2)(model, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0]))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    def __init__(
        self,
        n_samples: int = 25,
        std: float = 0.15,
        relative: bool = True,
        channels: str = "sum",
        seed: int = 0,
    ) -> None:
        super().__init__(channels)
        check_noise(n_samples, std)
        self.n_samples, self.std, self.relative, self.seed = n_samples, std, relative, seed

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Mean gradient (B, C, H, W)."""
        scale = noise_scale(images, self.std, self.relative)

        def noisy(some: range) -> Tensor:
            return images + scale * gaussian_noise(images, indices, self.seed, some)

        run, total = partial(input_gradient, model), torch.zeros_like(images)
        for gradient in over_variants(run, noisy, self.n_samples, images, targets):
            total += gradient
        return total / self.n_samples

    @property
    def revision(self) -> int:
        """1: the noise no longer comes from PyTorch's generator."""
        return 1


def channel_values(values: float | Sequence[float], images: Tensor, name: str) -> Tensor:
    """One number, or one number per channel, as (1, C, 1, 1) in the images' dtype and on their device.

    Args:
        values: one number or C numbers.
        images: (B, C, H, W).
        name: name of the argument, for the message.

    Raises:
        InputError: neither one number nor one per channel.
    """
    numbers = torch.as_tensor([values] if isinstance(values, (int, float)) else list(values)).to(images)
    if len(numbers) not in (1, images.shape[1]):
        raise InputError(f"{name} must be one number or {images.shape[1]}, one per channel; got {len(numbers)}.")
    return numbers.expand(images.shape[1]).view(1, -1, 1, 1)
