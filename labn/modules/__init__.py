"""LightningModules: losses, optimisers and logged metrics of the networks in labn.models."""

from labn.modules.classifier import Classifier
from labn.modules.guidance import SaliencyGuidance
from labn.modules.labn import LABN, GateSchedule
from labn.modules.map_teacher import MapTeacher
from labn.modules.resnet_lrp import ResNetLRP
from labn.modules.ssd import SSD

__all__ = ["LABN", "SSD", "Classifier", "GateSchedule", "MapTeacher", "ResNetLRP", "SaliencyGuidance"]
