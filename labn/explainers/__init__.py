"""Explainers: small objects called as `maps = explainer(model, images, targets)`."""

from labn.explainers.attention.legrad import LeGrad
from labn.explainers.attention.own_maps import BranchAttention, LambdaAttention
from labn.explainers.attention.rollout import AttentionRollout
from labn.explainers.base import Explainer
from labn.explainers.baseline import ConstantMap, GroundTruthMap, Negated, RandomMap, SobelMap
from labn.explainers.cam.ablation import AblationCAM
from labn.explainers.cam.attention_guided import AttentionMapGuided
from labn.explainers.cam.gradcam import FinerCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from labn.explainers.cam.linear import CAM
from labn.explainers.cam.score import ScoreCAM
from labn.explainers.cam.smooth import SmoothGradCAMPlusPlus
from labn.explainers.explanation import Explanation, Explanations, load_explanations
from labn.explainers.gradient import Gradient, GradientTimesInput, IntegratedGradients, SmoothGrad
from labn.explainers.paths import BlackWhiteIntegratedGradients, BlurredIntegratedGradients, ExpectedGradients
from labn.explainers.perturbation.kernel_shap import KernelSHAP
from labn.explainers.perturbation.occlusion import Occlusion
from labn.explainers.perturbation.rise import RISE, ReleasedRISE, RiseMaps
from labn.explainers.perturbation.sobol import SobolAttribution
from labn.explainers.rectified import Deconvnet, GuidedBackpropagation
from labn.explainers.registry import EXPLAINERS, explainer_by_name
from labn.explainers.relevance.crp import CRP
from labn.explainers.relevance.lrp import C3LRP, LRP, ContrastiveLRP

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
    "BlackWhiteIntegratedGradients",
    "BlurredIntegratedGradients",
    "BranchAttention",
    "ConstantMap",
    "ContrastiveLRP",
    "Deconvnet",
    "ExpectedGradients",
    "Explainer",
    "Explanation",
    "Explanations",
    "FinerCAM",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientTimesInput",
    "GroundTruthMap",
    "GuidedBackpropagation",
    "HiResCAM",
    "IntegratedGradients",
    "KernelSHAP",
    "LambdaAttention",
    "LayerCAM",
    "LeGrad",
    "Negated",
    "Occlusion",
    "RandomMap",
    "ReleasedRISE",
    "RiseMaps",
    "ScoreCAM",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "SobelMap",
    "SobolAttribution",
    "XGradCAM",
    "explainer_by_name",
    "load_explanations",
]
