"""The names of the methods in configurations, on the command line and in `labn.explain`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from labn.errors import InputError
from labn.explainers.attention.own_maps import BranchAttention, LambdaAttention
from labn.explainers.attention.rollout import AttentionRollout
from labn.explainers.base import Explainer
from labn.explainers.baseline import ConstantMap, Negated, RandomMap
from labn.explainers.cam.ablation import AblationCAM
from labn.explainers.cam.attention_guided import AttentionMapGuided
from labn.explainers.cam.gradcam import GradCAM, GradCAMPlusPlus, XGradCAM
from labn.explainers.cam.linear import CAM
from labn.explainers.cam.score import ScoreCAM
from labn.explainers.cam.smooth import SmoothGradCAMPlusPlus
from labn.explainers.gradient import Gradient, GradientTimesInput, IntegratedGradients, SmoothGrad
from labn.explainers.perturbation.occlusion import Occlusion
from labn.explainers.perturbation.rise import RISE, ReleasedRISE
from labn.explainers.relevance.crp import CRP
from labn.explainers.relevance.lrp import C3LRP, LRP, ContrastiveLRP

EXPLAINERS: dict[str, Callable[..., Explainer]] = {
    "labn": BranchAttention,
    "abn": BranchAttention,
    "lambda": LambdaAttention,
    "rollout": AttentionRollout,
    "rise": RISE,
    "rise_released": ReleasedRISE,
    "cam": CAM,
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "smoothgradcam++": SmoothGradCAMPlusPlus,
    "xgradcam": XGradCAM,
    "scorecam": ScoreCAM,
    "ablationcam": AblationCAM,
    "amg": AttentionMapGuided,
    "gradient": Gradient,
    "gradxinput": GradientTimesInput,
    "integrated_gradients": IntegratedGradients,
    "smoothgrad": SmoothGrad,
    "occlusion": Occlusion,
    "lrp": LRP,
    "c3lrp": C3LRP,
    "contrastive_lrp": ContrastiveLRP,
    "crp": CRP,
    "random": RandomMap,
    "constant": ConstantMap,
}


def explainer_by_name(name: str, **arguments: Any) -> Explainer:
    """Build an explainer by its name.

    Args:
        name: a key of `EXPLAINERS`; a leading `-` negates the maps.
        arguments: arguments of the explainer's class.

    Raises:
        InputError: the name is unknown; the message lists the nearest names.

    Example:
        >>> from labn.explainers import explainer_by_name
        >>> explainer_by_name("occlusion", window=16, stride=8).window
        16
        >>> explainer_by_name("gradcm")
        Traceback (most recent call last):
        labn.errors.InputError: There is no method 'gradcm'; did you mean gradcam, xgradcam, gradcam++?
    """
    if name.startswith("-"):
        return Negated(explainer_by_name(name[1:], **arguments))
    if name not in EXPLAINERS:
        near = difflib.get_close_matches(name, EXPLAINERS, n=3, cutoff=0.4) or sorted(EXPLAINERS)
        raise InputError(f"There is no method {name!r}; did you mean {', '.join(near)}?")
    return EXPLAINERS[name](**arguments)
