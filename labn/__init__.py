"""Train, explain and honestly evaluate image models (LABN, PID, LRP on ResNets, and their baselines)."""

from labn.api import Explanation, evaluate, explain

__all__ = ["Explanation", "evaluate", "explain"]
