"""Explainers: small objects called as `maps = explainer(model, images, targets)`."""

from labn.explainers.ablation_cam import AblationCAM
from labn.explainers.attention import BranchAttention, LambdaAttention
from labn.explainers.attention_guided import AttentionMapGuided
from labn.explainers.base import Explainer
from labn.explainers.baseline import ConstantMap, Negated, RandomMap
from labn.explainers.cam import GradCAM, GradCAMPlusPlus, XGradCAM
from labn.explainers.crp import CRP
from labn.explainers.gradient import Gradient, GradientTimesInput, IntegratedGradients, SmoothGrad
from labn.explainers.linear_cam import CAM
from labn.explainers.lrp import C3LRP, LRP, ContrastiveLRP
from labn.explainers.names import EXPLAINERS, explainer_by_name
from labn.explainers.occlusion import Occlusion
from labn.explainers.rise import RISE, ReleasedRISE, RiseMaps
from labn.explainers.rollout import AttentionRollout
from labn.explainers.score_cam import ScoreCAM
from labn.explainers.smooth_cam import SmoothGradCAMPlusPlus
from labn.explainers.truth import TruthMap

__all__ = [
    "C3LRP",
    "CAM",
    "CRP",
    "EXPLAINERS",
    "LRP",
    "RISE",
    "AblationCAM",
    "AttentionMapGuided",
    "AttentionRollout",
    "BranchAttention",
    "ConstantMap",
    "ContrastiveLRP",
    "Explainer",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientTimesInput",
    "IntegratedGradients",
    "LambdaAttention",
    "Negated",
    "Occlusion",
    "RandomMap",
    "ReleasedRISE",
    "RiseMaps",
    "ScoreCAM",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "TruthMap",
    "XGradCAM",
    "explainer_by_name",
]
