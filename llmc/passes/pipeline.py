"""The pipeline: every pass from a frontend's graph to fusions, in order, on one page.

Each takes a valid graph and returns one that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

from llmc.ir.graph import Graph
from llmc.ir.program import Capabilities
from llmc.passes.activation_codes import expand_activation_codes
from llmc.passes.byte_products import byte_products
from llmc.passes.fuse import fuse
from llmc.passes.legalize import legalize
from llmc.passes.merge_matmuls import merge_matmuls
from llmc.passes.outline import outline
from llmc.passes.prelude import split_prelude
from llmc.passes.raise_patterns import raise_patterns
from llmc.passes.simplify import simplify

Pass = Callable[[Graph, Capabilities], Graph]
Callback = Callable[[str, Graph, Graph], None]

PIPELINE: list[tuple[str, Pass]] = [
    ("simplify", lambda graph, _: simplify(graph)),
    # Decomposed norms, activations, rope and attention -> the composite ops. Before outlining:
    # inside a layer it can no longer be seen that cos and sin tables repeat their halves.
    ("raise_patterns", lambda graph, _: raise_patterns(graph)),
    # Integers less their zero points -> bytes, where the target multiplies these.
    ("byte_products", byte_products),
    # From here on, one layer stands for all.
    ("outline", lambda graph, _: outline(graph)),
    # Q, K, V -> one matmul; gate, up -> one matmul.
    ("merge_matmuls", lambda graph, _: merge_matmuls(graph)),
    ("simplify_again", lambda graph, _: simplify(graph)),
    # After this, only ops that the target has kernels for.
    ("legalize", legalize),
    # After this, whatever depends on parameters only is a parameter; quantised matrices are
    # dequantised parameters.
    ("split_prelude", split_prelude),
    # After this, only products that the target has a kernel for take activations as codes.
    ("expand_activation_codes", expand_activation_codes),
    # After this, only fusions, repeats, gets, views and leaves.
    ("fuse", fuse),
]


def optimize(graph: Graph, capabilities: Capabilities, callback: Callback | None = None,
             before_outline: tuple[str, Pass] | None = None) -> Graph:
    """The graph after every pass. callback(name, before, after) may print, time or verify.
    before_outline: (name, pass) for raised patterns, such as quantisation."""
    passes = list(PIPELINE)
    if before_outline is not None:
        passes.insert([name for name, _ in passes].index("outline"), before_outline)
    for name, apply in passes:
        before, graph = graph, apply(graph, capabilities)
        if callback is not None:
            callback(name, before, graph)
    return graph
