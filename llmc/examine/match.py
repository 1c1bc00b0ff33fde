"""Which node of one graph computes what a node of another does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llmc.errors import LlmcError
from llmc.examine.taps import module_of, tap_points
from llmc.ir.graph import Graph, Node, origin_of

Pairs = list[tuple[Node, Node]]


def match(left: Graph, right: Graph) -> Pairs:
    """Pairs of nodes with the same meaning, in the order of the left graph.

    Graphs of the same ops in the same order (casts aside) match op by op; of two ONNX files the
    results of nodes of the same name do; else the results of modules of the same path. Outputs of
    the same name always do. LlmcError if nothing matches.
    """
    for pairs in (_in_lockstep(left, right), _by_name(left, right, _file_node),
                  _by_name(left, right, _module)):
        if pairs:
            return with_outputs(pairs, left, right)
    raise LlmcError(f"{left.name} and {right.name} have no op, node name or module path in common")


def with_outputs(pairs: Pairs, left: Graph, right: Graph) -> Pairs:
    """The pairs and those of the computed outputs of the same name, in the left graph's order."""
    order = {node: place for place, node in enumerate(left.nodes())}
    points, others = set(tap_points(left)), dict(right.outputs)
    outputs = [(node, others[name]) for name, node in left.outputs
               if node in points and name in others]
    return sorted(dict.fromkeys([*pairs, *outputs]), key=lambda pair: order[pair[0]])


def _in_lockstep(left: Graph, right: Graph) -> Pairs:
    a, b = _without_casts(left), _without_casts(right)
    same = len(a) == len(b) and all(x.op == y.op and x.rank == y.rank
                                    for x, y in zip(a, b, strict=True))
    return list(zip(a, b, strict=True)) if same else []


def _without_casts(graph: Graph) -> list[Node]:
    return [node for node in tap_points(graph) if node.op != "cast"]


def _by_name(left: Graph, right: Graph, name_of: Callable[[Node], str | None]) -> Pairs:
    """Pairs of the last nodes of each name; both must have the same number of items."""
    a, b = _results(tap_points(left), name_of), _results(tap_points(right), name_of)
    return [(node, b[name]) for name, node in a.items() if name in b]


def _results(points: Sequence[Node], name_of: Callable[[Node], str | None]) -> dict[str, Node]:
    """The last node of each name, in the order in which these are computed."""
    last: dict[str, Node] = {}
    for node in points:
        if (name := name_of(node)) is not None:
            last.pop(name, None)
            last[name] = node
    return last


def _file_node(node: Node) -> str | None:
    origin = origin_of(node)
    return origin.node if origin else None


def _module(node: Node) -> str | None:
    """The module's path from its layer number on: exporters and checkpoints begin differently."""
    path = module_of(node)
    found = re.search(r"\.(\d+(?:\..*)?)$", path) if path else None
    return found[1] if found else None
