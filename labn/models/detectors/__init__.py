"""Single-shot detectors: raw predictions, default boxes, and detections with the index of their default box."""

from labn.models.detectors.base import COORDINATES, Detector, Head, Layout, Predictions, Unit, per_box
from labn.models.detectors.decode import Detections, Thresholds, corners, decode_boxes, detect
from labn.models.detectors.torchvision_ssd import TorchvisionSSD, detector_of, ssd300
from labn.models.detectors.vgg import VGGFeatures

__all__ = [
    "COORDINATES",
    "Detections",
    "Detector",
    "Head",
    "Layout",
    "Predictions",
    "Thresholds",
    "TorchvisionSSD",
    "Unit",
    "VGGFeatures",
    "corners",
    "decode_boxes",
    "detect",
    "detector_of",
    "per_box",
    "ssd300",
]
