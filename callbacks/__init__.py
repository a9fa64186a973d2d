"""Lightning callbacks that drive explanation and evaluation."""

from callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from callbacks.detections import DetectionCallback
from callbacks.evaluate import EvaluationCallback
from callbacks.explain import ExplanationCallback
from callbacks.health import GateWatch, RunProfile
from callbacks.log_maps import MapLogger
from callbacks.report import ReportCallback
from callbacks.run_logger import RunLogger

__all__ = [
    "BestCheckpoint",
    "DetectionCallback",
    "EvaluationCallback",
    "ExplanationCallback",
    "GateWatch",
    "LastCheckpoint",
    "MapLogger",
    "ReportCallback",
    "RunLogger",
    "RunProfile",
]
