"""Which inputs of a graph are indexes, and into axes of which size.

What a graph computes for itself may be trusted to lie inside; what a caller gives may not, and a
kernel has no way to say so: the runtime checks it before the step.
"""

from __future__ import annotations

from llmc.ir.dims import Dim
from llmc.ir.graph import Graph, Node

Extents = tuple[Dim, ...]


def index_ranges(graph: Graph) -> dict[str, tuple[Extents, ...]]:
    """Input -> the axes that its items pick from, for each use: one for all items, or one for each
    item of its last axis. An item of an axis of n items lies in -n..n-1."""
    found: dict[str, dict[Extents, None]] = {}
    for node in graph.nodes():
        extents = _extents(node)
        if not extents:
            continue
        source = _given(node.inputs[1], len(extents) == 1)
        if source.op == "input":
            found.setdefault(source["name"], {})[extents] = None
    return {name: tuple(uses) for name, uses in found.items()}


def _extents(node: Node) -> Extents:
    """The axes that the second operand of a node picks from; none if it is no index."""
    if node.op in ("gather", "gather_elements", "scatter_elements"):
        return (node.inputs[0].shape[node["axis"]],)
    if node.op not in ("gather_nd", "scatter_nd"):
        return ()
    first, depth = node["batch_dims"] if node.op == "gather_nd" else 0, node.inputs[1].shape[-1]
    return tuple(node.inputs[0].shape[first : first + depth]) if isinstance(depth, int) else ()


def _given(index: Node, any_shape: bool) -> Node:
    """The tensor whose items these are: behind casts, changes of shape where all items are alike,
    and `where(i < 0, i + n, i)`."""
    while True:
        moved = any_shape and index.op in ("reshape", "broadcast", "transpose")
        if moved or (index.op == "cast" and index.inputs[0].dtype.is_integer):
            index = index.inputs[0]
        elif index.op == "where" and _wraps(index):
            index = index.inputs[2]
        else:
            return index


def _wraps(where: Node) -> bool:
    """Whether it is `where(i < 0, ..., i)`."""
    negative, _, index = where.inputs
    return negative.op == "less" and negative.inputs[0] is index
