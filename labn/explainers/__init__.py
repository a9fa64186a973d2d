"""Explainers: small objects called as `maps = explainer(model, images, targets)`."""

from labn.explainers.attention import BranchAttention, LambdaAttention
from labn.explainers.base import Explainer
from labn.explainers.baseline import ConstantMap, Negated, RandomMap
from labn.explainers.cam import GradCAM
from labn.explainers.names import EXPLAINERS, explainer_by_name

__all__ = [
    "EXPLAINERS",
    "BranchAttention",
    "ConstantMap",
    "Explainer",
    "GradCAM",
    "LambdaAttention",
    "Negated",
    "RandomMap",
    "explainer_by_name",
]
