"""outline: repeated layers become one `repeat` node, so that compile time does not grow with depth.

Where a model's layers meet, one value alone carries everything on: the residual stream. So the pass

1. finds the *joints*: nodes that every path from a graph input to the output runs through;
2. describes each segment between two joints by its structure (ops, attributes, types; no names);
3. finds the longest periodic run of equal segments, with the least period;
4. checks the turns of the run node by node against the first, and collects what differs: parameters
   and states (one leaf with `names`), scalar constants (`table`).

Nodes whose value is used far away, such as an embedding that every layer reads again, are no
obstacle: they become invariants of the loop. A model that gives out a value of every layer (hidden
states, or the `present_key_values` of an ONNX export) keeps those layers unrolled.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.ir.graph import Graph, merge_origins, rebuild
from llmc.ir.ops import make
from llmc.passes.segments import Segments, descendants, find_joints
from llmc.passes.turns import Turns, match_turns

SOURCES = 4  # inputs tried, those that most of the graph depends on first


def outline(graph: Graph) -> Graph:
    """The graph with its repeated layers as `repeat` nodes, one for each stack of layers."""
    while True:
        outlined = _outline_once(graph)
        if outlined is None:
            return graph
        graph = outlined


def _outline_once(graph: Graph) -> Graph | None:
    nodes = graph.nodes()
    streams = sorted((descendants(nodes, source) for source in graph.inputs), key=len, reverse=True)
    for stream in streams[:SOURCES]:
        segments = Segments(graph, stream, find_joints(stream))
        for run in segments.runs():
            turns = match_turns(segments, *run)
            outlined = _replace(graph, turns) if turns is not None else None
            if outlined is not None:
                return outlined
    return None


def _replace(graph: Graph, turns: Turns) -> Graph | None:
    """The graph with the loop in place of its turns; None if others want a value inside a turn."""
    loop = make("repeat", turns.initial, *turns.invariants, bodies=(turns.body,),
                count=turns.count, carried=1)
    merge_origins(loop, turns.final)
    updates = tuple(update for update in graph.updates if update[0] not in turns.states)
    outlined = rebuild(replace(graph, updates=updates), {turns.final: loop})
    return None if turns.nodes.intersection(outlined.nodes()) else outlined
