"""Layer-wise relevance propagation that conserves, on any network of linear layers, ReLUs, pools, sums and gates."""

from labn.lrp.config import Config
from labn.lrp.engine import Relevance, backward, forward, relevance
from labn.lrp.initial import Contrast, initial_relevance
from labn.lrp.rules.conservation import ConservationReport, Entry

__all__ = [
    "Config",
    "ConservationReport",
    "Contrast",
    "Entry",
    "Relevance",
    "backward",
    "forward",
    "initial_relevance",
    "relevance",
]
