"""Layer-wise relevance propagation that conserves, on any network of linear layers, ReLUs, pools, sums and gates."""

from labn.lrp.config import Config
from labn.lrp.engine import Relevance, backward, forward, relevance
from labn.lrp.initial import Contrast, initial_relevance
from labn.lrp.rules.conservation import Entry, Ledger

__all__ = [
    "Config",
    "Contrast",
    "Entry",
    "Ledger",
    "Relevance",
    "backward",
    "forward",
    "initial_relevance",
    "relevance",
]
