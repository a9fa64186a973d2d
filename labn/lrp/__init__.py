"""Layer-wise relevance propagation through the layers that vision networks are made of; see README.md."""

from labn.lrp.config import Config
from labn.lrp.engine import Relevance, backward, forward, relevance
from labn.lrp.initial import Contrast, initial_relevance
from labn.lrp.layer_rules import COMPOSITES, LayerRule
from labn.lrp.rules.conservation import ConservationReport, Entry
from labn.lrp.weight_transforms import Flat, Gamma, Identity, Negative, Positive, Square, WeightTransform
from labn.lrp.weighted_product import Dense, Weights, weighted

__all__ = [
    "COMPOSITES",
    "Config",
    "ConservationReport",
    "Contrast",
    "Dense",
    "Entry",
    "Flat",
    "Gamma",
    "Identity",
    "LayerRule",
    "Negative",
    "Positive",
    "Relevance",
    "Square",
    "WeightTransform",
    "Weights",
    "backward",
    "forward",
    "initial_relevance",
    "relevance",
    "weighted",
]
