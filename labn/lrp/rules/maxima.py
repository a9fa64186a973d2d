"""Maxima along an axis and of two values: relevance goes to the winners, in equal shares where they tie."""

from __future__ import annotations

from dataclasses import replace

import torch

from labn.lrp.tracing.graph import Node


def with_shared_ties(node: Node) -> Node:
    """A maximum along an axis by `amax`, whose gradient is shared by ties; `max` gives it to the first of them."""
    call = node.call
    if call.operation not in ("max", "min") or call.item is None:
        return node
    function = torch.amax if call.operation == "max" else torch.amin
    return replace(node, call=replace(call, func=function, item=None))
