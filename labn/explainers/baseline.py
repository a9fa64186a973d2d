"""Maps that do not depend on the model: baselines, which reveal a biased evaluation protocol at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, Targets


class RandomMap(Explainer):
    """Independent uniform noise on [0, 1), drawn from `(seed, sample index)`.

    Without indices every image gets the same map, that of index 0.

    Args:
        seed: seed of the random numbers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import RandomMap
        >>> images, targets = torch.zeros(2, 3, 2, 2), torch.tensor([0, 0])
        >>> maps = RandomMap(seed=3)(nn.Identity(), images, targets, indices=torch.tensor([7, 8]))
        >>> alone = RandomMap(seed=3)(nn.Identity(), images[:1], targets[:1], indices=torch.tensor([7]))
        >>> torch.equal(maps[0], alone[0])
        True
    """

    runs_model = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Noise (B, H, W), drawn on the CPU so that every device gets the same numbers."""
        numbers = [0] * len(images) if indices is None else indices.tolist()
        return torch.stack([self._noise(number, images) for number in numbers])

    def _noise(self, index: int, images: Tensor) -> Tensor:
        # A large prime keeps the streams of different seeds apart.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return torch.rand(images.shape[-2:], generator=generator, dtype=images.dtype).to(images.device)


class ConstantMap(Explainer):
    """The map of ones, in which all patches are tied.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import ConstantMap
        >>> images, targets = torch.zeros(1, 3, 2, 2), torch.tensor([0])
        >>> ConstantMap()(nn.Identity(), images, targets)
        tensor([[[1., 1.],
                 [1., 1.]]])
    """

    runs_model = False

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Ones (B, H, W)."""
        return images.new_ones(len(images), *images.shape[-2:])


class SobelMap(Explainer):
    """Edges of the image, whatever the model: the magnitude of the Sobel gradient of the mean over the channels.

    Methods that show edges look convincing; this map is what they have to beat (Adebayo et al. 2018).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import SobelMap
        >>> image = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]]).expand(1, 1, 3, 4)
        >>> SobelMap()(nn.Identity(), image, torch.tensor([0]))[0, 1]
        tensor([0., 4., 4., 0.])
    """

    runs_model = False

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Magnitudes (B, H, W); edge pixels are repeated outwards."""
        grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(images)
        slopes = F.conv2d(grey, torch.stack([across, across.T]).unsqueeze(1))
        return slopes.square().sum(1).sqrt()


class Negated(Explainer):
    """The negated map of another explainer: a test of whether the sign of its map has a meaning.

    Args:
        explainer: the method whose maps are negated.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import ConstantMap, Negated
        >>> Negated(ConstantMap())(nn.Identity(), torch.zeros(1, 3, 2, 2), torch.tensor([0]))
        tensor([[[-1., -1.],
                 [-1., -1.]]])
    """

    runs_model = False

    def __init__(self, explainer: Explainer) -> None:
        self.explainer = explainer

    def choose_targets(self, model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
        """The targets of the explainer whose maps are negated."""
        return self.explainer.choose_targets(model, images, targets)

    def fitted_to(self, model: nn.Module) -> Explainer:
        """The negation of the fitted explainer."""
        return Negated(self.explainer.fitted_to(model))

    def for_normalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Explainer:
        """The negation of the explainer for this normalisation."""
        return Negated(self.explainer.for_normalised(mean, std))

    def with_masks(self, masks: Tensor | None) -> Explainer:
        """The negation of the explainer with the masks."""
        return Negated(self.explainer.with_masks(masks))

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Negated maps (B, H, W)."""
        return -self.explainer(model, images, targets, indices)


def disc(radius: int) -> Tensor:
    """A disc (2r+1, 2r+1): 1 within r = `radius` pixels of the centre, 0 outside."""
    offset = torch.arange(-radius, radius + 1)
    return (offset[:, None] ** 2 + offset[None] ** 2 <= radius**2).float()


def dilated(masks: Tensor, radius: int) -> Tensor:
    """Binary dilation of masks (B, H, W) by a disc of `radius` pixels, (B, H, W) bool."""
    hits = F.conv2d(masks.float().unsqueeze(1), disc(radius).to(masks.device)[None, None], padding=radius)
    return hits.squeeze(1) > 0.5


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of maps (B, H, W), with sigma in pixels, truncated at 4 sigma; the maps are 0 outside."""
    reach = max(1, round(4 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps)
    # A Gaussian is separable: one pass per axis.
    rows = F.conv2d(maps.unsqueeze(1), kernel[None, None, None], padding=(0, reach))
    return F.conv2d(rows, kernel[None, None, :, None], padding=(reach, 0)).squeeze(1)


class GroundTruthMap(Explainer):
    """The sample's ground-truth mask as a map: 1 inside and 0 outside, dilated first, then blurred.

    The map depends on neither model nor image. A good metric ranks the exact mask above its dilated and blurred copies.

    Args:
        dilation: radius in pixels of the disc that the mask is dilated by; 0: none.
        blur: standard deviation in pixels of the Gaussian blur; 0: none.

    Raises:
        InputError: a negative argument; on call, no masks, or masks of another size than the images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import GroundTruthMap
        >>> explainer = GroundTruthMap().with_masks(torch.eye(2, dtype=torch.bool)[None])
        >>> explainer(nn.Identity(), torch.zeros(1, 3, 2, 2), torch.tensor([0]))
        tensor([[[1., 0.],
                 [0., 1.]]])
    """

    runs_model = False

    def __init__(self, dilation: int = 0, blur: float = 0.0) -> None:
        if dilation < 0 or blur < 0:
            raise InputError(f"dilation and blur must not be negative, got {dilation} and {blur}.")
        self.dilation, self.blur = dilation, blur
        self._masks: Tensor | None = None

    def with_masks(self, masks: Tensor | None) -> GroundTruthMap:
        """An explainer with these options for the batch of images that the masks (B, H, W) bool belong to."""
        explainer = GroundTruthMap(self.dilation, self.blur)
        explainer._masks = masks
        return explainer

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W) in [0, 1]."""
        masks = self._masks
        if masks is None or masks.shape != (len(images), *images.shape[-2:]):
            raise InputError("GroundTruthMap needs the ground-truth masks of these images; this data has none.")
        regions = dilated(masks, self.dilation) if self.dilation else masks
        maps = regions.to(images.device, torch.float32)
        return blurred(maps, self.blur) if self.blur else maps
