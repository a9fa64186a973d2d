"""Residual blocks of a graph, joined to regions that are differentiated as one layer.

The block rule of C3-LRP (JSAI 2024) treats a whole block y = f(x) as one layer:
R_q = x_q sum_cuv (d y_cuv / d x_q) R_cuv / (y_cuv + eps). Of two consecutive blocks, the upper one hands x * c to the
lower one, which divides by its output, the same x. With eps -> 0 the two factors cancel, and a sequence of blocks is
one gradient times its input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from labn.lrp.tracing.graph import Graph, Node


@dataclass(frozen=True)
class Block:
    """A residual block: index of the value that enters, index of the value that leaves, and all its nodes' indices."""

    entry: int
    exit: int
    members: frozenset[int]


def find_blocks(graph: Graph, at_pixels: bool = True) -> list[Block]:
    """All residual blocks of a graph, in order; of nested blocks the outer one.

    Args:
        graph: the recorded graph.
        at_pixels: include blocks that contain a first layer, whose own rule is not applied inside a block.
    """
    blocks: list[Block] = []
    carrying = graph.reach({graph.logits})
    for node in graph.nodes.values():
        if node.kind in ("sum", "difference") and len(node.inputs) == 2 and node.index in carrying:
            block = _block_at(node, graph)
            if _is_closed(block, graph) and (at_pixels or not _holds_first_layer(block, graph)):
                # Nodes come in order, so an enclosing block is found after the blocks inside it.
                blocks = [b for b in blocks if not b.members <= block.members] + [block]
    return blocks


def _block_at(node: Node, graph: Graph) -> Block:
    entry, exit_ = _dominator(node, graph), node.index
    # The ReLU after the sum belongs to the block, whose output is then what the next block reads.
    follower = _only_reader(exit_, graph)
    if follower is not None and follower.kind == "relu":
        exit_ = follower.index
    behind = _downstream(entry, graph)
    return Block(entry, exit_, frozenset(_upstream(exit_, graph) & behind))


def _dominator(node: Node, graph: Graph) -> int:
    """Index of the last value before `node` that all paths of relevance from `node` to the images pass."""
    frontier = set(node.flow)
    # Replace the latest value by its inputs until one is left; indices follow the order of computation.
    while len(frontier) > 1:
        latest = max(frontier)
        frontier.remove(latest)
        frontier.update(graph.nodes[latest].flow)  # a constant ends a path
    return frontier.pop() if frontier else 0


def _only_reader(index: int, graph: Graph) -> Node | None:
    readers = [node for node in graph.nodes.values() if index in node.inputs]
    return readers[0] if len(readers) == 1 else None


def _upstream(index: int, graph: Graph) -> set[int]:
    ancestors = {index}
    for current in sorted(graph.nodes, reverse=True):
        if current in ancestors:
            ancestors.update(graph.nodes[current].inputs)
    return ancestors


def _downstream(index: int, graph: Graph) -> set[int]:
    reached = {index}
    for node in graph.nodes.values():
        if reached.intersection(node.inputs):
            reached.add(node.index)
    return reached - {index}


def _is_closed(block: Block, graph: Graph) -> bool:
    """Whether no node outside of the block reads a value from inside, except the one that leaves."""
    inside = block.members - {block.exit}
    return not any(inside.intersection(n.inputs) for n in graph.nodes.values() if n.index not in block.members)


def _holds_first_layer(block: Block, graph: Graph) -> bool:
    return any(graph.nodes[index].first and graph.nodes[index].kind == "linear" for index in block.members)


def join_consecutive(blocks: list[Block], graph: Graph) -> list[Block]:
    """Join blocks that follow each other directly; a value that another node reads too ends a sequence."""
    sequences: list[Block] = []
    for block in blocks:
        previous = sequences[-1] if sequences else None
        if previous and previous.exit == block.entry and _read_only_inside(block, graph):
            sequences[-1] = Block(previous.entry, block.exit, previous.members | block.members)
        else:
            sequences.append(block)
    return sequences


def _read_only_inside(block: Block, graph: Graph) -> bool:
    return block.entry != graph.logits and all(
        node.index in block.members for node in graph.nodes.values() if block.entry in node.inputs
    )


def with_regions(graph: Graph, telescope: bool = True, at_pixels: bool = True) -> Graph:
    """The same graph with residual blocks as single nodes of kind `region`.

    Args:
        graph: the recorded graph.
        telescope: join consecutive blocks to one region.
        at_pixels: see `find_blocks`.
    """
    blocks = find_blocks(graph, at_pixels)
    regions = join_consecutive(blocks, graph) if telescope else blocks
    nodes = dict(graph.nodes)
    for region in regions:
        inner = tuple(graph.nodes[index] for index in sorted(region.members))
        last = inner[-1]
        reads = {index for node in inner for index in node.inputs} - region.members
        for node in inner:
            nodes.pop(node.index)
        inputs = (region.entry, *sorted(reads - {region.entry}))
        nodes[region.exit] = replace(last, kind="region", inputs=inputs, flow=(region.entry,), layer=None, inner=inner)
    return replace(graph, nodes=dict(sorted(nodes.items())))
