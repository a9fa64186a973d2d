"""The names of the methods in configurations, on the command line and in `labn.explain`."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

from labn.errors import InputError, InputTypeError
from labn.explainers.attention.legrad import LeGrad
from labn.explainers.attention.own_maps import BranchAttention, LambdaAttention
from labn.explainers.attention.rollout import AttentionRollout
from labn.explainers.base import Explainer
from labn.explainers.baseline import ConstantMap, Negated, RandomMap, SobelMap
from labn.explainers.cam.ablation import AblationCAM
from labn.explainers.cam.attention_guided import AttentionMapGuided
from labn.explainers.cam.gradcam import FinerCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from labn.explainers.cam.linear import CAM
from labn.explainers.cam.score import ScoreCAM
from labn.explainers.cam.smooth import SmoothGradCAMPlusPlus
from labn.explainers.gradient import Gradient, GradientTimesInput, IntegratedGradients, SmoothGrad
from labn.explainers.paths import BlackWhiteIntegratedGradients, BlurredIntegratedGradients, ExpectedGradients
from labn.explainers.perturbation.kernel_shap import KernelSHAP
from labn.explainers.perturbation.occlusion import Occlusion
from labn.explainers.perturbation.rise import RISE, ReleasedRISE
from labn.explainers.perturbation.sobol import SobolAttribution
from labn.explainers.rectified import Deconvnet, GuidedBackpropagation
from labn.explainers.relevance.crp import CRP
from labn.explainers.relevance.lrp import C3LRP, LRP, ContrastiveLRP

EXPLAINERS: dict[str, Callable[..., Explainer]] = {
    "labn": BranchAttention,
    "abn": BranchAttention,
    "lambda": LambdaAttention,
    "rollout": AttentionRollout,
    "legrad": LeGrad,
    "rise": RISE,
    "rise_released": ReleasedRISE,
    "cam": CAM,
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "smoothgradcam++": SmoothGradCAMPlusPlus,
    "xgradcam": XGradCAM,
    "layercam": LayerCAM,
    "hirescam": HiResCAM,
    "finercam": FinerCAM,
    "scorecam": ScoreCAM,
    "ablationcam": AblationCAM,
    "amg": AttentionMapGuided,
    "gradient": Gradient,
    "gradxinput": GradientTimesInput,
    "integrated_gradients": IntegratedGradients,
    "integrated_gradients_blur": BlurredIntegratedGradients,
    "integrated_gradients_bw": BlackWhiteIntegratedGradients,
    "expected_gradients": ExpectedGradients,
    "smoothgrad": SmoothGrad,
    "guided_backprop": GuidedBackpropagation,
    "deconvnet": Deconvnet,
    "occlusion": Occlusion,
    "sobol": SobolAttribution,
    "kernelshap": KernelSHAP,
    "lrp": LRP,
    "c3lrp": C3LRP,
    "contrastive_lrp": ContrastiveLRP,
    "crp": CRP,
    "random": RandomMap,
    "constant": ConstantMap,
    "sobel": SobelMap,
}


USUAL_NAMES = {
    "ig": "integrated_gradients",
    "integratedgradient": "integrated_gradients",
    "saliency": "gradient",
    "vanillagradient": "gradient",
    "inputxgradient": "gradxinput",
    "inputtimesgradient": "gradxinput",
    "gradientxinput": "gradxinput",
    "gradcampp": "gradcam++",
    "gradcamplusplus": "gradcam++",
    "smoothgradcampp": "smoothgradcam++",
    "crpssd": "crp",
    "attentionrollout": "rollout",
    "lambdaattention": "lambda",
    "featureablation": "occlusion",
    "guidedbackpropagation": "guided_backprop",
    "deconvolution": "deconvnet",
    "edges": "sobel",
    "shap": "kernelshap",
    "sobolattribution": "sobol",
}
"""Names that other libraries and papers use, in small letters without signs -> names here."""


def near_names(name: str) -> list[str]:
    """Names of methods that someone who wrote `name` may mean: by spelling, or by what others call them."""
    plain = re.sub(r"[\s_.-]", "", name.lower())
    same = [known for known in EXPLAINERS if re.sub(r"[\s_.-]", "", known) == plain]
    if plain in USUAL_NAMES or same:
        return [USUAL_NAMES[plain]] if plain in USUAL_NAMES else same
    return difflib.get_close_matches(name, EXPLAINERS, n=3, cutoff=0.4) or sorted(EXPLAINERS)


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
        raise InputError(f"There is no method {name!r}; did you mean {', '.join(near_names(name))}?")
    build = EXPLAINERS[name]
    known = [key for key in inspect.signature(build).parameters if key != "self"]
    if unknown := [key for key in arguments if key not in known]:
        raise InputTypeError(f"method {name!r} has no argument {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    return build(**arguments)
