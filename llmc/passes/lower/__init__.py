"""lower(graph, capabilities, key): an optimised graph to a program.

What depends on (graph, capabilities) only: weight layouts, state layouts, the order of buffers in
the step's ABI. What the shape key decides: which matmuls stream weights past a few rows (prologue
inside), and which pack their rows in a stage of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmc.errors import CompileError
from llmc.ir.dims import Dim, symbol
from llmc.ir.graph import Graph, substitute_symbols
from llmc.ir.program import Capabilities, Program
from llmc.passes.lower.memory import plan_memory
from llmc.passes.lower.outputs import direct_outputs
from llmc.passes.lower.stages import Lowering

ShapeKey = Mapping[str, tuple[int, int]]


def lower(graph: Graph, capabilities: Capabilities, key: ShapeKey | None = None) -> Program:
    """Lower a graph whose nodes are fusions and repeats.

    key: symbol name -> (low, high); symbols that are not named keep the graph's range. Raises
    CompileError where no kernel fits, or where the key leaves the graph's ranges.
    """
    symbols = key_ranges(graph, key or {})
    lowering = Lowering(narrow(graph, symbols), capabilities)
    steps, buffers = direct_outputs(lowering.run(), lowering.buffers)
    buffers, arena_bytes = plan_memory(steps, buffers)
    return Program(graph.name, capabilities, symbols, buffers, lowering.weights, tuple(steps),
                   arena_bytes)


def key_ranges(graph: Graph, key: ShapeKey) -> tuple[tuple[str, int, int], ...]:
    """Every symbol of the graph with its range under the key, in the graph's order."""
    symbols = graph.symbols()
    unknown = set(key) - {s.name for s in symbols}
    if unknown:
        raise CompileError(f"{graph.name} has no symbol {', '.join(sorted(unknown))}; it has "
                           f"{', '.join(s.name for s in symbols)}")
    ranges = []
    for own in symbols:
        low, high = key.get(own.name, (own.low, own.high))
        if not own.low <= low <= high <= own.high:
            raise CompileError(f"{own.name} in {low}..{high} leaves the range of {graph.name}, "
                               f"{own.low}..{own.high}")
        ranges.append((own.name, low, high))
    return tuple(ranges)


def narrow(graph: Graph, ranges: Sequence[tuple[str, int, int]]) -> Graph:
    """The graph with each symbol narrowed to its range; one-valued symbols become ints."""
    replace: dict[str, Dim] = {}
    own = {s.name: s for s in graph.symbols()}
    for name, low, high in ranges:
        if (low, high) != (own[name].low, own[name].high):
            replace[name] = low if low == high else symbol(name, low, high, own[name].multiple)
    return substitute_symbols(graph, replace) if replace else graph
