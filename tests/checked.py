"""What is asked of every graph: it is valid, and prints, parses and prints identically."""

from __future__ import annotations

from llmc.ir.graph import Graph
from llmc.ir.program import Capabilities
from llmc.ir.text import format_graph, parse_graph
from llmc.ir.verify import verify
from llmc.passes.pipeline import Callback, Pass, optimize


def check_graph(graph: Graph) -> None:
    verify(graph)
    text = format_graph(graph)
    assert format_graph(parse_graph(text)) == text


def checked_optimize(graph: Graph, capabilities: Capabilities, callback: Callback | None = None,
                     before_outline: tuple[str, Pass] | None = None) -> Graph:
    """`optimize`, with every graph on the way checked."""

    def check(name: str, before: Graph, after: Graph) -> None:
        check_graph(after)
        if callback is not None:
            callback(name, before, after)

    check_graph(graph)
    return optimize(graph, capabilities, check, before_outline)
