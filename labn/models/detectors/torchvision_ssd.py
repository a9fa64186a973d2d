"""torchvision's SSD and SSDlite as detectors, and SSD300 at any width.

torchvision is imported inside the functions: its import takes a second, which `import labn` need not cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from labn.errors import InputError, InputTypeError
from labn.models.detectors.base import Detector, Head, Predictions
from labn.models.detectors.decode import corners
from labn.models.detectors.vgg import VGGFeatures

if TYPE_CHECKING:
    from torchvision.models.detection.ssd import SSD

SSD300_SIDE = 300
SSD300_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
SSD300_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
SSD300_STEPS = [8, 16, 32, 64, 100, 300]


class TorchvisionSSD(Detector):
    """A wrapper of any `torchvision.models.detection.ssd.SSD`, such as `ssd300_vgg16` or one of your own.

    Images are batches (B, 3, H, W) that are already resized and normalised, as a data module does. Torchvision's own
    resizing is skipped, so that gradients and relevance end at these images.

    Args:
        model: the detector.
        class_names: names of its classes, the background first.
    """

    def __init__(self, model: SSD, class_names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.model = model
        self.boxes = tuple(model.anchor_generator.num_anchors_per_location())
        wx, wy, ww, wh = model.box_coder.weights
        self.variances = (1 / wx, 1 / wy, 1 / ww, 1 / wh)
        self.num_classes = model.head.classification_head.num_columns
        if class_names is not None and len(class_names) != self.num_classes:
            raise InputError(f"class_names has {len(class_names)} names for {self.num_classes} classes; give one each.")
        self.class_names = class_names

    def forward(self, images: Tensor) -> Predictions:
        """Predictions for normalised images (B, 3, H, W)."""
        features = self.model.backbone(images)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        heads = self.model.head(maps)
        grids = tuple((m.shape[-2], m.shape[-1]) for m in maps)
        return Predictions(heads["cls_logits"], heads["bbox_regression"], grids)

    def heads(self) -> tuple[Head, ...]:
        """The last convolutions of the classification and the regression head, for every source map."""
        names = [
            [f"model.head.{name}.module_list.{n}{_last_convolution(m)}" for n, m in enumerate(head.module_list)]
            for name, head in (
                ("classification_head", self.model.head.classification_head),
                ("regression_head", self.model.head.regression_head),
            )
        ]
        return tuple(Head(c, r, a) for c, r, a in zip(*names, self.boxes))

    def default_boxes(self, size: tuple[int, int], grids: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
        """Default boxes (P, 4) in centre form and pixels, from the model's own generator."""
        from torchvision.models.detection.image_list import ImageList

        maps = [like.new_empty((1, 1, h, w)) for h, w in grids]
        edges = self.model.anchor_generator(ImageList(like.new_empty((1, 3, *size)), [size]), maps)[0]
        return torch.cat([(edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]], 1)

    def losses(
        self, predictions: Predictions, size: tuple[int, int], boxes: list[Tensor], labels: list[Tensor]
    ) -> dict[str, Tensor]:
        """SSD's losses per matched box: smooth L1 of offsets, and cross entropy with hard negatives.

        Args:
            predictions: predictions for B images.
            size: (H, W) of the images.
            boxes: per image (n, 4) x1, y1, x2, y2 in pixels; n may be 0.
            labels: per image (n,) int64 class channels, without background.

        Returns:
            Scalars `classification` and `localisation`, and the number of `matched` default boxes.
        """
        from torchvision.ops import box_iou

        priors = corners(self.default_boxes(size, predictions.grids, predictions.offsets))
        no_match = priors.new_full((len(priors),), -1, dtype=torch.int64)
        matched = [self.model.proposal_matcher(box_iou(b, priors)) if len(b) else no_match for b in boxes]
        targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels)]
        outputs = {"cls_logits": predictions.classes, "bbox_regression": predictions.offsets}
        losses = self.model.compute_loss(targets, outputs, [priors] * len(boxes), matched)
        number = sum((match >= 0).sum() for match in matched)
        terms = {"classification": losses["classification"], "localisation": losses["bbox_regression"]}
        return {**terms, "matched": torch.as_tensor(number)}


def _last_convolution(module: nn.Module) -> str:
    """`.<name>` of the last convolution inside `module`; an empty text where `module` is a convolution itself."""
    return [f".{name}" if name else "" for name, child in module.named_modules() if isinstance(child, nn.Conv2d)][-1]


def ssd300(
    num_classes: int, width: float = 1.0, batchnorm: bool = False, class_names: tuple[str, ...] | None = None
) -> TorchvisionSSD:
    """SSD300 with a VGG-16 trunk and random weights; with width 1 and without BatchNorm, torchvision's weights fit.

    Args:
        num_classes: number of classes K, including the background.
        width: factor of the number of channels of every trunk layer.
        batchnorm: add BatchNorm to the VGG layers, for training from random weights.
        class_names: names of the classes, the background first.
    """
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD

    boxes = DefaultBoxGenerator(SSD300_RATIOS, scales=SSD300_SCALES, steps=SSD300_STEPS)
    model = SSD(VGGFeatures(width, batchnorm), boxes, (SSD300_SIDE, SSD300_SIDE), num_classes)
    return TorchvisionSSD(model, class_names)


def detector_of(model: nn.Module) -> Detector:
    """The model as a detector: a `Detector` itself (without a `torch.compile` wrapper), or a torchvision SSD, wrapped.

    A torchvision model should be wrapped once with `TorchvisionSSD`, because caches belong to the wrapper.

    Raises:
        InputTypeError: the model is neither.
    """
    from torchvision.models.detection.ssd import SSD

    model = getattr(model, "_orig_mod", model)
    if isinstance(model, Detector):
        return model
    if isinstance(model, SSD):
        return TorchvisionSSD(model)
    raise InputTypeError(
        f"{type(model).__name__} is not a detector; give torchvision's SSD, a subclass of "
        "labn.models.detectors.Detector, or the `network` of labn.modules.SSD."
    )
