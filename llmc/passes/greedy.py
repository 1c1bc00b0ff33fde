"""The most likely token of every row of logits as an output: greedy decoding reads eight bytes
instead of a vocabulary, which counts where results cross a bus."""

from __future__ import annotations

from llmc.ir.graph import Graph
from llmc.ir.ops import make

GREEDY = "greedy"


def with_greedy(graph: Graph) -> Graph:
    """The graph with the output `greedy[rows]`: argmax of `logits[rows, vocab]`."""
    (logits,) = (node for name, node in graph.outputs if name == "logits")
    best = make("argmax", logits, axis=-1, keep=False, last=False)
    return Graph(graph.name, graph.inputs, (*graph.outputs, (GREEDY, best)), graph.updates)
