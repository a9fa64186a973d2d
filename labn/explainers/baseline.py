"""Maps that know nothing of the image: the rows that expose a biased protocol at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, Targets


class RandomMap(Explainer):
    """Independent uniform noise on [0, 1), drawn from `(seed, sample index)`.

    Without indices every image gets the same map, the one of index 0.

    Args:
        seed: of the generator.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, H, W) noise, drawn on the CPU so that every device sees the same."""
        numbers = [0] * len(images) if indices is None else indices.tolist()
        return torch.stack([self._noise(number, images) for number in numbers])

    def _noise(self, index: int, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return torch.rand(images.shape[-2:], generator=generator, dtype=images.dtype).to(images.device)


class ConstantMap(Explainer):
    """The same value everywhere: every patch is tied with every other."""

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, H, W) ones."""
        return images.new_ones(len(images), *images.shape[-2:])


class Negated(Explainer):
    """Another explainer's map with its sign turned: shows whether a map's sign means what it should.

    Args:
        explainer: the method whose maps are negated.
    """

    def __init__(self, explainer: Explainer) -> None:
        self.explainer = explainer

    def choose_targets(self, model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
        """As the method that is negated."""
        return self.explainer.choose_targets(model, images, targets)

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, H, W) negated maps."""
        return -self.explainer(model, images, targets, indices)


def disc(radius: int) -> Tensor:
    """(2r+1, 2r+1) float: 1 within `radius` pixels of the centre."""
    place = torch.arange(-radius, radius + 1)
    return (place[:, None] ** 2 + place[None] ** 2 <= radius**2).float()


def dilated(masks: Tensor, radius: int) -> Tensor:
    """Binary dilation of (B, H, W) bool by a disc of `radius` pixels; bool."""
    hits = F.conv2d(masks.float().unsqueeze(1), disc(radius).to(masks.device)[None, None], padding=radius)
    return hits.squeeze(1) > 0.5


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, H, W), sigma in pixels, cut off at 4 sigma; 0 outside of the image."""
    reach = max(1, round(4 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps)
    rows = F.conv2d(maps.unsqueeze(1), kernel[None, None, None], padding=(0, reach))
    return F.conv2d(rows, kernel[None, None, :, None], padding=(reach, 0)).squeeze(1)


class GroundTruthMap(Explainer):
    """The sample's ground-truth mask as a map: 1 inside and 0 outside, dilated first, then blurred.

    It looks at neither model nor image. A good score of maps ranks the exact mask above its coarse copies.

    Args:
        dilation: radius in pixels of the disc that the mask is dilated by; 0 leaves it.
        blur: standard deviation in pixels of the Gaussian that it is blurred by; 0 leaves it.

    Raises:
        ValueError: a negative argument.
    """

    def __init__(self, dilation: int = 0, blur: float = 0.0) -> None:
        if dilation < 0 or blur < 0:
            raise InputError(f"dilation and blur must not be negative, got {dilation} and {blur}.")
        self.dilation, self.blur = dilation, blur
        self._masks: Tensor | None = None

    def given(self, masks: Tensor | None) -> GroundTruthMap:
        """An explainer for the batch of images that these masks (B, H, W) bool belong to."""
        other = GroundTruthMap(self.dilation, self.blur)
        other._masks = masks
        return other

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, H, W) in [0, 1].

        Raises:
            ValueError: there are no masks, or of another size than the images.
        """
        masks = self._masks
        if masks is None or masks.shape != (len(images), *images.shape[-2:]):
            raise InputError("GroundTruthMap needs the ground-truth masks of these images; this data has none.")
        shown = dilated(masks, self.dilation) if self.dilation else masks
        maps = shown.to(images.device, torch.float32)
        return blurred(maps, self.blur) if self.blur else maps
