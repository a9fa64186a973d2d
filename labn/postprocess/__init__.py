"""Postprocessing of finished maps (B, H, W), which are not changed in place: C3, C1C, quantisation, scaling."""

from labn.postprocess.levels import normalise, quantise, unit_range, with_sign
from labn.postprocess.region_choice import c1c, c3, c3_fallback
from labn.postprocess.regions import Options
from labn.postprocess.registry import STEPS, apply, check_names

__all__ = [
    "STEPS",
    "Options",
    "apply",
    "c1c",
    "c3",
    "c3_fallback",
    "check_names",
    "normalise",
    "quantise",
    "unit_range",
    "with_sign",
]
