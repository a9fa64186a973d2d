"""Maps that know nothing of the image: the rows that expose a biased protocol at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
