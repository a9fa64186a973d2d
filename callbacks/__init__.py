"""Lightning callbacks that drive explanation and evaluation."""

from callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from callbacks.explanation.detections import DetectionCallback
from callbacks.explanation.evaluate import EvaluationCallback
from callbacks.explanation.explain import ExplanationCallback
from callbacks.explanation.maps import MapLogger
from callbacks.explanation.report import ReportCallback
from callbacks.health import GateWatch, RunProfile
from callbacks.logging.csv_logger import RunLogger

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
