"""The small network for magnetograms (JSAI 2022, table 1: one bottleneck)."""

from __future__ import annotations

from typing import Any

from labn.models.lambda_resnet import LambdaResNet


def magnetogram_net(num_classes: int = 2, in_channels: int = 1, **options: Any) -> LambdaResNet:
    """7 x 7 stem of 16 channels, one lambda bottleneck (width 8, 32 channels out), pooling and a linear layer.

    The lambda layer has d=8 and 4 heads, so 2 values per head; on 512 x 512 images its map is 128 x 128.

    Args:
        num_classes: number of classes.
        in_channels: 1 for magnetograms.
        options: further arguments of `LambdaResNet`.

    Returns:
        A network (B, in_channels, H, W) -> logits (B, num_classes).
    """
    return LambdaResNet(
        **{"layers": (1,), "width": 8, "stem_width": 16, **options}, num_classes=num_classes, in_channels=in_channels
    )
