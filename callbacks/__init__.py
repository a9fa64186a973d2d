"""Lightning callbacks that drive explanation and evaluation."""

from callbacks.checkpoint import RunCheckpoint
from callbacks.evaluate import EvaluationCallback
from callbacks.explain import ExplanationCallback
from callbacks.health import GateWatch, RunProfile
from callbacks.log_maps import MapLogger

__all__ = ["EvaluationCallback", "ExplanationCallback", "GateWatch", "MapLogger", "RunCheckpoint", "RunProfile"]
