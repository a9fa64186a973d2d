"""Finding residual blocks in a graph, and joining them to regions that are differentiated as one.

The block rule of C3-LRP (JSAI 2024) treats a whole block y = f(x) as one layer:
R_q = x_q sum_cuv (d y_cuv / d x_q) R_cuv / (y_cuv + eps). Of two blocks in a row the upper one hands x * c to the lower
one, which divides by its output, the same x: with eps -> 0 the two cancel and the row is one plain gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from labn.lrp.tracing.graph import Graph, Node


@dataclass(frozen=True)
class Block:
    """A residual block: the value that enters, the value that leaves, and the indices of all nodes in between."""

    entry: int
    exit: int
    members: frozenset[int]


def find_blocks(graph: Graph, at_pixels: bool = True) -> list[Block]:
    """All residual blocks of a graph, in order; of nested ones the outer.

    Args:
        graph: as recorded.
        at_pixels: also those in which a first layer lies; inside of a block no rule of its own has a place.
    """
    blocks: list[Block] = []
    carrying = graph.reach({graph.logits})
    for node in graph.nodes.values():
        if node.kind == "sum" and len(node.inputs) == 2 and node.index in carrying:
            block = _block_at(node, graph)
            if _is_closed(block, graph) and (at_pixels or not _holds_first_layer(block, graph)):
                blocks = [b for b in blocks if not b.members <= block.members] + [block]
    return blocks


def _block_at(node: Node, graph: Graph) -> Block:
    entry, exit_ = _dominator(node, graph), node.index
    follower = _only_reader(exit_, graph)
    if follower is not None and follower.kind == "relu":
        exit_ = follower.index
    behind = _downstream(entry, graph)
    return Block(entry, exit_, frozenset(_upstream(exit_, graph) & behind))


def _dominator(node: Node, graph: Graph) -> int:
    """The last value that every path of relevance from `node` to the images passes through."""
    frontier = set(node.flow)
    while len(frontier) > 1:
        latest = max(frontier)
        frontier.remove(latest)
        frontier.update(graph.nodes[latest].flow)
    return frontier.pop()


def _only_reader(index: int, graph: Graph) -> Node | None:
    readers = [node for node in graph.nodes.values() if index in node.inputs]
    return readers[0] if len(readers) == 1 else None


def _upstream(index: int, graph: Graph) -> set[int]:
    found = {index}
    for current in sorted(graph.nodes, reverse=True):
        if current in found:
            found.update(graph.nodes[current].inputs)
    return found


def _downstream(index: int, graph: Graph) -> set[int]:
    found = {index}
    for node in graph.nodes.values():
        if found.intersection(node.inputs):
            found.add(node.index)
    return found - {index}


def _is_closed(block: Block, graph: Graph) -> bool:
    """Nothing outside reads a value from inside, other than the one that leaves."""
    inside = block.members - {block.exit}
    return not any(inside.intersection(n.inputs) for n in graph.nodes.values() if n.index not in block.members)


def _holds_first_layer(block: Block, graph: Graph) -> bool:
    return any(graph.nodes[index].first and graph.nodes[index].kind == "linear" for index in block.members)


def join_rows(blocks: list[Block], graph: Graph) -> list[Block]:
    """Join blocks that follow each other directly; a value that something else reads too ends a row."""
    rows: list[Block] = []
    for block in blocks:
        previous = rows[-1] if rows else None
        if previous and previous.exit == block.entry and _read_only_inside(block, graph):
            rows[-1] = Block(previous.entry, block.exit, previous.members | block.members)
        else:
            rows.append(block)
    return rows


def _read_only_inside(block: Block, graph: Graph) -> bool:
    return block.entry != graph.logits and all(
        node.index in block.members for node in graph.nodes.values() if block.entry in node.inputs
    )


def with_regions(graph: Graph, telescope: bool = True, at_pixels: bool = True) -> Graph:
    """The same graph with every residual block, or every row of them, as one node of kind `region`."""
    blocks = find_blocks(graph, at_pixels)
    rows = join_rows(blocks, graph) if telescope else blocks
    nodes = dict(graph.nodes)
    for row in rows:
        inner = tuple(graph.nodes[index] for index in sorted(row.members))
        last = inner[-1]
        reads = {index for node in inner for index in node.inputs} - row.members
        for node in inner:
            nodes.pop(node.index)
        inputs = (row.entry, *sorted(reads - {row.entry}))
        nodes[row.exit] = replace(last, kind="region", inputs=inputs, flow=(row.entry,), layer=None, inner=inner)
    return replace(graph, nodes=dict(sorted(nodes.items())))
